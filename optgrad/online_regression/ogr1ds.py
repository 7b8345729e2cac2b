"""Online gradient regression in one direction, with a second set of statistics for the next one."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, transforms, trees
from optgrad.online_regression import ogr1, parabola
from optgrad.online_regression.parabola import Parabola
from optgrad.registry import Method, Tunable, register


class TwoDirectionsState(NamedTuple):
    """State of `ogr1ds`."""

    count: chex.Array  # number of updates, int32, shape ()
    momentum: optax.Updates  # v = Σ γˢ g, like the parameters, at least float32
    next_direction: optax.Updates  # v̂, whose statistics are being gathered, like the momentum
    direction: optax.Updates  # ŵ, along which steps are modelled, like the momentum
    next_model: Parabola  # statistics along v̂, shape () or (leaves,)
    model: Parabola  # statistics along ŵ, shape () or (leaves,)
    position: chex.Array  # θ·ŵ of the last sample, shape () or (leaves,)
    step: chex.Array  # last step along ŵ, shape () or (leaves,)

    def diagnostics(self) -> dict[str, Any]:
        """The parabola along the direction in use, entries of shape () or (leaves,).

        ``curvature`` λ and ``minimum`` p; ``sigma_ratio`` σθ/σg; ``correlation`` of gradient and
        position, the confidence in λ; ``position``, ``mean_position``, ``mean_gradient``;
        ``step`` δ, the step made along the direction.
        """
        return ogr1.model_diagnostics(self.model, self.position, self.step)


def ogr1ds(
    eta: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule = 0.5,
    beta: optax.ScalarOrSchedule = 0.9,
    gamma: optax.ScalarOrSchedule = 0.99,
    *,
    epsilon: optax.ScalarOrSchedule = 0.3,
    clip_sigmas: optax.ScalarOrSchedule | None = None,
    lr_max: optax.ScalarOrSchedule | None = None,
    step: str = "regression",
    negative_curvature: str = "reverse",
    warmup_steps: int = 10,
    stage_steps: int = 10,
    per_tensor: bool = False,
    paper: bool = False,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Safe online gradient regression in one direction (OGR1ds).

    The model never turns. Steps of `ogr1d`'s form are made along a frozen direction ŵ, while
    statistics are gathered along the next one, v̂; every ``stage_steps`` steps

    .. math::
      \hat w \leftarrow \hat v, \quad \mathrm{avg}_w \leftarrow \mathrm{avg}_v, \qquad
      \hat v \leftarrow \pm v/\|v\|, \quad \mathrm{avg}_v \leftarrow 0 .

    The new direction's statistics come from the steps made along the old one, a whole stage of
    them: ``stage_steps`` ≥ 1/(1−β) is sensible. With a stage of 50 and β = 0.97 it is the best of
    its family under the noise of small batches. Directions are old by one to two stages, so that
    without noise `ogr1dc` is faster. As printed it locks itself: θ stops moving along the
    direction, its variance goes to 0 and λ to 0/0; the fallback to gradient descent where the
    positions have no spread keeps data coming.

    Args:
      eta: η ≥ 0, rate of gradient descent in the other directions and of the warm-up.
      alpha: α ≥ 0, confidence in the parabola, usually in (0, 1].
      beta: β in [0, 1), forgetting of the statistics.
      gamma: γ in [0, 1), decay of the momentum that gives the direction.
      epsilon: ε > 0, longest step along the direction before α, in the parameters' units.
      clip_sigmas: > 0, longest such step in standard deviations σθ of the positions; default 10,
        in the paper's preset infinite.
      lr_max: > 0, bound on 1/abs(λ); default 100, in the paper's preset infinite.
      step: ``"regression"``, p from the averages (Eq. 4); ``"last_point"``, from the newest
        gradient (Eq. 6); ``"sigma_ratio"``, −min(σθ/σg, lr_max)·q, always downhill (Eq. 9).
      negative_curvature: where λ < 0: ``"reverse"`` the step (repelled by saddles),
        ``"gradient_descent"``, or ``"tanh"`` of λ·lr_max instead of the sign.
      warmup_steps: ≥ 1, steps of each warm-up phase.
      stage_steps: m ≥ 2, steps between changes of direction.
      per_tensor: one direction and one parabola for each leaf instead of one for all.
      paper: the printed algorithm with its errata mended and no guard: no bound on 1/abs(λ), no
        clip in σθ, no fallback to gradient descent, and momentum steps of up to 1/(1−γ) gradients
        in the warm-up. It becomes NaN on most problems.
      state_dtype: type of momentum and directions; default the parameter's, at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds three vectors of parameter size;
      ``update`` needs ``params``. `optgrad.diagnostics` reads the parabola from the state.

    Raises:
      ValueError: for a number outside its range, an unknown option, or ``params=None`` in
        ``update``.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optgrad.ogr1ds(0.1)
      >>> params = jnp.array([3.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(200):
      ...     updates, state = optimizer.update(2.0 * (params - 1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params[0]:.3f}")
      1.000

    References:
      J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019,
      Algorithm 6 (with 2–5), Eqs. (2)–(4), (6), (9).

    Deviations from the paper: the averages are carried in central form; the warm-up pairs each
    gradient with the position where it was taken. The guards named above, unless ``paper``.
    """
    settings = ogr1.Settings(
        eta,
        alpha,
        beta,
        gamma,
        epsilon,
        ogr1.preset(clip_sigmas, paper, robust=10.0),
        ogr1.preset(lr_max, paper, robust=100.0),
    )
    rule = ogr1.Rule(step, negative_curvature, paper)
    ogr1.check_settings(settings, rule, warmup_steps, state_dtype)
    checks.check_count("stage_steps", stage_steps, 2)
    m = warmup_steps

    def init(params: optax.Params) -> TwoDirectionsState:
        shape = ogr1.model_shape(params, per_tensor)
        zero = jnp.zeros(shape, averages.scalar_dtype())
        return TwoDirectionsState(
            count=jnp.zeros((), jnp.int32),
            momentum=averages.zeros_like_average(params, state_dtype),
            next_direction=averages.zeros_like_average(params, state_dtype),
            direction=averages.zeros_like_average(params, state_dtype),
            next_model=parabola.init_parabola(shape),
            model=parabola.init_parabola(shape),
            position=zero,
            step=zero,
        )

    def update(
        updates: optax.Updates,
        state: TwoDirectionsState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, TwoDirectionsState]:
        del extra
        params = transforms.require_params(params)
        t, v, old, used = state.count, state.momentum, state.next_direction, state.direction
        at = settings.at(t)

        # First pass: every inner product of this step.
        in_stage = jnp.maximum(t - 2 * m, 0) % stage_steps  # steps since the last switch
        switches = (t >= 2 * m) & (in_stage == 0)
        vv, vd, gv, gd, gw, xv, xd, xw = ogr1.inner_products(
            per_tensor,
            *((v, v), (v, old), (updates, v), (updates, old), (updates, used)),
            *((params, v), (params, old), (params, used)),
        )
        mix = ogr1.refresh((t == m) | switches, vv, vd)
        next_slope, next_position = mix(gv, gd), mix(xv, xd)
        slope, position = jnp.where(switches, gd, gw), jnp.where(switches, xd, xw)

        # Scalars: both sets of statistics, and the step.
        first_stage = t < 2 * m + stage_steps
        gathered = jnp.where(first_stage, m, stage_steps) + in_stage + 1  # samples of ŵ's set
        fresh = jnp.where(t < 2 * m, t - m, in_stage) + 1  # samples of v̂'s set
        weights = averages.sample_weights(jnp.maximum(gathered, 1), at.beta)
        next_weights = averages.sample_weights(jnp.maximum(fresh, 1), at.beta)
        empty = parabola.init_parabola(slope.shape)
        model = _select(switches, state.next_model, state.model)
        sampled = parabola.update_parabola(model, position, slope, weights)
        model = _select(t >= 2 * m, sampled, model)
        next_model = _select(switches, empty, state.next_model)
        sampled = parabola.update_parabola(next_model, next_position, next_slope, next_weights)
        next_model = _select(t >= m, sampled, next_model)
        step = ogr1.step_along(model, position, slope, at, rule)
        warming_up, coefficient = t < 2 * m, ogr1.momentum_scale(t, at, rule)
        mix, along = leafwise.computed_once((mix, step + at.eta * slope))

        # Second pass: directions, momentum, update.
        direction = ogr1.select_after(xw, switches, old, used)
        next_direction = ogr1.mix_directions(mix, v, old)
        next_direction = leafwise.tree_map(trees.ordered_after, next_direction, direction)
        momentum = ogr1.update_momentum(v, updates, at.gamma, next_direction)
        emitted = ogr1.emit(
            (momentum, direction, updates),
            params,
            warming_up=warming_up,
            coefficient=coefficient,
            along=along,
            eta=at.eta,
        )
        return emitted, TwoDirectionsState(
            count=optax.safe_increment(t),
            momentum=momentum,
            next_direction=next_direction,
            direction=direction,
            next_model=next_model,
            model=model,
            position=position,
            step=jnp.where(warming_up, 0.0, step),
        )

    return transforms.transformation(init, update)


def _select(condition: chex.Array, new: Parabola, old: Parabola) -> Parabola:
    return Parabola(*(jnp.where(condition, x, y) for x, y in zip(new, old, strict=True)))


register(
    Method(
        name="ogr1ds",
        factory=ogr1ds,
        scale_by=None,
        family="online_regression",
        title="Safe online gradient regression in one direction (OGR1ds)",
        reference=parabola.REFERENCE,
        equation="Algorithm 6, Eq. (4): averages for the direction in use and for the next one",
        needs=frozenset({"params"}),
        static_args=(
            "step",
            "negative_curvature",
            "warmup_steps",
            "stage_steps",
            "per_tensor",
            "paper",
            "state_dtype",
        ),
        tunes=Tunable("eta", 1e-4, 1e1),
        test_hyperparams={"eta": 0.1, "warmup_steps": 1},
        state_size=3,
        low_precision=ogr1.LOW_PRECISION,
    )
)

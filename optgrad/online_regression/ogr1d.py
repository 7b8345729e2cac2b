"""Online gradient regression in one direction."""

from typing import Any

import optax

from optgrad.online_regression import ogr1, parabola
from optgrad.registry import Method, Tunable, register


def ogr1d(
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
    per_tensor: bool = False,
    paper: bool = False,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Online gradient regression in one direction (OGR1d).

    Along :math:`\hat v = \pm v/\|v\|`, the direction of the momentum :math:`v \leftarrow \gamma v +
    g`, exponentially weighted regression of the gradient :math:`q = g\cdot\hat v` on the position
    :math:`x = \theta\cdot\hat v` gives a parabola with curvature λ and extremum p; the step goes
    toward (or, if λ < 0, away from) it, and is plain gradient descent in all other directions:

    .. math::
      \theta \leftarrow \theta + \alpha\,\operatorname{sgn}(\lambda)\,C(p - x)\,\hat v
        - \eta\,(g - q\hat v), \qquad C(y) = \operatorname{clip}(y, \pm\epsilon)

    The first 2·``warmup_steps`` steps are momentum steps, the second half of which fills the
    averages on a fixed direction.

    It is here for completeness: the statistics are carried over unchanged when the direction
    turns, which turns the model about θ = 0. Where the parameters are far from 0 compared with
    their motion, that is wrong by more than what was learned, and the method stalls. `ogr1dc` costs
    no more and turns about the current position.

    Args:
      eta: η ≥ 0, rate of gradient descent in the other directions and of the warm-up.
      alpha: α ≥ 0, confidence in the parabola, usually in (0, 1].
      beta: β in [0, 1), forgetting of the statistics; smaller than ``gamma``: the direction must
        turn more slowly than the averages forget.
      gamma: γ in [0, 1), decay of the momentum that gives the direction.
      epsilon: ε > 0, longest step along the direction before α, in the parameters' units.
      clip_sigmas: > 0, longest such step in standard deviations σθ of the positions; default 10,
        in the paper's preset infinite.
      lr_max: > 0, bound on 1/abs(λ); default 100, in the paper's preset infinite.
      step: ``"regression"``, p from the averages (Eq. 4); ``"last_point"``, from the newest
        gradient (Eq. 6); ``"sigma_ratio"``, −min(σθ/σg, lr_max)·q, always downhill (Eq. 9; wants
        β = 0.99).
      negative_curvature: where λ < 0: ``"reverse"`` the step (repelled by saddles),
        ``"gradient_descent"``, or ``"tanh"`` of λ·lr_max instead of the sign.
      warmup_steps: m ≥ 1, steps of each warm-up phase.
      per_tensor: one direction and one parabola for each leaf instead of one for all.
      paper: the printed algorithm with its errata mended and no guard: no bound on 1/abs(λ), no
        clip in σθ, no fallback to gradient descent where the positions have no spread, and
        momentum steps of up to 1/(1−γ) gradients in the warm-up.
      state_dtype: type of momentum and direction; default the parameter's, at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size;
      ``update`` needs ``params``. `optgrad.diagnostics` reads the parabola from the state.

    Raises:
      ValueError: for a number outside its range, an unknown option, or ``params=None`` in
        ``update``.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optgrad.ogr1d(0.1, gamma=0.5)
      >>> params = jnp.array([0.5])
      >>> state = optimizer.init(params)
      >>> for _ in range(60):
      ...     updates, state = optimizer.update(2.0 * (params - 1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params[0]:.4f}, curvature {optgrad.diagnostics(state)['curvature']:.2f}")
      1.0000, curvature 2.00

    References:
      J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019,
      Algorithms 1–5, Eqs. (2)–(4), (6), (9).

    Deviations from the paper: the averages are carried in central form; a new direction never
    points against the old one, since the averages do not change sign; the warm-up pairs each
    gradient with the position where it was taken (Algorithm 5 pairs it with the next one). The
    guards named above, unless ``paper``.
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
    return ogr1.turning_direction(
        settings,
        ogr1.Rule(step, negative_curvature, paper),
        warmup_steps=warmup_steps,
        stage_steps=1,
        centred=False,
        measured=False,
        per_tensor=per_tensor,
        state_dtype=state_dtype,
    )


register(
    Method(
        name="ogr1d",
        factory=ogr1d,
        scale_by=None,
        family="online_regression",
        title="Online gradient regression in one direction (OGR1d)",
        reference=parabola.REFERENCE,
        equation="Algorithm 1, Eq. (4): θ ← θ + α·sgn(λ)·C(p − θ·v̂)·v̂ − η(g − (g·v̂)v̂)",
        needs=frozenset({"params"}),
        static_args=(
            "step",
            "negative_curvature",
            "warmup_steps",
            "per_tensor",
            "paper",
            "state_dtype",
        ),
        tunes=Tunable("eta", 1e-4, 1e1),
        test_hyperparams={"eta": 0.1, "warmup_steps": 1},
        state_size=2,
        low_precision=ogr1.LOW_PRECISION,
    )
)

"""LossGrad: a step size that grows where the loss falls as its tangent says, and else shrinks."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, linalg, transforms, trees
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import loss_based

FACTORS = (1e-30, 1e30)  # from 0 and from infinity there is no way back


class LossGradState(NamedTuple):
    """The step size, and what the last step is judged by at the next call in that mode.

    The factor is that of the next step; in ``"next_value"`` mode still that of the last one.
    """

    count: chex.Array  # number of steps taken, int32, shape ()
    skipped: chex.Array  # number of steps skipped, int32, shape ()
    rejected: chex.Array  # number of steps rejected, int32, shape ()
    factor: chex.Array  # h relative to the initial step size, > 0, shape ()
    step_size: chex.Array  # h of the last step, shape ()
    value: chex.Array  # f before the last step, shape ()
    squared_norm: chex.Array  # ‖g‖² before the last step, shape ()
    gradient: optax.Updates | None  # before the last step; None unless it may be rejected later

    def diagnostics(self) -> dict[str, chex.Array]:
        """The last step size, and the numbers of rejected and of skipped steps; scalars."""
        return {
            "step_size": self.step_size,
            "rejected_steps": self.rejected,
            "skipped_steps": self.skipped,
        }


def lossgrad(
    initial_step_size: float | optax.Schedule = 1e-3,
    *,
    c: float | optax.Schedule = 1.05,
    evaluation: str = "value_fn",
    reject: bool = False,
    max_step_size: float | optax.Schedule | None = None,
    epsilon: float | optax.Schedule = 1e-25,
) -> optax.GradientTransformationExtraArgs:
    r"""LossGrad: the step size follows the ratio of what the loss fell by to what it should have.

    .. math::
      \theta^+ = \theta - h\,g, \quad
      r = \frac{f(\theta^+) - f(\theta) + h\lVert g\rVert^2}{h\lVert g\rVert^2 + \epsilon}, \quad
      h \leftarrow \begin{cases} c\,h & r < \tfrac12 \\ h/c & \text{else}\end{cases}

    r is the error of the tangent relative to its promise, both on one batch. At r = ½ the parabola
    through the two losses and the slope has its minimum at :math:`\theta^+`, so that h moves
    towards the minimum along the line.

    It shines on full-batch convex problems, whatever h is at first: least squares of condition 100
    comes within 10⁻¹² of its minimum in 2000 steps, gradient descent at 0.1 within 10⁻⁴. It fails
    on curved valleys, where h cannot shrink as fast as the curvature grows: by 5 % per step, after
    a step that is always taken. On Rosenbrock's function it diverges for every initial step size
    from 10⁻⁵ to 10⁻³ with c from 1.01 to 1.2; with ``reject`` it is below 10⁻¹⁶ after 20,000 steps,
    from any initial step size between 10⁻⁵ and 1. Under noise h grows to what suits one batch: on
    least squares with label noise (start 1.03 above the minimum) it ends 0.2 above it with batches
    of 1 and 0.05 with 20, where SGD at 0.1 ends at 0.04 and 0.0015. Once :math:`h\lVert g\rVert^2`
    is less than the rounding of the loss, early in float32, h is led by that: it wanders, and with
    ``reject`` it collapses.

    Args:
      initial_step_size: h > 0 at the first step; a schedule or an injected value multiplies what
        has been learnt since.
      c: c > 1, by which h changes.
      evaluation: ``"value_fn"`` evaluates :math:`f(\theta^+)` on the same batch, one more forward
        pass; ``"next_value"`` takes the next call's ``value`` for it and evaluates nothing, right
        if the loss is deterministic and updates are applied as they are.
      reject: whether a step to a larger loss is taken back, and h halved; for deterministic losses.
        In ``"next_value"`` mode it is taken back at the next call, together with the next try,
        which takes no gradient of its own.
      max_step_size: cap of h, above 0; None is no cap.
      epsilon: ϵ ≥ 0. It makes h grow where :math:`h\lVert g\rVert^2` is below it.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds scalars only; with ``reject`` and
      ``"next_value"`` also one vector of parameter size. Its ``update`` needs ``value``, and in
      ``"value_fn"`` mode the parameters and ``value_fn``, a function of the parameters. Where the
      loss or :math:`\lVert g\rVert^2` is not finite the step is skipped.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given what it needs.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: jnp.sum(x**2)
      >>> optimizer = optgrad.lossgrad(0.1)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(200):
      ...     value, gradient = jax.value_and_grad(loss)(params)
      ...     updates, state = optimizer.update(
      ...         gradient, state, params, value=value, value_fn=loss)
      ...     params = params + updates
      ...     if state.count == 1:
      ...         print(f"{state.factor:.2f}", [f"{u:.2f}" for u in updates])
      1.05 ['-0.20', '-0.40']
      >>> print(loss(params) < 1e-9)
      True

    References:
      B. Wójcik, Ł. Maziarka, J. Tabor, "LOSSGRAD: automatic learning rate in gradient descent",
      2019; in H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022, Section
      2.3.

    Deviations from the paper: NaN shrinks h (the authors' code compares r > ½ and lets it grow),
    and a step to a loss that is not finite is never taken where ``value_fn`` can tell; it counts as
    rejected and halves h. A gradient of 0 leaves h as it is, instead of letting it grow without
    bound. ``reject``, ``"next_value"`` and the cap are ours.
    """
    rule = _Rule(initial_step_size, c, reject, max_step_size, epsilon)
    checks.check_one_of("evaluation", evaluation, tuple(_STEPS))
    step = _STEPS[evaluation]
    keeps_gradient = reject and step is _judged_later

    def init(params: optax.Params) -> LossGradState:
        return LossGradState(
            count=loss_based.zero_count(),
            skipped=loss_based.zero_count(),
            rejected=loss_based.zero_count(),
            factor=jnp.ones((), averages.scalar_dtype()),
            step_size=loss_based.zero_scalar(),
            value=loss_based.zero_scalar(),
            squared_norm=loss_based.zero_scalar(),
            gradient=averages.zeros_like_average(params) if keeps_gradient else None,
        )

    def update(
        updates: optax.Updates,
        state: LossGradState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, LossGradState]:
        del extra
        losses = _Losses(transforms.require_value(value), value_fn)
        return step(rule, updates, state, params, losses)

    return transforms.transformation(init, update)


class _Losses(NamedTuple):
    value: chex.Array  # f, shape ()
    value_fn: Any  # what was given for it


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The arguments, checked, and what they say about a step."""

    initial_step_size: float | optax.Schedule
    c: float | optax.Schedule
    reject: bool
    max_step_size: float | optax.Schedule | None
    epsilon: float | optax.Schedule

    def __post_init__(self) -> None:
        checks.check_in_range(
            "initial_step_size", self.initial_step_size, 0.0, low_open=True, high_open=True
        )
        checks.check_in_range("c", self.c, 1.0, low_open=True, high_open=True)
        checks.check_in_range("epsilon", self.epsilon, 0.0, high_open=True)
        if self.max_step_size is not None:
            checks.check_in_range("max_step_size", self.max_step_size, 0.0, low_open=True)

    def limited(self, factor: chex.Array, count: chex.Array) -> tuple[chex.Array, chex.Array]:
        """The factor within the cap, and h."""
        initial = transforms.hyperparameter_at(self.initial_step_size, count)
        if self.max_step_size is not None:
            cap = transforms.hyperparameter_at(self.max_step_size, count)
            initial = jnp.asarray(initial, factor.dtype)
            ratio = cap / jnp.where(initial > 0, initial, 1.0)
            factor = jnp.where(initial > 0, jnp.minimum(factor, ratio), factor)
        return factor, jnp.minimum(initial * factor, loss_based.LARGEST)

    def judge(
        self, change: chex.Array, h: chex.Array, size: chex.Array, state: LossGradState
    ) -> tuple[chex.Array, chex.Array]:
        """Whether a step is accepted, and the factor after it.

        Args:
          change: by what the loss changed.
          h: the step size.
          size: ‖g‖².
          state: whose factor gave h.
        """
        ratio = transforms.hyperparameter_at(self.c, state.count)
        epsilon = transforms.hyperparameter_at(self.epsilon, state.count)
        # r < ½ without its quotient, which under- and overflows; false where the change is NaN.
        grows = change < 0.5 * (epsilon - h * size)
        factor = jnp.where(grows, state.factor * ratio, state.factor / ratio)
        factor = jnp.where(size > 0, factor, state.factor)
        accepted = change <= 0 if self.reject else jnp.isfinite(change)
        factor = jnp.where(accepted, factor, state.factor / 2)
        return accepted, jnp.clip(factor, *FACTORS)


def _judged_now(
    rule: _Rule,
    updates: optax.Updates,
    state: LossGradState,
    params: optax.Params | None,
    losses: _Losses,
) -> tuple[optax.Updates, LossGradState]:
    """A step whose end is evaluated at once."""
    value, value_fn = losses
    params = transforms.require_params(params)
    if not callable(value_fn):
        raise ValueError(
            f"value_fn = {value_fn!r}; accepted: a function of the parameters, the loss of the "
            'same batch (with evaluation="next_value" it is not needed)'
        )
    size = linalg.dot(updates, updates)
    is_finite = jnp.isfinite(value) & jnp.isfinite(size)
    factor, h = rule.limited(state.factor, state.count)
    moved = loss_based.descend(updates, h, is_finite, params)
    after = transforms.require_value(value_fn(optax.apply_updates(params, moved)))
    after = leafwise.computed_once(after)  # and not with every leaf
    accepted, factor = rule.judge(after - value, h, size, state._replace(factor=factor))
    new = state._replace(
        count=optax.safe_increment(state.count),
        rejected=_counted(state.rejected, ~accepted),
        factor=factor,
        step_size=h,
        value=value,
        squared_norm=size,
    )
    moved = leafwise.tree_map(lambda u: jnp.where(accepted, u, 0), moved)
    return moved, loss_based.kept_unless(is_finite, new, state)


def _judged_later(
    rule: _Rule,
    updates: optax.Updates,
    state: LossGradState,
    params: optax.Params | None,
    losses: _Losses,
) -> tuple[optax.Updates, LossGradState]:
    """A step whose end is where the next call is made."""
    value = losses.value
    size = linalg.dot(updates, updates)
    is_finite = jnp.isfinite(value) & jnp.isfinite(size)
    is_first = state.count == 0
    change = jnp.where(is_finite, value - state.value, jnp.nan)
    accepted, factor = rule.judge(change, state.step_size, state.squared_norm, state)
    accepted = is_first | accepted
    factor, h = rule.limited(jnp.where(is_first, state.factor, factor), state.count)
    new = LossGradState(
        count=optax.safe_increment(state.count),
        skipped=state.skipped,
        rejected=_counted(state.rejected, ~accepted),
        factor=factor,
        step_size=h,
        value=jnp.where(accepted, value, state.value),
        squared_norm=jnp.where(accepted, size, state.squared_norm),
        gradient=state.gradient,
    )
    like = updates if params is None else params
    if not rule.reject:
        moved = loss_based.descend(updates, h, is_finite, like)
        return moved, loss_based.kept_unless(is_finite, new, state)
    # Back by the rejected step, and forth by the next one, both along the old gradient.
    taken = is_finite | ~is_first
    wide = leafwise.tree_map(trees.wide, updates)
    gradient = linalg.where(accepted & taken, wide, state.gradient)
    length = jnp.where(accepted, h, h - state.step_size)
    moved = loss_based.descend(gradient, length, taken, like)
    new, old = new._replace(gradient=gradient), state._replace(gradient=gradient)
    return moved, loss_based.kept_unless(taken, new, old)


def _counted(number: chex.Array, is_one_more: chex.Array) -> chex.Array:
    return jnp.where(is_one_more, optax.safe_increment(number), number)


_STEPS = {"value_fn": _judged_now, "next_value": _judged_later}


register(
    Method(
        name="lossgrad",
        factory=lossgrad,
        scale_by=None,
        family="step_size",
        title="LossGrad",
        reference=loss_based.LOSSGRAD,
        equation="θ ← θ − h·g; h ← c·h if f(θ − h·g) − f < −h‖g‖²/2, else h/c",
        needs=frozenset({"params", "value", "value_fn"}),
        static_args=("evaluation", "reject"),
        tunes=Tunable("initial_step_size", 1e-5, 1e1),
        test_hyperparams={"initial_step_size": 0.1},
        state_size=0,
        cost=4 / 3,  # one more forward pass
    )
)

"""The step size of L4: the linearised loss falls by a fraction of its distance from a target."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, linalg, transforms, trees
from optgrad.step_size import loss_based


class L4State(NamedTuple):
    """The lowest loss so far, the mean gradient, and what the direction remembers."""

    count: chex.Array  # number of steps taken, int32, shape ()
    skipped: chex.Array  # number of steps skipped, int32, shape ()
    min_loss: chex.Array  # L_min ≥ 0, lowest loss above f_min, relaxed, shape ()
    step_size: chex.Array  # η of the last step, shape ()
    mean_gradient: optax.Updates  # bias-corrected, like the parameters
    direction: optax.OptState  # of the direction

    def diagnostics(self) -> dict[str, chex.Array]:
        """The last step size, the relaxed lowest loss above ``f_min``, skipped steps; scalars."""
        return {
            "step_size": self.step_size,
            "min_loss": self.min_loss,
            "skipped_steps": self.skipped,
        }


@dataclasses.dataclass(frozen=True)
class StepRule:
    """The arguments that `l4`, `l4_momentum` and `l4_adam` have in common, checked."""

    fraction: float | optax.Schedule
    beta: float | optax.Schedule
    f_min: float | optax.Schedule
    min_loss_factor: float | optax.Schedule
    initial_factor: float | optax.Schedule
    forget_time: float | optax.Schedule
    epsilon: float | optax.Schedule
    max_learning_rate: float | optax.Schedule | None
    state_dtype: Any | None

    def __post_init__(self) -> None:
        checks.check_in_range("fraction", self.fraction, 0.0, high_open=True)
        checks.check_in_range("beta", self.beta, 0.0, 1.0, high_open=True)
        checks.check_in_range("f_min", self.f_min, -math.inf, high_open=True)
        checks.check_in_range("min_loss_factor", self.min_loss_factor, 0.0, 1.0)
        checks.check_in_range("initial_factor", self.initial_factor, 0.0, 1.0)
        checks.check_in_range("forget_time", self.forget_time, 0.0, low_open=True, or_infinite=True)
        checks.check_in_range("epsilon", self.epsilon, 0.0, high_open=True)
        if self.max_learning_rate is not None:
            checks.check_in_range("max_learning_rate", self.max_learning_rate, 0.0, low_open=True)
        checks.check_float_dtype("state_dtype", self.state_dtype)

    def step_size(
        self, value: chex.Array, slope: chex.Array, state: L4State
    ) -> tuple[chex.Array, chex.Array]:
        """η, and the lowest loss, relaxed for the next step.

        Args:
          value: f, the loss.
          slope: ⟨mean gradient, direction⟩.
          state: before this step.
        """

        def at(x: Any) -> Any:
            return transforms.hyperparameter_at(x, state.count)

        loss = jnp.maximum(value - at(self.f_min), 0.0)
        first = at(self.initial_factor) * loss
        lowest = jnp.where(state.count == 0, first, jnp.minimum(state.min_loss, loss))
        gap = loss - at(self.min_loss_factor) * lowest
        # Along a direction that is not one of descent there is no way down to the target.
        reach = loss_based.quotient(gap, jnp.where(slope > 0, slope + at(self.epsilon), 0.0))
        step = jnp.minimum(at(self.fraction) * reach, loss_based.LARGEST)
        if self.max_learning_rate is not None:
            step = jnp.minimum(step, at(self.max_learning_rate))
        relaxed = lowest * (1 + 1 / at(self.forget_time))
        return step, jnp.where(lowest > 0, relaxed, 0.0)


class Sample(NamedTuple):
    """What a direction is computed from."""

    gradient: optax.Updates
    params: optax.Params | None
    extra: dict[str, Any]  # the extra arguments of this call


class Direction(NamedTuple):
    """A direction after one more gradient.

    Both functions are called twice, for the inner product and for the step, and what is cheap to
    compute need not be stored in between: the second time with the gradient times a factor of 1,
    of which XLA does not know that it is one.
    """

    # gradient -> the direction's own new state
    state: Callable[[optax.Updates], optax.OptState]
    # mean gradient, own state -> the vector
    vector: Callable[[optax.Updates, optax.OptState], optax.Updates]


def along(
    direction: Callable[[Sample, L4State], Direction],
    init_direction: Callable[[optax.Params], optax.OptState],
    rule: StepRule,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer θ ← θ − η·direction with L4's η."""

    def init(params: optax.Params) -> L4State:
        return L4State(
            count=loss_based.zero_count(),
            skipped=loss_based.zero_count(),
            min_loss=loss_based.zero_scalar(),
            step_size=loss_based.zero_scalar(),
            mean_gradient=averages.zeros_like_average(params, rule.state_dtype),
            direction=init_direction(params),
        )

    def update(
        updates: optax.Updates,
        state: L4State,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, L4State]:
        value = transforms.require_value(value)
        count = optax.safe_increment(state.count)
        weights = averages.sample_weights(
            count, transforms.hyperparameter_at(rule.beta, state.count)
        )
        towards = direction(Sample(updates, params, {**extra, "value": value}), state)

        def after(gradient: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            mean = averages.update_mean(state.mean_gradient, gradient, weights)
            return mean, towards.state(gradient)

        mean, inner = after(updates)
        # Both inner products in one pass, as if the step were taken: else the second is of no use.
        square, slope = trees.dots((updates, updates), (mean, towards.vector(mean, inner)))
        taken = jnp.isfinite(value) & jnp.isfinite(square)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        one = trees.ordered_after(jnp.ones_like(value), slope)
        again = leafwise.tree_map(lambda g: one.astype(g.dtype) * g, updates)
        mean, inner = linalg.where(taken, after(again), (state.mean_gradient, state.direction))
        step, min_loss = rule.step_size(value, slope, state)
        like = updates if params is None else params
        moved = loss_based.descend(towards.vector(mean, inner), step, taken, like)
        # The vectors have been chosen above, before anything was made of them.
        old = state._replace(mean_gradient=mean, direction=inner)
        new = L4State(count, state.skipped, min_loss, step, mean, inner)
        return moved, loss_based.kept_unless(taken, new, old)

    return transforms.transformation(init, update)

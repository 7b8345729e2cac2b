"""What the rules that read the loss share: its check at the door, and steps that are never NaN.

A step is taken where the loss and the size of the gradient are finite numbers, else it is skipped:
the update is 0 and of the state only a counter changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, leafwise, linalg, transforms, trees

POLYAK = 'B. T. Polyak, "Introduction to Optimization", 1987'
SPS = (
    "N. Loizou, S. Vaswani, I. Laradji, S. Lacoste-Julien, "
    '"Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast Convergence", 2021'
)
L4 = (
    'M. Rolinek, G. Martius, "L4: Practical loss-based stepsize adaptation for deep learning", 2018'
)
LOSSGRAD = (
    "B. Wójcik, Ł. Maziarka, J. Tabor, "
    '"LOSSGRAD: automatic learning rate in gradient descent", 2019'
)

# No step size is larger: times a gradient whose square has not underflowed it stays a number.
LARGEST = float(np.finfo(np.float32).max)


class GradientStepState(NamedTuple):
    """How far the last step went."""

    count: chex.Array  # number of steps taken, int32, shape ()
    skipped: chex.Array  # number of steps skipped, int32, shape ()
    step_size: chex.Array  # the last one that was not 0, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """The last step size that was not 0, and the number of skipped steps; scalars."""
        return {"step_size": self.step_size, "skipped_steps": self.skipped}


# (loss, ‖g‖², state) → step size, at least 0 and finite for a finite loss and ‖g‖²
Rule = Callable[[chex.Array, chex.Array, GradientStepState], chex.Array]


def along_gradient(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The optimizer θ ← θ − rule(f, ‖g‖²)·g."""

    def init(params: optax.Params) -> GradientStepState:
        del params
        return GradientStepState(zero_count(), zero_count(), zero_scalar())

    def update(
        updates: optax.Updates,
        state: GradientStepState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GradientStepState]:
        del extra
        value, size = transforms.require_value(value), linalg.dot(updates, updates)
        step = rule(value, size, state)
        taken = jnp.isfinite(value) & jnp.isfinite(size)
        remembered = jnp.where(step > 0, step, state.step_size)
        new = GradientStepState(optax.safe_increment(state.count), state.skipped, remembered)
        like = updates if params is None else params
        return descend(updates, step, taken, like), kept_unless(taken, new, state)

    return transforms.transformation(init, update)


def quotient(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
    """Their quotient, at most `LARGEST`; 0 where the denominator is not positive."""
    positive = denominator > 0
    ratio = numerator / jnp.where(positive, denominator, 1.0)
    return jnp.where(positive, jnp.minimum(ratio, LARGEST), 0.0)


def descend(
    direction: chex.ArrayTree, step: chex.Array, taken: chex.Array, like: chex.ArrayTree
) -> chex.ArrayTree:
    """−step·direction where the step is taken, else 0, in the types of ``like``."""
    # 0 times what has overflowed is no number: where nothing moves the factor is not used.
    factor = leafwise.computed_once(jnp.where(taken, -step, 0.0))

    def move(x: chex.Array) -> chex.Array:
        x = trees.wide(x)
        return jnp.where(factor != 0, factor.astype(x.dtype) * x, 0.0)

    return transforms.cast_like(leafwise.tree_map(move, direction), like)


def kept_unless(taken: chex.Array, new: Any, old: Any) -> Any:
    """The new state where the step is taken, else the old one with one more skipped step."""
    skipped = jnp.where(taken, old.skipped, optax.safe_increment(old.skipped))
    return linalg.where(taken, new, old)._replace(skipped=skipped)


def zero_count() -> chex.Array:
    """A counter before the first step."""
    return jnp.zeros((), jnp.int32)


def zero_scalar() -> chex.Array:
    """A number of the type that drives a step."""
    return jnp.zeros((), averages.scalar_dtype())

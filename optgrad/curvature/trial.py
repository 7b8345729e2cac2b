"""Steps that are tried before they are taken, and dampings that follow the gain ratio.

A method that adapts itself evaluates the loss of the same batch at the point where its update
leads. It is correct only if that update is what is really added to the parameters: as the last
element of a chain, with nothing after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, transforms

SLIDES = 'J. Duda, "Improving convergence of stochastic gradient descent" (slides)'
LEAST_DAMPING, MOST_DAMPING = 1e-12, 1e12


class Trial(NamedTuple):
    """A step that was looked at."""

    updates: optax.Updates  # as it is to be added, in the parameters' types; zero if not accepted
    value: chex.Array  # the loss where it leads, shape ()
    ratio: chex.Array  # actual by predicted decrease, −1 if the model is of no use, shape ()
    accepted: chex.Array  # finite, and the loss does not increase, bool, shape ()


def attempt(
    value_fn: Callable[[Any], chex.Array],
    params: optax.Params,
    step: chex.ArrayTree,
    value: chex.Array,
    predicted: chex.Array,
    *,
    least_ratio: float | None = None,
) -> Trial:
    """Tries ``params + step``.

    Args:
      value_fn: the loss.
      params: θ.
      step: what would be added to them.
      value: the loss at θ.
      predicted: decrease of the loss by the model of it.
      least_ratio: a step of smaller gain ratio is not accepted either; None accepts every step
        that does not increase the loss.
    """
    updates = transforms.cast_like(step, params)
    raw = jnp.asarray(value_fn(optax.apply_updates(params, updates)))
    reached = raw.astype(value.dtype)
    ratio = linalg.gain_ratio(value, reached, predicted, rounding(raw, params))
    decreased = (reached <= value) & jnp.isfinite(reached) & jnp.isfinite(value)
    accepted = decreased & linalg.all_finite(updates)
    if least_ratio is not None:
        accepted &= ratio > least_ratio
    return Trial(taken(accepted, updates), reached, ratio, accepted)


def rounding(value: chex.Array, params: optax.Params) -> float:
    """Of a loss, by its type and by the parameters': float32 ones in 64-bit mode too."""
    widest = averages.widest_dtype(*jax.tree.leaves(params))
    infos: list[Any] = [jnp.finfo(d) for d in (value.dtype, widest)]  # type: ignore[no-untyped-call]
    return max(float(info.eps) for info in infos)


def taken(accepted: chex.Array, updates: optax.Updates) -> optax.Updates:
    """The updates if they are accepted, else zeros."""
    return linalg.where(accepted, updates, jax.tree.map(jnp.zeros_like, updates))


def finite_only(updates: optax.Updates, like: chex.ArrayTree) -> tuple[optax.Updates, chex.Array]:
    """The updates in the types of ``like``, zeros if any entry is not finite; and whether all are.

    For directions that are not tried: one bad number in a dense system spoils every entry.
    """
    updates = transforms.cast_like(updates, like)
    finite = linalg.all_finite(updates)
    return taken(finite, updates), finite


def counted_unless(accepted: chex.Array, rejected: chex.Array) -> chex.Array:
    """The counter of rejected steps, one more unless this step is accepted."""
    return jnp.where(accepted, rejected, optax.safe_increment(rejected))


def rescaled_damping(
    damping: chex.Array, ratio: chex.Array, *, up: float, down: float
) -> chex.Array:
    """λ·up where the gain ratio is below ¼, λ/down where it is above ¾, within its range."""
    factor = jnp.where(ratio < 0.25, up, jnp.where(ratio > 0.75, 1.0 / down, 1.0))
    return jnp.clip(damping * factor.astype(damping.dtype), LEAST_DAMPING, MOST_DAMPING)


def zero_count() -> chex.Array:
    """A counter before the first step."""
    return jnp.zeros((), jnp.int32)


def scalar(value: chex.Numeric) -> chex.Array:
    """A number of the state, in the type that drives a step."""
    return jnp.asarray(value, averages.scalar_dtype())

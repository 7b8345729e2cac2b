"""The minimum of a function of a few coordinates, such as a loss on a small subspace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import linalg
from optgrad.curvature import trial

_EVALUATIONS = 8  # of one line search, at most


class _Inner(NamedTuple):
    alpha: chex.Array  # where L-BFGS is
    value: chex.Array
    grad: chex.Array
    state: Any  # of L-BFGS and its line search
    best: chex.Array  # the best α so far
    least: chex.Array  # the loss there
    goes_on: chex.Array  # whether the last step changed the loss by more than its rounding
    step: chex.Array
    evaluations: chex.Array


def minimum(
    fn: Callable[[chex.Array], chex.Array], size: int, max_steps: int, *, is_scaled: bool = False
) -> tuple[chex.Array, chex.Array]:
    """The best point that L-BFGS finds from 0, and the number of gradients it took.

    Args:
      fn: α -> the loss, in the type of the scalars that drive a step.
      size: number of coordinates.
      max_steps: of L-BFGS, which remembers all of them; it ends where one changes nothing.
      is_scaled: whether all curvatures are of size 1, and L-BFGS need not guess a scale.
    """
    search = optax.scale_by_zoom_linesearch(_EVALUATIONS, initial_guess_strategy="one")
    optimizer = optax.chain(
        optax.scale_by_lbfgs(memory_size=max_steps, scale_init_precond=not is_scaled),
        optax.scale(-1.0),
        search,
    )
    start = jnp.zeros(size, trial.scalar(0.0).dtype)
    value, grad = jax.value_and_grad(fn)(start)

    def running(carry: _Inner) -> chex.Array:
        # By a model of curvature 1; what cannot be seen would cost a whole line search.
        visible = 0.5 * jnp.sum(carry.grad**2) > 10.0 * linalg.epsilon() * jnp.abs(carry.value)
        # The first step is always tried: where the curvature is not positive, much may come of it.
        is_worth = visible | (carry.step == 0) if is_scaled else True
        left = is_worth & jnp.any(carry.grad != 0)
        return carry.goes_on & (carry.step < max_steps) & left

    def body(carry: _Inner) -> _Inner:
        updates, state = optimizer.update(
            carry.grad, carry.state, carry.alpha, value=carry.value, grad=carry.grad, value_fn=fn
        )
        found = state[-1]
        alpha = carry.alpha + updates
        # A step may lead uphill and the next one far down; a line search may end anywhere.
        changes = jnp.abs(found.value - carry.value) > linalg.epsilon() * jnp.abs(carry.value)
        improves = (found.value < carry.least) & jnp.isfinite(found.value)
        improves &= jnp.all(jnp.isfinite(alpha))
        return _Inner(
            alpha,
            found.value,
            found.grad,
            _typed_like(state, carry.state),
            jnp.where(improves, alpha, carry.best),
            jnp.where(improves, found.value, carry.least),
            changes,
            carry.step + 1,
            carry.evaluations + found.info.num_linesearch_steps.astype(jnp.int32),
        )

    true, one, zero = jnp.asarray(True), jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
    state = optimizer.init(start)
    state = _typed_like(state, state)
    last = jax.lax.while_loop(
        running, body, _Inner(start, value, grad, state, start, value, true, zero, one)
    )
    return last.best, last.evaluations


def _typed_like(tree: Any, like: Any) -> Any:
    """In the types of another tree, none of them weak."""
    return jax.tree.map(
        lambda x, y: jax.lax.convert_element_type(x, jnp.result_type(y)), tree, like
    )

"""Line searches that never return a worse point, for directions that need one."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, oracles, transforms


class SafeLineSearchState(NamedTuple):
    """The states of a direction and of its line search."""

    direction: Any  # the direction's own state
    search: Any  # the line search's own state
    rejected: chex.Array  # number of steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """The last step size, the number of steps not taken, gradient equivalents; scalars."""
        found = {"rejected_steps": self.rejected, "gradient_equivalents": self.cost}
        step_size = getattr(self.search, "learning_rate", None)
        return found if step_size is None else {"step_size": step_size, **found}


def with_safe_linesearch(
    direction: optax.GradientTransformation,
    linesearch: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    r"""A direction d and a line search along −d, which is taken only if the loss does not increase.

    .. math::
      \theta \leftarrow \theta - \alpha d \quad\text{if}\quad f(\theta - \alpha d) \le f(\theta),
      \qquad\text{else}\quad \theta \leftarrow \theta,
      \ \text{both states as at the first step}

    optax's zoom search returns its last trial where its budget of evaluations ends, which may be
    far uphill; and it refuses extra arguments that are meant for others. Here it sees ``value``,
    ``grad`` and ``value_fn`` alone, its result is checked, and a failure begins anew: the direction
    forgets its history, which for conjugate gradients and quasi-Newton methods is a restart from
    steepest descent.

    Args:
      direction: gives the positive direction d, ``scale_by_*``; it sees all extra arguments.
      linesearch: `optax.scale_by_zoom_linesearch` or `optax.scale_by_backtracking_linesearch`, or
        any transformation whose state has the loss at the new point in its field ``value``.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters, ``value``, ``grad``
      and ``value_fn``, all of the same batch. It gives the final signed update: nothing may come
      after it. Non-finite losses, gradients and directions are steps not taken, counted in the
      state's field ``rejected``.

    Raises:
      ValueError: by ``update``, if the parameters or an extra argument are missing.

    Examples:
      >>> search = optax.scale_by_backtracking_linesearch(20)
      >>> optimizer = with_safe_linesearch(optax.identity(), search)
      >>> loss = lambda x: jnp.sum(x**4)
      >>> params = jnp.array([2.0])
      >>> state = optimizer.init(params)
      >>> value, grad = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(
      ...     grad, state, params, value=value, grad=grad, value_fn=loss)
      >>> bool(loss(params + updates) < value), int(state.rejected)
      (True, 0)
    """
    direction = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> SafeLineSearchState:
        searching = linesearch.init(params) if jax.tree.leaves(params) else ()
        return SafeLineSearchState(
            direction.init(params),
            _strongly_typed(searching),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), averages.scalar_dtype()),
        )

    def update(
        updates: optax.Updates,
        state: SafeLineSearchState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        grad: optax.Updates | None = None,
        value_fn: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SafeLineSearchState]:
        params = transforms.require_params(params)
        value = transforms.require_value(value)
        value_fn = oracles.require_function("value_fn", value_fn)
        if grad is None:
            raise ValueError(
                "grad = None; accepted: the gradient at params, a tree like them, as "
                "optgrad.curvature_args(loss_fn) builds it"
            )
        if not jax.tree.leaves(params):
            return updates, state
        oriented, directed = direction.update(
            updates, state.direction, params, value=value, grad=grad, value_fn=value_fn, **extra
        )
        descent = transforms.cast_like(linalg.scale(-1.0, oriented), params)
        found, searched = linesearch.update(
            descent, state.search, params, value=value, grad=grad, value_fn=value_fn
        )
        found = transforms.cast_like(found, params)
        reached = value_fn(optax.apply_updates(params, found)).astype(value.dtype)
        taken = linalg.all_finite(found) & jnp.isfinite(value) & (reached <= value)
        fresh = init(params)
        evaluations = getattr(getattr(searched, "info", None), "num_linesearch_steps", 0)
        # One evaluation of the zoom search is a gradient; what the direction costs is its own.
        cost = state.cost + 1.0 + evaluations + oracles.VALUE_COST
        new = SafeLineSearchState(directed, _strongly_typed(searched), state.rejected, cost)
        old = fresh._replace(rejected=optax.safe_increment(state.rejected), cost=cost)
        chosen = linalg.where(taken, new, _types_of(new, old))
        return linalg.where(taken, found, jax.tree.map(jnp.zeros_like, found)), chosen

    return optax.GradientTransformationExtraArgs(init, update)


def _strongly_typed(tree: Any) -> Any:
    """Without weak types, which would compile the second step again; scalars at least float32."""

    def strong(x: Any) -> chex.Array:
        x = jnp.asarray(x)
        dtype = x.dtype
        if not x.shape and jnp.issubdtype(dtype, jnp.floating):
            dtype = averages.scalar_dtype()
        return jax.lax.convert_element_type(x, dtype)

    return jax.tree.map(strong, tree)


def _types_of(like: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x, y: y.astype(x.dtype), like, tree)

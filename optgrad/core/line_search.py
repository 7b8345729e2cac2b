"""Line searches that never return a worse point, for directions that need one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, diagnostics, linalg, oracles, shards, transforms

LineSearch: TypeAlias = optax.GradientTransformationExtraArgs
_MOST_FAILURES = 5  # steps are shortened to 10⁻¹² at the most


class SafeLineSearchState(NamedTuple):
    """The states of a direction and of its line search."""

    count: chex.Array  # number of steps, taken or not, int32, shape ()
    direction: Any  # the direction's own state
    search: Any  # the line search's own state
    rejected: chex.Array  # number of steps that were not taken, int32, shape ()
    failures: chex.Array  # searches in a row that found no better point, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """The last step size, steps not taken, gradient equivalents, and what the direction has.

        What the direction itself counts is since the last step that was not taken.
        """
        found = {"rejected_steps": self.rejected, "gradient_equivalents": self.cost}
        step_size = getattr(self.search, "learning_rate", None)
        if step_size is not None:
            found["step_size"] = step_size
        return {**diagnostics.diagnostics(self.direction), **found}


def with_safe_linesearch(
    direction: optax.GradientTransformation,
    linesearch: LineSearch | Callable[[chex.Array], LineSearch],
) -> optax.GradientTransformationExtraArgs:
    r"""A direction d and a line search along −d, which is taken only if the loss does not increase.

    .. math::
      \theta \leftarrow \theta - \alpha d \quad\text{if}\quad f(\theta - \alpha d) \le f(\theta),
      \qquad\text{else}\quad \theta \leftarrow \theta,
      \ \text{both states as at the first step}

    optax's zoom search returns its last trial where its budget of evaluations ends, which may be
    far uphill; it keeps a step size of 0, once it has seen no finite loss, for ever; and it refuses
    extra arguments that are meant for others. Here it sees ``value``, ``grad`` and ``value_fn``
    alone, its result is checked, and a failure begins anew: the direction forgets its history
    (and its own count of steps: schedules inside of it start again),
    which for conjugate gradients and quasi-Newton methods is a restart from steepest descent. The
    next search tries shorter steps, since one from a step size of 1 may end before it is among
    those that descend, and would so each time: after n failures in a row it is along
    :math:`10^{3(1-n)} d / \max(1, |d|_\infty)`.

    The search runs in the widest type of the parameters' leaves, float32 at least, on the loss at
    parameters in their own types: those of 16 bits are compared where they will be.

    Args:
      direction: gives the positive direction d, ``scale_by_*``; it sees all extra arguments. What
        it costs beyond the gradient is counted if its state has a field ``cost``.
      linesearch: `optax.scale_by_zoom_linesearch` or `optax.scale_by_backtracking_linesearch`, or
        any transformation with their arguments; or a function of the number of steps so far that
        gives one, where its tolerances are schedules.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters, ``value``, ``grad``
      and ``value_fn``, all of the same batch. It gives the final signed update: nothing may come
      after it. Non-finite losses, gradients and directions, and step sizes of 0, are steps not
      taken, counted in the state's field ``rejected``. A deterministic loss needs no gradient
      beside those of the search: `optax.value_and_grad_from_state` finds them in the state.

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

    def search_at(count: chex.Array) -> LineSearch:
        return linesearch(count) if callable(linesearch) else linesearch

    def init(params: optax.Params) -> SafeLineSearchState:
        count = jnp.zeros((), jnp.int32)
        searching = _init_search(search_at(count), params)
        return SafeLineSearchState(
            count,
            direction.init(params),
            _strongly_typed(searching),
            jnp.zeros((), jnp.int32),
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
        shards.require_whole(params, "a line search of optax")
        oriented, directed = direction.update(
            updates, state.direction, params, value=value, grad=grad, value_fn=value_fn, **extra
        )
        shorter = _shortening(oriented, state.failures)
        found, searched = _search(
            search_at(state.count),
            state.search,
            params,
            linalg.scale(shorter, oriented),
            value,
            grad,
            value_fn,
        )
        searched = _of_whole_direction(searched, shorter)
        reached = jnp.asarray(value_fn(optax.apply_updates(params, found)), value.dtype)
        moves = jnp.asarray(getattr(searched, "learning_rate", 1.0)) > 0
        finite = linalg.all_finite((updates, found)) & jnp.isfinite(value)
        taken = moves & finite & jnp.isfinite(reached) & (reached <= value)

        count = optax.safe_increment(state.count)
        cost = state.cost + _direction_cost(state.direction, directed) + _search_cost(searched)
        none = jnp.zeros_like(state.failures)
        new = SafeLineSearchState(count, directed, searched, state.rejected, none, cost)
        rejected = optax.safe_increment(state.rejected)
        could = linalg.all_finite(updates) & jnp.isfinite(value)
        failures = jnp.minimum(state.failures + could, _MOST_FAILURES)
        anew = init(params)._replace(count=count, rejected=rejected, failures=failures, cost=cost)
        chosen = linalg.where(taken, new, transforms.cast_like(anew, new))
        return linalg.where(taken, found, jax.tree.map(jnp.zeros_like, found)), chosen

    return optax.GradientTransformationExtraArgs(init, update)


def with_zoom_linesearch(
    direction: optax.GradientTransformation,
    *,
    max_steps: int,
    curv_rtol: float | optax.Schedule,
    initial_guess: str,
) -> optax.GradientTransformationExtraArgs:
    """`with_safe_linesearch` and the zoom search, whose curvature tolerance may be a schedule.

    Args:
      direction: gives the positive direction.
      max_steps: evaluations of loss and gradient in one search, at most.
      curv_rtol: the slope at the point found, relative to the slope at the start, at most.
      initial_guess: ``"one"``, or ``"keep"`` for the last step size.
    """

    def zoom(count: chex.Array) -> LineSearch:
        return optax.scale_by_zoom_linesearch(
            max_steps,
            curv_rtol=transforms.hyperparameter_at(curv_rtol, count),
            initial_guess_strategy=initial_guess,
        )

    return with_safe_linesearch(direction, zoom)


def _shortening(direction: optax.Updates, failures: chex.Array) -> chex.Array:
    """What the direction is scaled by, at most 1: 1 but after failures."""
    largest = [jnp.max(jnp.abs(d), initial=1.0) for d in jax.tree.leaves(linalg.widened(direction))]
    length = functools.reduce(jnp.maximum, largest)
    return jnp.where(failures > 0, 1e3 ** (1.0 - failures) / length, 1.0)


def _of_whole_direction(searched: Any, shortening: chex.Array) -> Any:
    """The search's state, its step size in units of the direction itself."""
    step_size = getattr(searched, "learning_rate", None)
    if step_size is None:
        return searched
    return searched._replace(learning_rate=step_size * shortening)


def _search(  # noqa: PLR0917  what a line search takes
    linesearch: LineSearch,
    state: Any,
    params: optax.Params,
    direction: optax.Updates,
    value: chex.Array,
    grad: optax.Updates,
    value_fn: Callable[[Any], chex.Array],
) -> tuple[optax.Updates, Any]:
    """The update, in the parameters' types, and the search's new state."""
    wide = _of_one_type(params, params)
    dtype = jax.tree.leaves(wide)[0].dtype
    found, searched = linesearch.update(
        _of_one_type(linalg.scale(-1.0, direction), params),
        state,
        wide,
        value=value.astype(dtype),
        grad=_of_one_type(grad, params),
        value_fn=lambda p: jnp.asarray(value_fn(transforms.cast_like(p, params)), dtype),
    )
    return transforms.cast_like(found, params), _strongly_typed(searched)


def _init_search(search: LineSearch, params: optax.Params) -> Any:
    """The search's state; optax's own has none for parameters without leaves.

    Those get what another tree would, with themselves in the place of what is like it: so
    `optax.tree_map_params` tells that.
    """
    if jax.tree.leaves(params):
        return search.init(_of_one_type(params, params))
    stand_in = jnp.zeros((2, 3, 5), averages.scalar_dtype())
    found = search.init(stand_in)
    return jax.tree.map(lambda x: params if jnp.shape(x) == stand_in.shape else x, found)


def _of_one_type(tree: Any, params: optax.Params) -> Any:
    """All leaves in the widest type of the parameters, since optax's searches mix them."""
    dtype = averages.widest_dtype(*jax.tree.leaves(params))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _direction_cost(before: Any, after: Any) -> chex.Numeric:
    """Gradient equivalents of the incoming gradient, and of what the direction did with it."""
    return after.cost - before.cost if hasattr(after, "cost") else 1.0


def _search_cost(searched: Any) -> chex.Numeric:
    """Gradient equivalents of the search, and of the loss where it led.

    A search that keeps the gradient (zoom) evaluates it with every value.
    """
    evaluations = getattr(getattr(searched, "info", None), "num_linesearch_steps", 0)
    each = oracles.VALUE_COST if getattr(searched, "grad", None) is None else 1.0
    return each * evaluations + oracles.VALUE_COST


def _strongly_typed(tree: Any) -> Any:
    """Without weak types, which would compile the second step again; scalars at least float32."""

    def strong(x: Any) -> chex.Array:
        x = jnp.asarray(x)
        dtype = x.dtype
        if not x.shape and jnp.issubdtype(dtype, jnp.floating):
            dtype = averages.scalar_dtype()
        return jax.lax.convert_element_type(x, dtype)

    return jax.tree.map(strong, tree)

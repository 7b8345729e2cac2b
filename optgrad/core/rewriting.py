"""Updates whose new state is changed at the place where it is computed."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from optgrad.core import leafwise

Replace = Callable[[int, chex.Array], chex.Array]  # (number of a leaf, leaf) -> what it becomes


def replaced_where_computed(
    function: Callable[[Any], Any], given: Any, replace: Replace, chosen: Sequence[int]
) -> Any:
    """``function(given)``, some leaves of its second result replaced at the place they come from.

    The function is traced, and its operations are executed one by one. As soon as a leaf of the
    new state is known it is replaced, and later operations, which compute the update from it, see
    the replaced value. If they saw the other one, XLA would have to store it beside the state, or
    to compute it again from the old state, whose buffer could then not be overwritten.

    Args:
      function: given -> (updates, state).
      given: its argument, any tree.
      replace: (number, leaf) -> leaf, of any type; later operations see it in the original type.
      chosen: the numbers of the state's leaves that are replaced.

    Examples:
      >>> def update(g):
      ...     mean = 0.9 * g
      ...     return 10.0 * mean, (mean,)
      >>> found = replaced_where_computed(update, jnp.float32(1.0), lambda _, x: jnp.round(x), [0])
      >>> print(*found)
      10.0 (Array(1., dtype=float32),)
    """

    def written_out(given: Any) -> Any:
        with leafwise.written_out():  # or nothing could be replaced within a leaf's update
            return function(given)

    traced, shapes = jax.make_jaxpr(written_out, return_shape=True)(given)
    jaxpr = traced.jaxpr
    split = len(jax.tree.leaves(shapes[0]))
    state = jaxpr.outvars[split:]
    # What is handed through, or stays as it is elsewhere in the state, is not seen by others.
    fixed = {*jaxpr.invars, *jaxpr.constvars}
    fixed |= {x for i, x in enumerate(state) if i not in chosen and _is_variable(x)}
    leaf_of = {state[i]: i for i in chosen if _is_variable(state[i]) and state[i] not in fixed}
    used = {x for equation in jaxpr.eqns for x in equation.invars if _is_variable(x)}
    used |= {x for x in jaxpr.outvars if _is_variable(x)}

    values: dict[Any, Any] = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    values |= dict(zip(jaxpr.invars, jax.tree.leaves(given), strict=True))
    replaced: dict[Any, chex.Array] = {}
    for equation in jaxpr.eqns:
        arguments = list(dict.fromkeys(x for x in equation.invars if _is_variable(x)))
        results = [x for x in equation.outvars if x in used]
        single = jaxpr.replace(constvars=[], invars=arguments, outvars=results, eqns=[equation])
        found = jax.core.eval_jaxpr(single, (), *(values[x] for x in arguments))
        values |= dict(zip(results, found, strict=True))
        for x in results:
            if x in leaf_of:
                replaced[x] = replace(leaf_of[x], values[x])
                values[x] = replaced[x].astype(values[x].dtype)

    leaves = [values[x] if _is_variable(x) else x.val for x in jaxpr.outvars]
    for i in chosen:
        x, leaf = state[i], leaves[split + i]
        found_early = _is_variable(x) and x in replaced and leaf_of[x] == i
        leaves[split + i] = replaced[x] if found_early else replace(i, jnp.asarray(leaf))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _is_variable(x: Any) -> bool:
    return not isinstance(x, Literal)

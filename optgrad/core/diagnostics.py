"""What the optimizers model, read from their states."""

from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.core import averages

_State = TypeVar("_State")


def diagnostics(state: Any) -> dict[str, chex.Array]:
    """Modelled curvature, step sizes, confidence … of every optgrad method within a state.

    A method's state that models something has a ``diagnostics()`` of its own, which documents the
    entries; this collects them from any optax state (a chain's, an injected one, a `MultiSteps`').
    All entries are arrays of a shape fixed by the method, most of them scalars, computed from the
    state alone, without host callbacks: return them from the body of a `jax.lax.scan` to record
    them at every step.

    Args:
      state: any optimizer state.

    Returns:
      The entries by name; where several states have an entry of the same name, the second and
      further ones are numbered ``name_2``, ``name_3`` … Empty for methods that model nothing.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optax.chain(optgrad.adaptive_sgd(), optax.scale(1.0))
      >>> sorted(optgrad.diagnostics(optimizer.init(jnp.zeros(3))))[:1]
      ['step_size_geomean']
    """
    return collected(state, "diagnostics")


def per_parameter(state: Any) -> dict[str, chex.ArrayTree]:
    """What optgrad's methods within a state model for every parameter, as trees like them.

    What `diagnostics` says of all parameters in three numbers, this says of each: ``step_size``,
    ``curvature`` (its absolute value), ``relative_variance`` (η², of a gradient),
    ``variance_adaptation`` (γ = 1/(1+η²)), … A method's state documents its entries. Entries may be
    infinite or NaN where there is nothing to tell.

    Args:
      state: any optimizer state.

    Returns:
      The trees by name, numbered as by `diagnostics`; empty for methods that have none.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> state = optgrad.m_svag(0.1).init(jnp.zeros(3))
      >>> sorted(optgrad.per_parameter(state))
      ['relative_variance', 'variance_adaptation']
    """
    return collected(state, "per_parameter")


def collected(state: Any, name: str) -> dict[str, Any]:
    """The entries of all states within a state that have a method of that name.

    Where several have an entry of the same name, the second and further ones are numbered.
    """
    found: dict[str, Any] = {}
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: _has(x, name)):
        if not _has(leaf, name):
            continue
        for entry, value in getattr(leaf, name)().items():
            number = 2
            key = entry
            while key in found:
                key, number = f"{entry}_{number}", number + 1
            found[key] = value
    return found


def states_of(state: Any, kind: type[_State]) -> list[_State]:
    """All states of a kind within a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


def state_of(state: Any, kind: type[_State], method: str) -> _State:
    """The first state of a kind within a state.

    Args:
      state: any optimizer state.
      kind: its type.
      method: whose state it is, for the message.

    Raises:
      ValueError: if there is none.
    """
    found = states_of(state, kind)
    if not found:
        raise ValueError(
            f"state = {type(state).__name__} holds none of {method}; accepted: a state of "
            f"{method}, or one that contains it"
        )
    return found[0]


def _has(state: Any, name: str) -> bool:
    return callable(getattr(state, name, None))


def ratio(numerator: chex.ArrayTree, denominator: chex.ArrayTree) -> chex.ArrayTree:
    """|x|/|y| of two trees in at least float32; NaN for 0/0."""

    def divide(x: chex.Array, y: chex.Array) -> chex.Array:
        dtype = averages.average_dtype(x)
        return jnp.abs(x.astype(dtype)) / jnp.abs(y.astype(dtype))

    return jax.tree.map(divide, numerator, denominator)


class Summary(NamedTuple):
    """Of the positive entries of a tree."""

    geomean: chex.Array
    min: chex.Array
    max: chex.Array


def summarize(numerator: Any, denominator: Any | None = None) -> Summary:
    """Geometric mean, minimum and maximum of the positive entries of a tree, zeros if none is.

    Args:
      numerator: the tree.
      denominator: a tree by whose positive entries it is divided, without under- or overflow.

    Examples:
      >>> import jax.numpy as jnp
      >>> found = summarize(jnp.array([1.0, 4.0, -1.0]))
      >>> print(*(f"{x:.1f}" for x in found))
      2.0 1.0 4.0
    """
    dtype = averages.scalar_dtype()
    tiny = np.finfo(dtype).tiny
    total, number = jnp.zeros((), dtype), jnp.zeros((), dtype)
    least, most = jnp.asarray(jnp.inf, dtype), jnp.asarray(-jnp.inf, dtype)
    divided = [numerator] if denominator is None else [numerator, denominator]
    for leaves in zip(*map(jax.tree.leaves, divided), strict=True):
        over, *under = (x.astype(dtype) for x in leaves)
        valid = over > tiny
        for y in under:
            valid &= y > tiny
        logs = jnp.log(jnp.where(valid, over, 1.0))
        for y in under:
            logs -= jnp.log(jnp.where(valid, y, 1.0))
        total, number = total + jnp.sum(logs), number + jnp.sum(valid, dtype=dtype)
        least = jnp.minimum(least, jnp.min(logs, where=valid, initial=jnp.inf))
        most = jnp.maximum(most, jnp.max(logs, where=valid, initial=-jnp.inf))
    logarithms = (total / jnp.maximum(number, 1.0), least, most)
    return Summary(*(jnp.where(number > 0, jnp.exp(x), 0.0) for x in logarithms))

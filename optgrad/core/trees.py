"""Inner products and combinations of pytrees that optax.tree lacks.

Everything is accumulated in at least float32 whatever the leaves' types. A *basis* is a tree like
the parameters with a leading axis of d directions on every leaf; it is never raveled.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp

from optgrad.core import averages, leafwise, shards


def dots(*pairs: tuple[chex.ArrayTree, chex.ArrayTree]) -> tuple[chex.Array, ...]:
    """The inner products ⟨x, y⟩ of several pairs of trees over the whole tree, scalars.

    Examples:
      >>> x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> print(*dots((x, x), (x, {"a": jnp.ones(2), "b": jnp.array(1.0)})))
      14.0 6.0
    """
    return tuple(jnp.sum(inner_products(*pairs), axis=1))


def inner_products(*pairs: tuple[chex.ArrayTree, chex.ArrayTree]) -> chex.Array:
    """The inner products ⟨x, y⟩ of several pairs of trees, leaf by leaf, in one pass over them.

    One reduction with several results, which XLA fuses with the products: nothing of a leaf's size
    is stored in between, and each leaf is read once. Sums run over two levels, so that float32
    suffices for large leaves. What is divided among devices costs one small all-reduce (see
    `_sums_of_divided`, and `shards` for shards under `jax.shard_map`).

    Args:
      *pairs: trees of the same structure and shapes.

    Returns:
      Shape (pairs, leaves); the sum of a row is the inner product over the whole tree.

    Examples:
      >>> x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> xx, x1 = inner_products((x, x), (x, {"a": jnp.ones(2), "b": jnp.array(1.0)}))
      >>> print(xx, x1)
      [5. 9.] [3. 3.]
    """

    def sums(*leaves: chex.Array) -> tuple[chex.Array, ...]:
        products = [wide(x) * wide(y) for x, y in zip(leaves[::2], leaves[1::2], strict=True)]
        return tuple(x.reshape(1) for x in _sums(products))

    columns = map_several(len(pairs), sums, *itertools.chain(*pairs))
    parts = [x for column in columns for x in jax.tree.leaves(column)]
    if not parts:
        return jnp.zeros((len(pairs), 0), averages.scalar_dtype())
    if shards.are_summed():
        parts = shards.added(parts)
    return leafwise.kept_whole(jax.lax.concatenate(parts, 0)).reshape(len(pairs), -1)


def _sums(arrays: Sequence[chex.Array]) -> tuple[chex.Array, ...]:
    """The sums of arrays of one shape, together.

    In two levels, the first of which has the last axis: to keep that one takes XLA on CPU ten to
    thirty times as long, since it runs through memory once for each result.
    """
    dtype = averages.scalar_dtype()
    arrays = tuple(x.astype(dtype) for x in arrays)
    shape, size = arrays[0].shape, arrays[0].size
    if not shape:
        return arrays
    if shards.may_be_divided(*arrays):
        return _sums_of_divided(arrays)
    kept = None
    if size > _LONG and len(shape) == 1:
        if row := _row(size):
            return _sums([x.reshape(-1, row) for x in arrays])
        whole = size - size % _LONG
        parts = [_sums([x[:whole].reshape(-1, _LONG) for x in arrays])]
        parts += [_sums([x[whole:] for x in arrays])] if whole < size else []
        return tuple(sum(column[1:], start=column[0]) for column in zip(*parts, strict=True))
    if size > _LONG:  # add up along one axis at last, not too short nor too long a one
        distances = [abs(math.log(n * _LONG / size)) for n in shape[:-1]]
        kept = distances.index(min(distances))
        if size // shape[kept] > 4 * _LONG:
            return _sums([x.reshape(-1) for x in arrays])
    axes = tuple(i for i in range(len(shape)) if i != kept)
    zeros = tuple(jnp.zeros((), dtype) for _ in arrays)
    return tuple(jnp.sum(x) for x in jax.lax.reduce(arrays, zeros, _add, axes))


@functools.cache
def _row(size: int) -> int | None:
    """A length of rows into which so many numbers divide without a rest; None: no good one.

    A rest takes slices, which XLA on CPU stores if a reduction has a single result.
    """
    return next((n for n in range(_LONG, _LONG // 64, -1) if size % n == 0), None)


def _sums_of_divided(arrays: Sequence[chex.Array]) -> tuple[chex.Array, ...]:
    """The sums of arrays that XLA divides among devices, one reduction for each.

    Of a reduction with one result it adds up the devices' results, and puts those of all leaves
    into one all-reduce (up to 256, its limit); of one with several it gathers them, each on its
    own. A reduction to an axis first, or a reshape, would send what is as long as the axis.
    """
    return tuple(jnp.sum(x) for x in arrays)


def _add(x: tuple[chex.Array, ...], y: tuple[chex.Array, ...]) -> tuple[chex.Array, ...]:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def is_explicitly_sharded(x: chex.Array) -> bool:
    """Whether the array's placement on an explicit mesh is part of its type.

    Reshapes and contractions that would have to choose a placement are refused for such arrays.
    """
    sharding: Any = jax.typeof(x).sharding
    return any(spec is not None for spec in sharding.spec)


_LONG = 2**15  # so many float32 are added up one after the other


def ordered_after(x: chex.Array, y: chex.Array) -> chex.Array:
    """``x``, with a data dependency on ``y``, which must be finite.

    XLA updates a donated buffer in place only if everything else that reads its old value provably
    comes first; where x overwrites what y is computed from, this tells it. (It removes an
    `optimization_barrier` before it decides.) It does not remove 0·y, which may be NaN.
    """
    return x + 0 * y.astype(x.dtype)


def in_turn(never: chex.Array, first: chex.ArrayTree, *rest: chex.ArrayTree) -> tuple[Any, ...]:
    """The trees, each but the first with a data dependency on the one before it.

    Serves the same end as `ordered_after` where numbers need not be finite: each array is selected
    against the one before it by a scalar that is false, of which XLA does not know it. Hand the new
    values over in an order in which each one comes after all that are computed from the buffer
    that it overwrites.

    Args:
      never: a traced scalar that is never true.
      first: a tree.
      *rest: trees of the same structure and shapes.
    """
    ordered = [first]
    for tree in rest:
        ordered.append(
            leafwise.tree_map(
                lambda x, y: jnp.where(never, y.astype(x.dtype), x), tree, ordered[-1]
            )
        )
    return tuple(ordered)


def project(basis: chex.ArrayTree, x: chex.ArrayTree) -> chex.Array:
    """Coordinates ⟨v_i, x⟩ of ``x`` along the d directions of ``basis``, shape (d,).

    Raises:
      ValueError: for a basis without leaves, whose d is not known.
    """

    def one(v: chex.Array, leaf: chex.Array) -> chex.Array:
        axes, dtype = tuple(range(1, v.ndim)), averages.scalar_dtype()
        if v.dtype == leaf.dtype == dtype and not shards.may_be_divided(v, leaf):
            # A product of matrices is faster; of what has to be converted first it needs a copy.
            contracted = ((axes, tuple(range(leaf.ndim))), ((), ()))
            return jax.lax.dot_general(v, leaf, contracted, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(wide(v) * wide(leaf), axis=axes, dtype=dtype)

    coordinates = jax.tree.leaves(leafwise.tree_map(one, basis, x))
    if not coordinates:
        raise ValueError("basis has no leaves: the number of directions is not known")
    return shards.total(coordinates)


def combine(coordinates: chex.Array, basis: chex.ArrayTree) -> chex.ArrayTree:
    """The vector Σ yᵢ·vᵢ, a tree like the parameters, in at least float32."""
    return leafwise.tree_map(
        lambda v: jnp.tensordot(
            coordinates.astype(averages.average_dtype(v)),
            wide(v),
            axes=1,
            precision=jax.lax.Precision.HIGHEST,
        ),
        basis,
    )


def ravel(tree: chex.ArrayTree) -> tuple[chex.Array, Callable[[chex.Array], chex.ArrayTree]]:
    """All leaves in one vector, whole on every device, and the way back to their placements.

    For dense methods alone, whose parameters are few.

    Raises:
      ValueError: for shards under `jax.shard_map`.
    """
    shards.require_whole(tree, "a matrix over all parameters")
    flat: chex.Array
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(_gathered, tree))

    def placed(vector: chex.Array) -> chex.ArrayTree:
        return jax.tree.map(_placed_like, unravel(vector), tree)

    return flat, placed


def _gathered(x: chex.Array) -> chex.Array:
    """An explicitly sharded array on all devices: such arrays are not reshaped as they are."""
    if not is_explicitly_sharded(x):
        return x
    kind: Any = jax.typeof(x)
    whole: Any = kind.sharding.update(spec=[None] * x.ndim)
    return jax.sharding.reshard(x, whole)  # type: ignore[no-untyped-call]


def _placed_like(x: chex.Array, like: chex.Array) -> chex.Array:
    if not is_explicitly_sharded(like):
        return x
    kind: Any = jax.typeof(like)
    return jax.sharding.reshard(x, kind.sharding)  # type: ignore[no-untyped-call]


def size(tree: chex.ArrayTree) -> int:
    """Number of scalars in all leaves, on all devices."""
    return sum(jnp.size(leaf) * shards.number_of(leaf) for leaf in jax.tree.leaves(tree))


def wide(x: chex.Array) -> chex.Array:
    """``x`` in at least float32."""
    return jnp.asarray(x, averages.average_dtype(x))


def spread(values: chex.Array, tree: chex.ArrayTree) -> chex.ArrayTree:
    """One scalar for each leaf of ``tree``: ``values`` of shape () for all, or (leaves,) in turn.

    Examples:
      >>> spread(jnp.array(2.0), {"a": 0.0, "b": 1.0})["b"].shape
      ()
    """
    leaves, structure = jax.tree.flatten(tree)
    if values.ndim == 0:
        return jax.tree.unflatten(structure, [values] * len(leaves))
    return jax.tree.unflatten(structure, [values[i] for i in range(len(leaves))])


def map_several(
    count: int,
    function: Callable[..., Sequence[chex.Array]],
    tree: chex.ArrayTree,
    *rest: chex.ArrayTree,
) -> tuple[Any, ...]:
    """`jax.tree.map` of a function with several results, as that many trees.

    Args:
      count: how many results.
      function: leaves -> a sequence of ``count`` arrays.
      tree: decides the structure.
      *rest: trees of the same structure.

    Examples:
      >>> map_several(2, lambda x, y: (x + y, x * y), {"a": 2}, {"a": 3})
      ({'a': 5}, {'a': 6})
    """
    structure: Any = jax.tree.structure(tree)
    columns = [structure.flatten_up_to(other) for other in rest]
    leaves = jax.tree.leaves(tree)
    function = leafwise.traced_once(function)
    rows = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(structure.unflatten([row[i] for row in rows]) for i in range(count))

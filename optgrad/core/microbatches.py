"""Losses and outputs of a batch, with the activations of one micro-batch at a time.

Functions here are of ``(params, batch, key)``, where a key may be None. `jax.checkpoint` around
each micro-batch makes every backward pass, and every product with a curvature matrix, compute its
activations again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, oracles, transforms, trees


class _Division(NamedTuple):
    """A batch in micro-batches."""

    number: int  # of whole ones
    share: float  # of all examples that are in these
    take: Callable[[chex.Numeric], tuple[Any, Any]]  # number -> micro-batch and its key
    rest: tuple[Any, Any] | None  # the examples that are left over, with their key


def _divided(batch: Any, key: Any, chunk: int) -> _Division:
    total = oracles.batch_size(batch)
    count, whole = total // chunk, total - total % chunk

    def stacked(x: chex.Array) -> chex.Array:
        # [chunk, count, ...]: each micro-batch has examples of all parts of the batch, so that one
        # that is sharded along the batch axis stays so.
        x = jnp.asarray(x)
        x = x[:whole] if whole < total else x
        shape = (chunk, count, *x.shape[1:])
        if not trees.is_explicitly_sharded(x):
            return x.reshape(shape)
        sharding: Any = jax.typeof(x).sharding
        spec: Any = jax.sharding.PartitionSpec
        first, *others = sharding.spec
        placed = jax.sharding.NamedSharding(sharding.mesh, spec(first, None, *others))
        return jax.lax.reshape(x, shape, out_sharding=placed)

    parts = jax.tree.map(stacked, batch)

    def key_of(index: chex.Numeric) -> Any:
        return None if key is None else jax.random.fold_in(key, index)

    def take(index: chex.Numeric) -> tuple[Any, Any]:
        one = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), parts
        )
        return one, key_of(index)

    rest = None
    if whole < total:
        rest = jax.tree.map(lambda x: x[whole:], batch), key_of(count)
    return _Division(count, whole / total, take, rest)


def mean_loss(
    loss: Callable[[Any, Any, Any], chex.Array],
    params: optax.Params,
    batch: Any,
    key: Any,
    size: int | None,
) -> chex.Array:
    """The mean loss of a batch; its gradient is added up in at least float32.

    Args:
      loss: the mean loss of a micro-batch.
      params: θ.
      batch: the whole batch.
      key: a PRNG key, or None; each micro-batch has its number folded in.
      size: examples of a micro-batch; it need not divide the batch.
    """
    total = oracles.batch_size(batch)
    chunk = oracles.examples_at_once(size, total)
    if chunk == total:
        return loss(params, batch, key)
    division = _divided(batch, key, chunk)

    def mean(wide: Any, one: tuple[Any, Any]) -> chex.Array:
        value = loss(transforms.cast_like(wide, params), *one)
        return value.astype(averages.average_dtype(value))

    @jax.checkpoint
    def part(wide: Any, index: chex.Array) -> chex.Array:
        return mean(wide, division.take(index))

    def add(sums: chex.Array, index: chex.Array) -> tuple[chex.Array, None]:
        return sums + part(wide, index), None

    wide, indices = linalg.widened(params), jnp.arange(division.number)
    zero = jnp.zeros((), jax.eval_shape(part, wide, indices[0]).dtype)
    value = jax.lax.scan(add, zero, indices)[0] * (division.share / division.number)
    if division.rest is None:
        return value
    return value + (1.0 - division.share) * jax.checkpoint(mean)(wide, division.rest)


def stacked_outputs(
    outputs: Callable[[Any, Any, Any], Any],
    params: optax.Params,
    batch: Any,
    key: Any,
    size: int | None,
) -> Any:
    """The outputs of a batch, in its order.

    What has another shape for a micro-batch than for the batch has a leading batch axis; what has
    the same does not depend on the batch: parameters that are among the outputs.

    Args:
      outputs: those of a micro-batch.
      params: θ.
      batch: the whole batch.
      key: a PRNG key, or None; each micro-batch has its number folded in.
      size: examples of a micro-batch; it need not divide the batch.

    Raises:
      ValueError: for an output whose shape depends on the batch in another way.
    """
    total = oracles.batch_size(batch)
    chunk = oracles.examples_at_once(size, total)
    if chunk == total:
        return outputs(params, batch, key)
    division = _divided(batch, key, chunk)
    wide = linalg.widened(params)

    def all_outputs(wide: Any, one: tuple[Any, Any]) -> Any:
        return outputs(transforms.cast_like(wide, params), *one)

    shapes = jax.eval_shape(all_outputs, wide, (batch, key))
    first = division.take(0)
    small = jax.eval_shape(all_outputs, wide, first)
    depends = [
        _depends_on_batch(one, whole, chunk, total)
        for one, whole in zip(jax.tree.leaves(small), jax.tree.leaves(shapes), strict=True)
    ]

    def dependent(wide: Any, one: tuple[Any, Any]) -> list[chex.Array]:
        found = zip(jax.tree.leaves(all_outputs(wide, one)), depends, strict=True)
        return [leaf for leaf, is_dependent in found if is_dependent]

    part = jax.checkpoint(lambda wide, index: dependent(wide, division.take(index)))
    stacked = jax.lax.map(functools.partial(part, wide), jnp.arange(division.number))
    joined = [jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in stacked]
    if division.rest is not None:
        last = jax.checkpoint(dependent)(wide, division.rest)
        joined = [jnp.concatenate(pair) for pair in zip(joined, last, strict=True)]
    remaining, structure = iter(joined), jax.tree.structure(shapes)
    every = zip(jax.tree.leaves(all_outputs(wide, first)), depends, strict=True)
    return jax.tree.unflatten(structure, [next(remaining) if x else leaf for leaf, x in every])


def _depends_on_batch(one: Any, whole: Any, chunk: int, total: int) -> bool:
    """By the shapes of an output for a micro-batch and for the batch."""
    if one.shape == whole.shape:
        return False
    if (one.shape[:1], whole.shape[:1], one.shape[1:]) == ((chunk,), (total,), whole.shape[1:]):
        return True
    raise ValueError(
        f"an output has the shapes {one.shape} for {chunk} examples and {whole.shape} for {total}; "
        "accepted: a leading batch axis, or one shape for all batches"
    )

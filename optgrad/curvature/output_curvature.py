"""Random vectors whose second moments are the Hessian of a loss in the network's outputs."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.core import linalg, shards, trees

LOSSES = ("general", "softmax", "squared")


def root_times_signs(
    loss: str, outputs: Any, out_loss_fn: Callable[[Any], chex.Array] | None, key: chex.PRNGKey
) -> Any:
    """A random r with E[rrᵀ] = ∇²_z of the mean loss (its blocks), like the outputs."""
    shards.require_whole(outputs, "a random vector over all outputs")
    leaves: list[chex.Array]
    leaves, structure = jax.tree.flatten(jax.tree.map(trees.wide, outputs))
    found = []
    for i, z in enumerate(leaves):
        key, key_signs, key_probe = jax.random.split(key, 3)
        signs = jax.random.rademacher(key_signs, z.shape, z.dtype)
        if out_loss_fn is not None and loss == "general":

            def product(v: chex.Array, i: int = i) -> chex.Array:
                return _hessian_part(out_loss_fn, structure, leaves, i, v)

            found.append(_general(product, signs, key_probe))
        elif loss == "softmax":
            found.append(_softmax(z, signs))
        else:
            found.append(signs / np.sqrt(max(z.size // _outputs_of(z), 1)))
    return jax.tree.unflatten(structure, found)


def _outputs_of(z: chex.Array) -> int:
    """C, the length of a block."""
    return max(z.shape[-1], 1) if z.ndim > 1 else 1


def _softmax(z: chex.Array, signs: chex.Array) -> chex.Array:
    """√p∘u − p(√p·u), over the root of the number of rows."""
    if not z.ndim:
        raise ValueError("outputs are a scalar; accepted: logits along the last axis")
    p = jax.nn.softmax(z, axis=-1)
    rooted = jnp.sqrt(p) * signs
    rows = max(z.size // max(z.shape[-1], 1), 1)
    return (rooted - p * jnp.sum(rooted, axis=-1, keepdims=True)) / np.sqrt(rows)


def _hessian_part(
    out_loss_fn: Callable[[Any], chex.Array],
    structure: Any,
    leaves: list[chex.Array],
    i: int,
    v: chex.Array,
) -> chex.Array:
    """The diagonal block of leaf i of the Hessian of the loss in the outputs, times v."""

    def gradient(z: chex.Array) -> chex.Array:
        others = jax.tree.unflatten(structure, [*leaves[:i], z, *leaves[i + 1 :]])
        part: chex.Array = jax.tree.leaves(jax.grad(out_loss_fn)(others))[i]
        return part

    return jax.jvp(gradient, (leaves[i],), (v,))[1]


def _general(
    product: Callable[[chex.Array], chex.Array], signs: chex.Array, key: chex.PRNGKey
) -> chex.Array:
    """S·u with SSᵀ the blocks along the last axis of a matrix that is known by its products.

    Signs on the probes make what the blocks leave out average to 0; what they contain is exact.
    """
    if signs.ndim < 2:
        probe = jax.random.rademacher(key, signs.shape, signs.dtype)
        return jnp.sqrt(jnp.maximum(probe * product(probe), 0.0)) * signs
    probe = jax.random.rademacher(key, (*signs.shape[:-1], 1), signs.dtype)
    axes = jnp.eye(signs.shape[-1], dtype=signs.dtype)
    columns = jax.vmap(lambda axis: probe * product(probe * axis))(axes)  # C, rows, C
    blocks = jnp.moveaxis(columns, 0, -1)
    values, vectors = linalg.eigh(blocks)
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
    return jnp.einsum("...ij,...j->...i", roots, signs, precision=jax.lax.Precision.HIGHEST)

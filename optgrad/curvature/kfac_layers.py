"""The layers among the parameters: a kernel, and a bias if there is one.

A *block* is the part of a tree that belongs to one layer, a dictionary with ``"kernel"`` and, where
the layer has one, ``"bias"``; blocks are kept by the layers' paths. As a matrix it has a row for
each input, the bias last, and a column for each output.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks

Blocks = dict[str, dict[str, chex.Array]]


class Layer(NamedTuple):
    """Where a layer's parameters are among the leaves of their tree."""

    path: str  # its keys, joined by "/"
    kernel: int
    bias: int | None


def find_layers(params: optax.Params, chosen: Collection[str] | None = None) -> tuple[Layer, ...]:
    """Layers with a floating-point leaf ``kernel`` of 2 or 4 axes; a leaf ``bias`` goes with it.

    Args:
      params: any tree: dictionaries, `nnx.State`, named tuples.
      chosen: paths of those that are wanted; None is all.

    Raises:
      ValueError: for a path where there is no layer.

    Examples:
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "s": jnp.ones(2)}
      >>> find_layers(params)
      (Layer(path='Dense_0', kernel=1, bias=0),)
    """
    leaves = {_names(path): i for i, (path, _) in enumerate(_with_paths(params))}
    values = jax.tree.leaves(params)
    found = {}
    for names, index in leaves.items():
        kernel = values[index]
        is_float = jnp.issubdtype(jnp.result_type(kernel), jnp.floating)
        if names[-1:] != ("kernel",) or not is_float or jnp.ndim(kernel) not in (2, 4):
            continue
        if not jnp.size(kernel):
            continue
        bias = leaves.get((*names[:-1], "bias"))
        if bias is not None and jnp.shape(values[bias]) != jnp.shape(kernel)[-1:]:
            bias = None
        path = "/".join(names[:-1])
        found[path] = Layer(path, index, bias)
    if chosen is None:
        return tuple(found.values())
    for path in chosen:
        if path not in found:
            raise ValueError(
                f"layers has {path!r}, which is no layer of params (a mapping with a floating-point"
                f" 'kernel' of 2 or 4 axes); {checks.did_you_mean(path, found)}"
            )
    return tuple(layer for path, layer in found.items() if path in chosen)


def _with_paths(tree: Any) -> list[tuple[Any, Any]]:
    paths: list[tuple[Any, Any]] = jax.tree_util.tree_flatten_with_path(tree)[0]
    return paths


def _names(path: Any) -> tuple[str, ...]:
    """The keys as strings, without the field in which an `nnx.Variable` holds its array."""
    names = [
        str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))
        for key in path
    ]
    if len(names) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey):
        inside = names[-1] in ("value", "raw_value") and names[-2] in ("kernel", "bias")
        names = names[:-1] if inside else names
    return tuple(names)


def blocks(tree: chex.ArrayTree, layers: tuple[Layer, ...]) -> Blocks:
    """The layers' part of a tree like the parameters."""
    leaves = jax.tree.leaves(tree)
    found: Blocks = {}
    for layer in layers:
        found[layer.path] = {"kernel": leaves[layer.kernel]}
        if layer.bias is not None:
            found[layer.path]["bias"] = leaves[layer.bias]
    return found


def rest(tree: Any, layers: tuple[Layer, ...]) -> Any:
    """The tree with `optax.MaskedNode` in place of the layers' leaves; itself without layers."""
    if not layers:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    for index in _indices(layers):
        leaves[index] = optax.MaskedNode()
    return jax.tree.unflatten(structure, leaves)


def joined(layers: tuple[Layer, ...], own: Mapping[str, Any], others: Any, like: Any) -> Any:
    """A tree like the parameters, of the layers' blocks and of what `rest` leaves."""
    if not layers:
        return others
    structure: Any = jax.tree.structure(like)
    leaves: list[Any] = [None] * structure.num_leaves
    for layer in layers:
        leaves[layer.kernel] = own[layer.path]["kernel"]
        if layer.bias is not None:
            leaves[layer.bias] = own[layer.path]["bias"]
    remaining = iter(jax.tree.leaves(others))
    taken = _indices(layers)
    leaves = [x if i in taken else next(remaining) for i, x in enumerate(leaves)]
    return structure.unflatten(leaves)


def _indices(layers: tuple[Layer, ...]) -> set[int]:
    every = [index for layer in layers for index in (layer.kernel, layer.bias)]
    return {index for index in every if index is not None}


def matrix(block: Mapping[str, chex.Array]) -> chex.Array:
    """Shape (in, out), or (in + 1, out) with a bias."""
    kernel = block["kernel"]
    rows = kernel.reshape(-1, kernel.shape[-1])
    return jnp.concatenate([rows, block["bias"][None]]) if "bias" in block else rows


def block_of(rows: chex.Array, like: Mapping[str, chex.Array]) -> dict[str, chex.Array]:
    """The block of such a matrix, in the shapes of ``like``."""
    if "bias" not in like:
        return {"kernel": rows.reshape(like["kernel"].shape)}
    return {"bias": rows[-1], "kernel": rows[:-1].reshape(like["kernel"].shape)}

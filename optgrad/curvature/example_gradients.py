r"""The gradients of a batch's examples as one linear map, stored or as products of layers.

:math:`G` has the gradient of example i in its row i, n rows of D numbers. That of a layer is
:math:`\sum_t \tilde a_{it}s_{it}^\top`, of its inputs :math:`\tilde a = (a, 1)` and of the
gradients s by its outputs at the positions t, so that all that is wanted of G costs about as much
as a gradient and G itself is never formed.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, oracles, shards, trees
from optgrad.core.layer_statistics import LayerStatistics
from optgrad.curvature import kfac_layers

_EXACT = jax.lax.Precision.HIGHEST


class Examples(Protocol):
    """n gradients, the rows of G."""

    size: int  # n

    def gram(self) -> chex.Array:
        """GGᵀ, shape (n, n)."""

    def project(self, x: optax.Updates) -> chex.Array:
        """Gx, shape (n,)."""

    def combine(self, weights: chex.Array) -> optax.Updates:
        """Gᵀw, a tree like the parameters in at least float32."""

    def stored(self) -> optax.Updates:
        """G itself, a tree like the parameters with a leading axis n on every leaf."""


def examples(
    like: optax.Updates, per_example_grads: Any | None, kfac_stats: Any | None
) -> Examples:
    """The gradients from what is given; ``per_example_grads`` if both are.

    Raises:
      ValueError: if neither is, or it does not fit the gradient.
    """
    if per_example_grads is not None:
        return _Stored(like, per_example_grads)
    if kfac_stats is not None:
        return _Layered(like, kfac_stats)
    raise ValueError(
        "update needs the extra argument per_example_grads or kfac_stats, got none; accepted: the "
        "gradients of all examples, which optgrad.per_example_grads or "
        "optgrad.curvature_args(loss_fn, per_example=True) computes, or the statistics of all "
        "layers (optgrad.layer_statistics)"
    )


class _Stored:
    """Gradients as they are."""

    def __init__(self, like: optax.Updates, per_example_grads: Any) -> None:
        self.size = oracles.batch_size(per_example_grads, "per_example_grads")
        found: Any = jax.tree.structure(per_example_grads)
        wanted: Any = jax.tree.structure(like)
        shapes = [jnp.shape(x)[1:] for x in jax.tree.leaves(per_example_grads)]
        expected = [jnp.shape(x) for x in jax.tree.leaves(like)]
        if found != wanted or shapes != expected:
            raise ValueError(
                f"per_example_grads has leaves of shapes {shapes[:4]} after the batch axis, in "
                f"{found}; accepted: those of the gradient, {expected[:4]} in {wanted}"
            )
        self._grads = per_example_grads

    def gram(self) -> chex.Array:
        return linalg.gram(self._grads, self._grads)

    def project(self, x: optax.Updates) -> chex.Array:
        return trees.project(self._grads, x)

    def combine(self, weights: chex.Array) -> optax.Updates:
        return trees.combine(weights, self._grads)

    def stored(self) -> optax.Updates:
        return self._grads


class _Layered:
    """Gradients of layers, as sums of outer products."""

    def __init__(self, like: optax.Updates, kfac_stats: Mapping[Any, Any]) -> None:
        given = {_name(path): LayerStatistics(*found) for path, found in kfac_stats.items()}
        self._like = like
        known = {layer.path for layer in kfac_layers.find_layers(like)}
        stats = {path: found for path, found in given.items() if path in known}  # others: frozen
        self._layers = kfac_layers.find_layers(like, tuple(stats))
        number = sum(1 + (layer.bias is not None) for layer in self._layers)
        if number != len(jax.tree.leaves(like)):
            raise ValueError(
                f"kfac_stats has the layers {sorted(given)}, which are {number} of the "
                f"{len(jax.tree.leaves(like))} leaves of the parameters; accepted: statistics of "
                "layers that contain all of them. Pass per_example_grads instead"
            )
        self.size = oracles.batch_size(tuple(stats.values()), "kfac_stats")
        self._blocks = kfac_layers.blocks(like, self._layers)
        shards.require_whole(self._blocks, "a layer's gradients as products of its statistics")
        self._pairs = {path: _pair(path, stats[path], block) for path, block in self._items()}

    def _items(self) -> Any:
        return self._blocks.items()

    def gram(self) -> chex.Array:
        grams = [_layer_gram(*pair) for pair in self._pairs.values()]
        return sum(grams[1:], start=grams[0]).astype(averages.scalar_dtype())

    def project(self, x: optax.Updates) -> chex.Array:
        total = jnp.zeros(self.size, averages.scalar_dtype())
        for path, block in kfac_layers.blocks(x, self._layers).items():
            inputs, grads = self._pairs[path]
            image = jnp.matmul(inputs, trees.wide(kfac_layers.matrix(block)), precision=_EXACT)
            total += jnp.sum(image * grads, axis=(1, 2))
        return total

    def combine(self, weights: chex.Array) -> optax.Updates:
        def one(inputs: chex.Array, grads: chex.Array) -> chex.Array:
            scaled = weights.astype(grads.dtype)[:, None, None] * grads
            return jnp.einsum("ntx,nty->xy", inputs, scaled, precision=_EXACT)

        return self._joined({path: one(*pair) for path, pair in self._pairs.items()})

    def stored(self) -> optax.Updates:
        def per_example(pairs: Any) -> optax.Updates:
            return self._joined({path: jnp.matmul(a.T, s) for path, (a, s) in pairs.items()})

        with jax.default_matmul_precision("highest"):
            return jax.vmap(per_example)(self._pairs)

    def _joined(self, matrices: Mapping[str, chex.Array]) -> optax.Updates:
        own = {path: kfac_layers.block_of(matrices[path], block) for path, block in self._items()}
        return kfac_layers.joined(self._layers, own, (), self._like)


def _name(path: Any) -> str:
    """The path of a layer, keys joined by "/"."""
    return path if isinstance(path, str) else "/".join(map(str, path))


def _pair(path: str, stats: LayerStatistics, block: Any) -> tuple[chex.Array, chex.Array]:
    """Inputs with their 1 for the bias, (n, positions, in), and gradients, (n, positions, out)."""
    inputs, grads = (
        trees.wide(x).reshape(x.shape[0], -1, x.shape[-1])
        for x in (stats.activations, stats.gradients)
    )
    if "bias" in block:
        inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
    shape = (inputs.shape[-1], grads.shape[-1])
    rows = (block["kernel"].size // block["kernel"].shape[-1]) + ("bias" in block)
    if shape != (rows, block["kernel"].shape[-1]) or inputs.shape[1] != grads.shape[1]:
        raise ValueError(
            f"kfac_stats[{path!r}] has activations and gradients of shapes "
            f"{stats.activations.shape} and {stats.gradients.shape}; accepted: [n, *positions, in] "
            f"and [n, *positions, out] for a kernel of shape {block['kernel'].shape}"
        )
    return inputs, grads


def _layer_gram(inputs: chex.Array, grads: chex.Array) -> chex.Array:
    """Inner products of the examples' gradients of one layer, shape (n, n)."""
    positions, rows, columns = inputs.shape[1], inputs.shape[-1], grads.shape[-1]
    if positions == 1:
        a, s = inputs[:, 0], grads[:, 0]
        return jnp.matmul(a, a.T, precision=_EXACT) * jnp.matmul(s, s.T, precision=_EXACT)
    if inputs.shape[0] * positions**2 > rows * columns:  # the gradients are smaller than the pairs
        flat = jnp.einsum("ntx,nty->nxy", inputs, grads, precision=_EXACT)
        flat = flat.reshape(len(flat), -1)
        return jnp.matmul(flat, flat.T, precision=_EXACT)
    along = (jnp.einsum("itx,jux->ijtu", x, x, precision=_EXACT) for x in (inputs, grads))
    return jnp.sum(next(along) * next(along), axis=(2, 3))

"""Kronecker factors of the Fisher matrix's blocks: their averages, inverses and products."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import optax

from optgrad.core import averages, linalg
from optgrad.core.layer_statistics import LayerStatistics
from optgrad.curvature import kfac_layers

_ROUNDINGS = 10.0  # of a factor's trace: the least that is added to its diagonal

KFAC = (
    'J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate '
    'Curvature", 2015'
)


class Factors(NamedTuple):
    """Of one layer, F ≈ Ā ⊗ S; or their inverses."""

    activations: chex.Array  # Ā of (a, 1), shape (in + 1, in + 1), (in, in) without a bias
    gradients: chex.Array  # S, shape (out, out)


class Curvature(NamedTuple):
    """What is known of all layers, by their paths."""

    samples: chex.Array  # batches averaged so far, int32 ()
    factors: dict[str, Factors]  # running averages
    inverses: dict[str, Factors]  # of the damped factors when they were last computed


def init(blocks: kfac_layers.Blocks, damping: chex.Numeric) -> Curvature:
    """No batch yet; the inverses are those of zero factors."""
    factors = {}
    for path, block in blocks.items():
        rows, columns = jax.eval_shape(kfac_layers.matrix, block).shape
        dtype = averages.average_dtype(block["kernel"])
        factors[path] = Factors(
            jnp.zeros((rows, rows), dtype), jnp.zeros((columns, columns), dtype)
        )
    inverses = {path: damped_inverses(f, damping) for path, f in factors.items()}
    return Curvature(jnp.zeros((), jnp.int32), factors, inverses)


def update(
    curvature: Curvature,
    statistics: Mapping[str, LayerStatistics],
    damping: chex.Numeric,
    decay: chex.Numeric,
    due: chex.Array,
) -> Curvature:
    """With one more batch in the averages, and new inverses if ``due`` or at the first batch."""
    # The mean of all batches, until an exponential average would give the newest more weight.
    first = 1.0 / (curvature.samples + 1).astype(averages.scalar_dtype())
    weight = jnp.maximum(jnp.asarray(1 - decay, first.dtype), first)

    def averaged(old: chex.Array, new: chex.Array) -> chex.Array:
        return old + weight.astype(old.dtype) * (new.astype(old.dtype) - old)

    factors = {
        path: jax.tree.map(averaged, old, _moments(statistics[path], old))
        for path, old in curvature.factors.items()
    }

    def inverted(_: chex.Array, past: dict[str, Factors]) -> dict[str, Factors]:
        del past
        return {path: damped_inverses(f, damping) for path, f in factors.items()}

    # A loop of one turn or none: unlike a condition it stays one under `jax.vmap`, where the runs
    # may have their first good batch at different steps.
    turns = (due | (curvature.samples == 0)).astype(jnp.int32)
    inverses = jax.lax.fori_loop(0, turns, inverted, curvature.inverses)
    return Curvature(optax.safe_increment(curvature.samples), factors, inverses)


def _moments(statistics: LayerStatistics, like: Factors) -> Factors:
    """The factors of one batch: Σₜ ããᵀ over n, and the mean of ssᵀ over examples and positions."""
    a, s = (
        jnp.asarray(x, y.dtype).reshape(-1, x.shape[-1])
        for x, y in zip(statistics, like, strict=True)
    )
    size = len(statistics.activations)
    second = _matmul(a.T, a)
    if len(like.activations) > len(second):  # of (a, 1), without a copy of a
        first = jnp.sum(a, axis=0)
        corner = jnp.asarray(len(a), a.dtype).reshape(1, 1)
        second = jnp.block([[second, first[:, None]], [first[None], corner]])
    return Factors(second / size, _matmul(s.T, s) / len(s))


def damped_inverses(factors: Factors, damping: chex.Numeric) -> Factors:
    r"""Of Ā + π√λ·I and S + √λ/π·I, with π² the ratio of the factors' mean eigenvalues."""
    sizes = [jnp.trace(f) / len(f) for f in factors]
    has_both = (sizes[0] > 0) & (sizes[1] > 0)
    balance = jnp.where(has_both, jnp.sqrt(sizes[0]), 1.0)
    balance /= jnp.where(has_both, jnp.sqrt(sizes[1]), 1.0)
    root = jnp.sqrt(jnp.asarray(damping, balance.dtype))
    return Factors(
        _inverse(factors.activations, balance * root), _inverse(factors.gradients, root / balance)
    )


def _inverse(matrix: chex.Array, shift: chex.Array) -> chex.Array:
    """Of the shifted matrix; a singular one and a shift that is lost in rounding have one too."""
    least = _ROUNDINGS * float(np.finfo(matrix.dtype).eps) * jnp.trace(matrix)
    unit = jnp.eye(len(matrix), dtype=matrix.dtype)
    root = jnp.linalg.cholesky(matrix + jnp.maximum(shift, least).astype(matrix.dtype) * unit)
    inverse: chex.Array = jax.scipy.linalg.cho_solve((root, True), unit)
    return 0.5 * (inverse + inverse.T)


def precondition(inverses: Mapping[str, Factors], grads: kfac_layers.Blocks) -> Any:
    """Ā⁻¹GS⁻¹ for each layer's gradient, in at least float32."""
    directions = {}
    for path, block in grads.items():
        inverse = inverses[path]
        rows = kfac_layers.matrix(linalg.widened(block)).astype(inverse.gradients.dtype)
        rows = _matmul(_matmul(inverse.activations, rows), inverse.gradients)
        directions[path] = kfac_layers.block_of(rows, block)
    return directions


def _matmul(x: chex.Array, y: chex.Array) -> chex.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def require_statistics(kfac_stats: Any, params: kfac_layers.Blocks) -> dict[str, LayerStatistics]:
    """The statistics of the layers with these parameters.

    Raises:
      ValueError: if they are missing, those of a layer are, or have other sizes than its kernel.
    """
    if kfac_stats is None:
        raise ValueError(
            "kfac_stats = None; accepted: a dictionary from each layer's path to its "
            "LayerStatistics, as optgrad.layer_statistics(model, params, inputs, …) or "
            "optgrad.curvature_args(loss_fn, kfac=…) builds it"
        )
    found = {}
    for path, block in params.items():
        if path not in kfac_stats:
            known = tuple(sorted(p for p in params if p in kfac_stats))
            raise ValueError(
                f"kfac_stats has nothing about the layer {path!r} of params; accepted: the "
                "statistics of every layer. Where they cannot be had (a grouped, masked or "
                f"transposed convolution), leave it to the fallback, with layers={known!r}"
            )
        statistics = LayerStatistics(*kfac_stats[path])
        kernel = block["kernel"]
        sizes = tuple(x.shape[-1] for x in statistics)
        accepted = (kernel.size // kernel.shape[-1], kernel.shape[-1])
        positions = [x.shape[:-1] for x in statistics]
        if sizes != accepted or positions[0] != positions[1] or not positions[0]:
            shapes = tuple(x.shape for x in statistics)
            raise ValueError(
                f"kfac_stats[{path!r}] has activations and gradients of shapes {shapes}; accepted "
                f"for its kernel {kernel.shape}: (n, *positions, {accepted[0]}) and "
                f"(n, *positions, {accepted[1]})"
            )
        found[path] = statistics
    return found

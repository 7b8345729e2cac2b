"""Solutions with the empirical Fisher matrix of a batch, F = GᵀG/n, by a system of either size."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, trees
from optgrad.curvature import covariance, example_gradients

_EXACT = jax.lax.Precision.HIGHEST


class Found(NamedTuple):
    """A solution."""

    vector: optax.Updates  # (F + λI)⁻¹u, at least float32, zero unless finite
    finite: chex.Array
    damping: chex.Array  # λ as it was used
    trace: chex.Array  # tr F of the batch
    fisher: chex.Array | None  # the average


def solve_dual(
    batch: example_gradients.Examples, updates: optax.Updates, damping: chex.Numeric
) -> Found:
    """(F + λI)⁻¹u by a system as large as the batch."""
    size = batch.size
    gram = batch.gram() / size
    along, trace = batch.project(updates), jnp.trace(gram)
    products = jnp.sum(gram, axis=1)  # of each gradient with their mean
    mm = jnp.mean(products)
    multiple = jnp.mean(along) / jnp.where(mm > 0, mm, 1.0)

    # Two sums of the same gradients in different orders: what they differ by is no signal.
    mean = batch.combine(jnp.full(size, 1.0 / size, gram.dtype))
    length = linalg.norm(linalg.axpy(-multiple, mean, updates))
    rounding = _rounding(updates, size) * jnp.abs(multiple) * jnp.sqrt(trace)
    has_rest = (length > rounding) | (mm == 0)  # also where squares underflow
    length, along = (jnp.where(has_rest, x, 0.0) for x in (length, along - multiple * products))
    right = jnp.stack([jnp.broadcast_to(multiple, (size,)), along], axis=1) / size
    solved, used = covariance.shrunk(gram, damping, right)
    inverse = jnp.where(used > 0, 1.0 / jnp.where(used > 0, used, 1.0), 0.0)
    weights = solved[:, 0] - inverse * solved[:, 1]

    lengths = jnp.sqrt(size * jnp.diagonal(gram))
    bound = inverse * (jnp.sum(jnp.abs(weights) * lengths) + length)
    finite = bound < covariance.largest(updates)  # no entry exceeds the bound
    share = jnp.where(has_rest, inverse, 0.0)  # of u itself, of which Gᵀb is taken away again
    inside = batch.combine(inverse * weights - share * multiple / size)
    vector = jax.tree.map(
        lambda x, u: jnp.where(finite, x + share.astype(x.dtype) * trees.wide(u), 0.0),
        inside,
        updates,
    )
    return Found(vector, finite, used, trace, None)


def solve_primal(
    batch: example_gradients.Examples,
    updates: optax.Updates,
    damping: chex.Numeric,
    past: chex.Array | None,
    weights: averages.SampleWeights,
) -> Found:
    """(F + λI)⁻¹u by a system as large as the parameters, with an average of F."""
    grads = jax.vmap(lambda g: _ravel(g)[0])(batch.stored())
    here = jnp.matmul(grads.T, grads, precision=_EXACT) / batch.size
    fisher = averages.update_mean(past, here, weights)
    flat, unravel = _ravel(updates)
    solved, used = covariance.shrunk(fisher, damping, flat)
    vector = jnp.where(used > 0, solved / jnp.where(used > 0, used, 1.0), 0.0)
    finite = jnp.all(jnp.isfinite(vector)) & jnp.all(jnp.isfinite(fisher))
    finite &= jnp.max(jnp.abs(vector), initial=0.0) < covariance.largest(updates)
    vector = unravel(jnp.where(finite, vector, 0.0))
    return Found(vector, finite, used, jnp.trace(here), fisher)


def _ravel(tree: chex.ArrayTree) -> Any:
    """One vector, in the type that drives a step, and the way back."""
    dtype = averages.scalar_dtype()
    return trees.ravel(jax.tree.map(lambda x: jnp.asarray(x, dtype), tree))


def _rounding(tree: chex.ArrayTree, terms: int) -> float:
    """Relative, of a sum of so many terms that is formed in float32 at least and then stored."""
    infos: list[Any] = [jnp.finfo(x.dtype) for x in jax.tree.leaves(tree)]  # type: ignore[no-untyped-call]
    stored = max(float(info.eps) for info in infos)
    return 4.0 * (stored + math.sqrt(terms) * linalg.epsilon())

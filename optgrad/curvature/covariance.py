r"""The inverse of the covariance of a stream of vectors, of low rank.

The uncentred covariance :math:`C_t = \gamma C_{t-1} + g_tg_t^\top` is kept as :math:`C = XX^\top`
with as many columns as there are directions; they are the rows of a stacked basis here. All that
depends on C then needs the small Gram matrix :math:`G = X^\top X` alone. The decay acts on one
number per row, so that a step writes one row and reads the others.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, linalg, trees

TONGA = (
    'N. Le Roux, P.-A. Manzagol, Y. Bengio, "Topmoumoute online natural gradient algorithm", 2008'
)
NATURAL_NEWTON = 'N. Le Roux, A. Fitzgibbon, "A fast natural Newton method", 2010'


class LowRank(NamedTuple):
    """A covariance of low rank: k principal directions, and the newest vectors as they came."""

    rows: optax.Updates  # S, like the parameters with a leading axis k + period, at least float32
    weights: chex.Array  # w: the columns of X are wᵢSᵢ, shape (k + period,)
    gram: chex.Array  # G = XᵀX, shape (k + period, k + period)
    recent: chex.Array  # how many of the last rows hold a newest vector, int32, shape ()


class Shrinkage(NamedTuple):
    """How a covariance is used; each may be traced but for the flags."""

    decay: Any  # γ
    damping: Any  # λ, or its multiple of the mean variance of the rows
    relative: bool
    normalize: bool


class Shrunk(NamedTuple):
    """A vector that a covariance was applied to, and the covariance that contains it."""

    vector: optax.Updates  # (C + λI)⁻¹g or [I + C/λ]⁻¹g, at least float32; zero if not finite
    covariance: LowRank  # the old one if g is not finite
    damping: chex.Array  # λ, shape ()
    finite: chex.Array  # whether there is such a vector, bool, shape ()


def init_low_rank(params: optax.Params, rank: int, period: int) -> LowRank:
    """No vector yet; the rank is cut to the number of parameters."""
    number = max(1, min(rank, trees.size(params))) + period
    dtype = averages.scalar_dtype()
    return LowRank(
        linalg.empty_basis(params, number),
        jnp.zeros(number, dtype),
        jnp.zeros((number, number), dtype),
        jnp.zeros((), jnp.int32),
    )


def shrink_by_low_rank(
    past: LowRank,
    period: int,
    x: optax.Updates,
    how: Shrinkage,
    valid: chex.Numeric = True,
) -> Shrunk:
    r"""Adds a vector to the covariance, and multiplies it by the inverse of the sum.

    The newest vector is a column of X itself, :math:`g = Xe_j`, so that

    .. math::
      (C+\lambda I)^{-1}g = X(G+\lambda I)^{-1}e_j, \qquad
      [I + C/\lambda]^{-1}g = g - X(G+\lambda I)^{-1}X^\top g = \lambda X(G+\lambda I)^{-1}e_j

    and nothing is subtracted.

    Args:
      past: C so far.
      period: how many vectors are stored as they came.
      x: g.
      how: decay, damping and scale.
      valid: whether g counts; otherwise it is treated as not finite.
    """
    slot = past.weights.shape[0] - period + past.recent % period
    present, finite = _with_vector(_compressed(past, period), x, slot, how.decay, valid)
    number = present.weights.shape[0]
    damping = jnp.asarray(how.damping, present.gram.dtype)
    if how.relative:
        damping = damping * (jnp.trace(present.gram) / number)
    axis = jax.nn.one_hot(slot, number, dtype=present.gram.dtype)
    coordinates, damping = shrunk(present.gram, damping, axis)
    if not how.normalize:  # where λ underflows so does g
        coordinates = jnp.where(damping > 0, coordinates / jnp.where(damping > 0, damping, 1), 0)
    # No entry of the result is larger than this.
    bound = jnp.sum(jnp.abs(coordinates) * jnp.sqrt(jnp.diagonal(present.gram)))
    finite &= bound < largest(x)
    coordinates = jnp.where(finite, coordinates * present.weights, 0.0)
    return Shrunk(trees.combine(coordinates, present.rows), present, damping, finite)


def _compressed(past: LowRank, period: int) -> LowRank:
    """Where no row is free, the principal directions alone, which frees the last ``period`` rows.

    A loop of one turn or none: unlike a condition it stays one under `jax.vmap`, and its operands
    are overwritten.
    """
    number = past.weights.shape[0]
    is_full = past.recent >= period

    def turn(_: chex.Array, past: LowRank) -> LowRank:
        values, vectors = linalg.eigh(past.gram)
        values, vectors = values[::-1], vectors[:, ::-1]  # the largest first
        kept = jnp.arange(number) < number - period
        mixing = jnp.where(kept[:, None], vectors.T * past.weights, 0.0)
        # The choice writes the rows in place; the product alone would be copied into them.
        rows = linalg.where(is_full, linalg.rotate(mixing, past.rows), past.rows)
        values = jnp.where(kept, jnp.maximum(values, 0.0), 0.0)
        weights = kept.astype(past.weights.dtype)
        return LowRank(rows, weights, jnp.diag(values), jnp.zeros_like(past.recent))

    merged: LowRank = jax.lax.fori_loop(0, is_full.astype(jnp.int32), turn, past)
    return merged


def _with_vector(
    past: LowRank, x: optax.Updates, slot: chex.Array, decay: chex.Numeric, valid: chex.Numeric
) -> tuple[LowRank, chex.Array]:
    """γC + xxᵀ with x in a free row; and whether x is finite, else C is as it was."""
    decay = jnp.asarray(decay, past.gram.dtype)
    aged = jnp.sqrt(decay) * past.weights
    column = (aged * trees.project(past.rows, x)).at[slot].set(linalg.dot(x, x))
    finite = jnp.all(jnp.isfinite(column)) & valid
    gram = (decay * past.gram).at[slot].set(column).at[:, slot].set(column)
    row = jax.tree.map(lambda g: jnp.where(finite, trees.wide(g), 0.0), x)
    return LowRank(
        linalg.set_direction(past.rows, slot, row),
        jnp.where(finite, aged.at[slot].set(1.0), past.weights),
        jnp.where(finite, gram, past.gram),
        past.recent + finite.astype(jnp.int32),
    ), finite


def largest(tree: chex.ArrayTree) -> float:
    """The largest number that every leaf can hold."""
    infos: list[Any] = [jnp.finfo(x.dtype) for x in jax.tree.leaves(tree)]  # type: ignore[no-untyped-call]
    return min((float(info.max) for info in infos), default=float("inf"))


def shrunk(
    matrix: chex.Array, damping: chex.Numeric, vector: chex.Array
) -> tuple[chex.Array, chex.Array]:
    r"""[I + A/λ]⁻¹b, which is b itself where A is 0, for a positive semidefinite matrix A.

    It is λ(A + λI)⁻¹b, without an overflow or underflow of its own for any scale of A and λ.

    Args:
      matrix: A, shape (n, n).
      damping: λ ≥ 0. It is raised to n·eps·max Aᵢᵢ, the rounding of A, below which a matrix of that
        size is singular.
      vector: b, shape (n,), or several as columns.

    Returns:
      The solution, of the shape of b, and λ as it was used, shape ().

    Examples:
      >>> print(shrunk(jnp.diag(jnp.array([0.0, 1.0])), 0.25, jnp.ones(2))[0])
      [1.  0.2]
    """
    number, info = matrix.shape[0], np.finfo(matrix.dtype)
    size = jnp.max(jnp.diagonal(matrix))
    damping = jnp.maximum(jnp.asarray(damping, matrix.dtype), number * float(info.eps) * size)
    total = size + damping
    known = total > info.tiny
    total = jnp.where(known, total, 1.0)
    share, identity = damping / total, jnp.eye(number, dtype=matrix.dtype)
    scaled = jnp.where(known, matrix / total + share * identity, identity)
    solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(scaled, lower=True), vector)
    return jnp.where(known, share * solved, vector), damping

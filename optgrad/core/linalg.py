"""Krylov methods on pytrees, and the small algebra that goes with them.

A *product* is a function v -> Av of a symmetric matrix, for trees v like the parameters, in at
least float32; `oracles` makes them. A *basis* is a tree like the parameters with a leading axis of
k directions on every leaf (see `trees`); rows that are not used are zero, and need no mask then.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.core import averages, leafwise, shards, trees

Product = Callable[[Any], Any]

_BREAKDOWN = 50.0  # roundings of the matrix's size: a residual below is none
_LOST = 1e-3  # share of a direction that must be left after orthogonalisation, to be worth a row


def epsilon() -> float:
    """The rounding of the scalars that drive a step."""
    return float(np.finfo(averages.scalar_dtype()).eps)


# --- vectors and bases ------------------------------------------------------------------------


def dot(x: chex.ArrayTree, y: chex.ArrayTree) -> chex.Array:
    """⟨x, y⟩ over the whole tree, at least float32, shape ()."""
    return trees.dots((x, y))[0]


def norm(x: chex.ArrayTree) -> chex.Array:
    """|x| over the whole tree, at least float32, shape ()."""
    return jnp.sqrt(dot(x, x))


def axpy(a: chex.Numeric, x: chex.ArrayTree, y: chex.ArrayTree) -> chex.ArrayTree:
    """a·x + y, in at least float32."""
    return leafwise.tree_map(lambda u, v: _scalar_like(a, u) * trees.wide(u) + trees.wide(v), x, y)


def scale(a: chex.Numeric, x: chex.ArrayTree) -> chex.ArrayTree:
    """a·x, in at least float32."""
    return leafwise.tree_map(lambda u: _scalar_like(a, u) * trees.wide(u), x)


def where(condition: chex.Array, x: Any, y: Any) -> Any:
    """One of two trees, by a scalar condition."""
    return leafwise.tree_map(lambda u, v: jnp.where(condition, u, v), x, y)


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether every entry of every leaf is a finite number, shape ()."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return shards.all_true(finite) if finite else jnp.asarray(True)


def widened(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree in at least float32."""
    return leafwise.tree_map(trees.wide, tree)


def zeros_like(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Zeros in at least float32, placed like the tree's leaves."""
    return leafwise.tree_map(_zeros_like, tree)


def _zeros_like(x: chex.Array) -> chex.Array:
    """As a choice that never falls on x: `jnp.zeros_like` forgets an explicit placement."""
    x = trees.wide(x)
    return jnp.where(True, jnp.zeros((), x.dtype), x)


def unit(x: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.Array]:
    """x/|x| and |x|; zeros for a zero tree."""
    length = norm(x)
    return scale(jnp.where(length > 0, 1.0 / jnp.where(length > 0, length, 1.0), 0.0), x), length


def random_unit(key: chex.PRNGKey, like: chex.ArrayTree) -> chex.ArrayTree:
    """A random direction of length 1 (zero for a tree without entries), placed like ``like``."""
    leaves = jax.tree.leaves(like)
    structure: Any = jax.tree.structure(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    normal = [
        jax.random.normal(shards.key_of(k, x), x.shape, averages.average_dtype(x)) + _zeros_like(x)
        for k, x in zip(keys, leaves, strict=False)
    ]
    return unit(structure.unflatten(normal))[0]


def empty_basis(like: chex.ArrayTree, count: int, dtype: Any | None = None) -> chex.ArrayTree:
    """A basis of ``count`` zero directions, at least float32 by default, placed like ``like``."""

    def one(x: chex.Array) -> chex.Array:
        zeros = _zeros_like(x)
        zeros = zeros if dtype is None else zeros.astype(dtype)
        return jnp.broadcast_to(zeros[None], (count, *zeros.shape))

    return leafwise.tree_map(one, like)


def set_direction(basis: chex.ArrayTree, index: chex.Numeric, x: chex.ArrayTree) -> chex.ArrayTree:
    """The basis with row ``index`` replaced by ``x``."""
    return leafwise.tree_map(
        lambda v, u: jax.lax.dynamic_update_index_in_dim(v, u.astype(v.dtype), index, 0), basis, x
    )


def get_direction(basis: chex.ArrayTree, index: chex.Numeric) -> chex.ArrayTree:
    """Row ``index`` of the basis."""
    return leafwise.tree_map(
        lambda v: jax.lax.dynamic_index_in_dim(v, index, 0, keepdims=False), basis
    )


def append(basis: chex.ArrayTree, x: chex.ArrayTree) -> chex.ArrayTree:
    """A basis with one more row."""
    return leafwise.tree_map(lambda v, u: jnp.concatenate([v, u[None].astype(v.dtype)]), basis, x)


def rotate(matrix: chex.Array, basis: chex.ArrayTree) -> chex.ArrayTree:
    """The basis whose row i is Σⱼ Mᵢⱼ vⱼ, for a matrix of shape (rows, k)."""
    return trees.combine(matrix, basis)


def gram(left: chex.ArrayTree, right: chex.ArrayTree) -> chex.Array:
    """All inner products ⟨uᵢ, vⱼ⟩ of two bases, shape (rows of left, rows of right)."""

    def one(u: chex.Array, v: chex.Array) -> chex.Array:
        u, v = trees.wide(u), trees.wide(v)
        axes = tuple(range(1, u.ndim))
        if trees.is_explicitly_sharded(u):  # a contraction over a sharded axis is refused there
            product = u[:, None] * v[None]
            return jnp.sum(product, axis=tuple(a + 1 for a in axes))
        return jnp.tensordot(u, v, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST)

    products = [
        x.astype(averages.scalar_dtype())
        for x in jax.tree.leaves(leafwise.tree_map(one, left, right))
    ]
    if not products:
        raise ValueError("basis has no leaves: the number of directions is not known")
    return shards.total(products)


def orthogonalize(x: chex.ArrayTree, basis: chex.ArrayTree) -> chex.ArrayTree:
    """What of x is orthogonal to an orthonormal basis, by two passes of Gram–Schmidt."""
    for _ in range(2):
        x = axpy(-1.0, trees.combine(trees.project(basis, x), basis), x)
    return x


def _scalar_like(a: chex.Numeric, x: chex.Array) -> chex.Array:
    return jnp.asarray(a, averages.average_dtype(x))


# --- Lanczos ----------------------------------------------------------------------------------


class Subspace(NamedTuple):
    """An orthonormal basis V of a Krylov space, and the matrix seen in it."""

    basis: chex.ArrayTree  # V, k rows; those after a breakdown are zero
    projected: chex.Array  # T = VᵀAV, symmetric (tridiagonal from Lanczos), shape (k, k)
    scale: chex.Array  # max |A vⱼ|, the size of the matrix on the space, shape ()


def lanczos(product: Product, start: chex.ArrayTree, count: int) -> Subspace:
    r"""An orthonormal basis of the Krylov space span{b, Ab, …, Aᵏ⁻¹b}, by Lanczos' method.

    Each new direction is orthogonalised against all before it, twice. The recursion ends when what
    is left is rounding (an invariant subspace): later rows of V and T are zero, Ritz values 0 with
    nothing along them.

    Args:
      product: v -> Av, symmetric.
      start: b, a tree with at least ``count`` numbers; not of length 1 necessarily. Zero gives an
        empty space.
      count: k ≥ 1, a Python integer; one product each.

    Examples:
      >>> space = lanczos(lambda v: jnp.array([1.0, 2.0, 3.0]) * v, jnp.ones(3), 3)
      >>> print(jnp.linalg.eigvalsh(space.projected).round(4))
      [1. 2. 3.]
    """
    dtype = averages.scalar_dtype()
    first, _ = unit(start)

    def body(i: chex.Array, carry: Any) -> Any:
        basis, projected, vector, size = carry
        basis = set_direction(basis, i, vector)
        image = product(vector)
        size = jnp.maximum(size, norm(image))
        projected = projected.at[i, i].set(dot(vector, image))
        rest = orthogonalize(image, basis)  # all of the recursion: α, β and what rounding left
        vector, length = unit(rest)
        goes_on = (length > _BREAKDOWN * epsilon() * size) & jnp.isfinite(length) & (i < count - 1)
        off = jnp.where(goes_on, length, 0.0)
        vector = where(goes_on, vector, zeros_like(vector))
        following = jnp.minimum(i + 1, count - 1)
        off_diagonal = jnp.where(i < count - 1, off, projected[i, following])
        projected = projected.at[i, following].set(off_diagonal)
        projected = projected.at[following, i].set(off_diagonal)
        return basis, projected, vector, size

    carry = (
        empty_basis(start, count),
        jnp.zeros((count, count), dtype),
        first,
        jnp.zeros((), dtype),
    )
    basis, projected, _, size = jax.lax.fori_loop(0, count, body, carry)
    return Subspace(basis, projected, size)


def extend(space: Subspace, product: Product, x: chex.ArrayTree) -> Subspace:
    """The space with one direction more, what of ``x`` is orthogonal to it; one product.

    Its row is zero if less than a thousandth of ``x`` is left. T gets a full row and column.
    """
    length = norm(x)
    rest, left = unit(orthogonalize(x, space.basis))
    is_new = left > _LOST * length
    rest = where(is_new, rest, zeros_like(rest))
    image = product(rest)
    basis = append(space.basis, rest)
    column = trees.project(basis, image)
    column = jnp.where(is_new, column, jnp.zeros_like(column))
    count = len(column)
    projected = jnp.zeros((count, count), column.dtype)
    projected = projected.at[:-1, :-1].set(space.projected)
    projected = projected.at[-1, :].set(column).at[:, -1].set(column)
    size = jnp.where(is_new, jnp.maximum(space.scale, norm(image)), space.scale)
    return Subspace(basis, projected, size)


def eigh(matrix: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Eigenvalues (ascending) and eigenvectors (columns) of the symmetric part of a matrix.

    A matrix that is not finite has eigenvalues NaN, without an error in the factorisation. Of a
    finite one whose entries differ by more than twelve powers of ten LAPACK may return NaN, too
    (in float32, as XLA calls it): what is so far below its error counts as 0.

    Args:
      matrix: shape (…, d, d).
    """
    finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
    safe = jnp.where(finite, matrix, jnp.zeros_like(matrix))
    safe = 0.5 * (safe + jnp.swapaxes(safe, -2, -1))
    largest = jnp.max(jnp.abs(safe), axis=(-2, -1), keepdims=True, initial=0.0)
    negligible = 0.01 * np.finfo(safe.dtype).eps * largest
    safe = jnp.where(jnp.abs(safe) > negligible, safe, 0.0)
    values, vectors = jnp.linalg.eigh(safe, symmetrize_input=False)
    return jnp.where(finite[..., 0], values, jnp.nan), vectors


# --- conjugate gradients ----------------------------------------------------------------------


class ConjugateGradients(NamedTuple):
    """Where `conjugate_gradients` ended."""

    solution: chex.ArrayTree  # x
    residual: chex.ArrayTree  # b − Ax
    iterations: chex.Array  # products spent, int32 ()
    negative_curvature: chex.Array  # a direction with pᵀAp ≤ 0 ended it, bool ()
    hit_boundary: chex.Array  # x lies on the boundary |x| = radius, bool ()


def conjugate_gradients(
    product: Product,
    b: chex.ArrayTree,
    max_iterations: int,
    tolerance: chex.Numeric,
    *,
    radius: chex.Numeric | None = None,
    start: chex.ArrayTree | None = None,
    preconditioner: Product | None = None,
) -> ConjugateGradients:
    r"""Solves Ax = b for a symmetric A, with an exit where A is not positive definite.

    The minimum of the model :math:`m(x) = \tfrac12 x^\top Ax - b^\top x` is sought within
    :math:`|x| \le` ``radius`` (Steihaug, "The conjugate gradient method and trust regions in large
    scale optimization", 1983). A direction p is one of negative curvature if
    :math:`p^\top Ap \le \varepsilon\,p^\top p\,\max_j |p_j^\top Ap_j|/p_j^\top p_j`. Then, with a
    radius, x goes to the boundary along p; without, the current x is returned, or p, which is b
    unless preconditioned, if there is none yet.

    Args:
      product: v -> Av.
      b: the right-hand side.
      max_iterations: products at most, a Python integer ≥ 1.
      tolerance: ends where |b − Ax| is no larger (an absolute length).
      radius: of the trust region; None is none.
      start: x₀ inside of the radius; costs one product more. Default: 0.
      preconditioner: r -> M⁻¹r, symmetric positive definite.

    Returns:
      A `ConjugateGradients`. From x₀ = 0 the model's decrease is
      :math:`-m(x) = \tfrac12(x^\top b + x^\top r)` without another product.

    Examples:
      >>> found = conjugate_gradients(lambda v: jnp.array([1.0, 4.0]) * v, jnp.ones(2), 5, 1e-6)
      >>> print(found.solution.round(5), found.iterations)
      [1.   0.25] 2
    """
    dtype = averages.scalar_dtype()
    eps = epsilon()
    precondition: Product = (lambda r: r) if preconditioner is None else preconditioner
    b = widened(b)
    x = zeros_like(b) if start is None else widened(start)
    r = b if start is None else axpy(-1.0, product(x), b)
    z = precondition(r)
    at_zero = jnp.asarray(True) if start is None else ~(dot(x, x) > 0)

    def running(carry: Any) -> Any:
        _, r, _, _, i, _, done, _, _ = carry
        return ~done & (i < max_iterations) & (norm(r) > tolerance)

    def body(carry: Any) -> Any:
        x, r, p, rz, i, largest, _, _, _ = carry
        image = product(p)
        pp, curvature = dot(p, p), dot(p, image)
        largest = jnp.maximum(largest, jnp.abs(curvature) / jnp.where(pp > 0, pp, 1.0))
        negative = ~(curvature > eps * pp * largest)  # NaN ends it too
        step = rz / jnp.where(negative, 1.0, curvature)
        outside = jnp.asarray(False)
        if radius is None:
            step = jnp.where(negative, jnp.where((i == 0) & at_zero, 1.0, 0.0), step)
        else:
            outside = negative | (norm(axpy(step, p, x)) >= radius)
            step = jnp.where(outside, _boundary_step(x, p, radius), step)
        ahead = axpy(step, p, x)
        r = axpy(-step, image, r)
        z = precondition(r)
        rz_new = dot(r, z)
        p = axpy(rz_new / jnp.where(rz > 0, rz, 1.0), p, z)
        return ahead, r, p, rz_new, i + 1, largest, negative | outside, negative, outside

    false = jnp.asarray(False)
    zero = jnp.zeros((), jnp.int32)
    carry = (x, r, z, dot(r, z), zero, jnp.zeros((), dtype), false, false, false)
    x, r, _, _, i, _, _, negative, outside = jax.lax.while_loop(running, body, carry)
    return ConjugateGradients(x, r, i, negative, outside)


def _boundary_step(x: chex.ArrayTree, p: chex.ArrayTree, radius: chex.Numeric) -> chex.Array:
    """τ ≥ 0 with |x + τp| = radius."""
    pp, xp, xx = dot(p, p), dot(x, p), dot(x, x)
    room = jnp.maximum(radius * radius - xx, 0.0)
    root = jnp.sqrt(xp * xp + pp * room)
    # The form without cancellation for each sign of ⟨x, p⟩.
    denominator = jnp.where(xp > 0, xp + root, pp)
    numerator = jnp.where(xp > 0, room, root - xp)
    return numerator / jnp.where(denominator > 0, denominator, 1.0)


# --- trust in the model -----------------------------------------------------------------------


def gain_ratio(
    before: chex.Array, after: chex.Array, predicted: chex.Array, rounding: float | None = None
) -> chex.Array:
    r"""ρ = (f₀ − f₁)/predicted: the decrease of the loss relative to that of its model.

    It is −1, the worst, where a number is not finite or the model predicts no decrease, and 1 where
    both decreases are within the roundings of f₀: there the loss says nothing about the model, and
    a damping that believed it would run away.

    Args:
      before: f₀, shape ().
      after: f₁.
      predicted: the decrease by the model.
      rounding: of the type in which the loss was computed; by default that of float32, or of
        float64 where it is enabled.

    Examples:
      >>> print(gain_ratio(jnp.array(3.0), jnp.array(2.0), jnp.array(2.0)))
      0.5
    """
    gained = before - after
    floor = 10.0 * (epsilon() if rounding is None else rounding) * jnp.abs(before)
    hidden = (jnp.abs(gained) <= floor) & (predicted <= floor) & (predicted >= 0)
    valid = jnp.isfinite(gained) & jnp.isfinite(predicted) & (predicted > 0)
    ratio = jnp.where(valid, gained / jnp.where(valid, predicted, 1.0), -1.0)
    return jnp.where(hidden, 1.0, ratio)

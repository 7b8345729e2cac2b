r"""What the methods with one parabola model for several directions share.

A *basis* of d orthonormal directions is stored as :math:`V = RS`: a tree S like the parameters with
a leading axis of d rows, and a small matrix R of shape (d, d). Whatever only mixes the d directions
(rotation to the eigenvectors of a Hessian, re-orthonormalisation) changes R alone and costs nothing
of the parameters' size. A new direction changes S by a matrix of rank one,
:math:`S \leftarrow S - c\,t^T`, in place.

A basis is moved within the space of its d directions and the residual r of a new gradient, in whose
orthonormal coordinates (V, r/‖r‖) the gradient is z = (Vg, ‖r‖). Of these d+1 dimensions one
direction x is dropped. The rotation that takes the axis of r to x takes V to an orthonormal basis
of the others, :math:`V_j - \frac{x_j}{1+x_r}t`, :math:`t = (1+x_r)\,r/\|r\| + \sum_j x_jV_j`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, leafwise, linalg, shards, trees

BASES = ("pca", "push")
_ORTHONORMALIZE_EVERY = 20  # steps
_EXACT = jax.lax.Precision.HIGHEST

LOW_PRECISION = (
    "basis, momentum and averages of coordinates: by state_dtype or low_precision_state; never "
    "positions, nor the matrices within the subspace"
)


class Basis(NamedTuple):
    """d orthonormal directions V = R·S."""

    rows: optax.Params  # S, like the parameters with a leading axis d, in at least float32
    rotation: chex.Array  # R, shape (d, d)
    energy: chex.Array  # E, average of V g gᵀ Vᵀ with decay 1−ρ (PCA; else 0), shape (d, d)
    filled: chex.Array  # number of directions found so far, int32, shape ()


class Residual(NamedTuple):
    """A gradient in the coordinates of a basis and of what the basis lacks."""

    inside: chex.Array  # Vg, shape (d,)
    projection: chex.Array  # y such that r = g − Σ yᵢSᵢ, shape (d,)
    norm: chex.Array  # ‖r‖, 0 where it is rounding, shape ()
    square: chex.Array  # ‖g‖², shape ()


class Change(NamedTuple):
    """A new basis V' = P(V − c tᵀ) of the same number of directions."""

    dropped: chex.Array  # x, unit vector with x_r ≥ 0, shape (d + 1,)
    mixing: chex.Array  # P, orthogonal, shape (d, d)
    energy: chex.Array  # new E, shape (d, d)
    filled: chex.Array  # new number of directions, int32, shape ()


def number_of_directions(params: optax.Params, d: int | None, default: int) -> int:
    """``d``, or the default as far as there are parameters (and 1 for none).

    Raises:
      ValueError: if an explicit ``d`` exceeds the number of parameters.
    """
    size = trees.size(params)
    if d is None:
        return max(1, min(default, size))
    if d > size > 0:
        raise ValueError(
            f"d = {d} is more than the {size} parameters; accepted: an integer in [1, {size}], "
            f"or None for min({default}, number of parameters)"
        )
    return d


def init_basis(params: optax.Params, d: int, dtype: Any | None = None) -> Basis:
    """No direction yet: the first d gradients fill it."""
    rows = linalg.empty_basis(params, d, dtype)
    scalar = averages.scalar_dtype()
    matrices = jnp.eye(d, dtype=scalar), jnp.zeros((d, d), scalar)
    return Basis(rows, *matrices, jnp.zeros((), jnp.int32))


def random_basis(params: optax.Params, d: int, dtype: Any | None = None, seed: int = 0) -> Basis:
    """The orthonormalised random directions from which ``push`` starts."""
    basis = init_basis(params, d, dtype)
    leaves, structure = jax.tree.leaves(basis.rows), jax.tree.structure(basis.rows)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))

    def draw(key: chex.PRNGKey, x: chex.Array) -> chex.Array:
        return x + jax.random.uniform(shards.key_of(key, x), x.shape, x.dtype, -1.0, 1.0)

    drawn = [draw(*pair) for pair in zip(keys, leaves, strict=False)]
    rows = jax.tree.unflatten(structure, drawn)
    basis = basis._replace(rows=rows, filled=jnp.asarray(d, jnp.int32))
    for _ in range(2 if trees.size(params) else 0):
        basis = basis._replace(rotation=orthonormal_rotation(basis)[0])
    return basis


def coordinates(basis: Basis, x: chex.ArrayTree) -> chex.Array:
    """Vx, shape (d,)."""
    return matmul(basis.rotation, trees.project(basis.rows, x))


def row_coordinates(basis: Basis, y: chex.Array) -> chex.Array:
    """The w with Σ wᵢSᵢ = Σ yᵢVᵢ, shape (d,)."""
    return matmul(basis.rotation.T, y)


def combine(weights: chex.Array, basis: Basis) -> optax.Params:
    """Σ wᵢSᵢ for each row of ``weights``, shape (k, d): a tree with a leading axis k.

    A product of matrices, which XLA does not fuse with what follows, so that S can be overwritten
    by what depends on the result.
    """

    def one(rows: chex.Array) -> chex.Array:
        return jnp.tensordot(weights.astype(rows.dtype), rows, axes=1, precision=_EXACT)

    return leafwise.tree_map(one, basis.rows)


def residual(
    basis: Basis, grads: optax.Updates, inside: chex.Array, square: chex.Array
) -> Residual:
    """What the basis lacks of a gradient, by Gram–Schmidt, twice.

    Args:
      basis: V.
      grads: g.
      inside: Vg.
      square: ‖g‖².
    """
    first = row_coordinates(basis, inside)
    rest = leafwise.tree_map(lambda g, x: trees.wide(g) - x[0], grads, combine(first[None], basis))
    # One reduction for all: what is stored in between is one leaf at a time.
    rows = [leafwise.tree_map(lambda x, i=i: x[i], basis.rows) for i in range(first.shape[0])]
    dots = trees.dots(*((row, rest) for row in rows), (rest, rest))
    again = matmul(basis.rotation, jnp.stack(dots[:-1]))
    left = jnp.maximum(dots[-1] - jnp.sum(again * again), 0.0)
    significant = left > (1e3 * np.finfo(np.float32).eps) ** 2 * square
    norm = jnp.where(significant, jnp.sqrt(left), 0.0)
    return Residual(inside + again, first + row_coordinates(basis, again), norm, square)


def follow_principal_components(basis: Basis, found: Residual, rate: chex.Numeric) -> Change:
    """Online PCA of the gradients: all but the last eigenvector of (1−ρ)·(E ⊕ 0) + ρ·z zᵀ.

    The first d independent gradients become directions as they come.
    """
    d = basis.energy.shape[0]
    # A vanished gradient says nothing, and one whose square overflows nothing that can be kept.
    has_square = (found.square > 0) & jnp.isfinite(found.square)
    found = jax.tree.map(lambda x: jnp.where(has_square, x, jnp.zeros_like(x)), found)
    rate = jnp.where(has_square, rate, 0.0)
    moments = _moments(basis, found, rate)
    scale = jnp.max(jnp.abs(moments))
    normal = moments / jnp.where(scale > 0, scale, 1.0)
    # The axis of a residual that is zero is no direction: it is what is dropped.
    normal = normal.at[d, d].add(jnp.where(found.norm > 0, 0.0, -1.0))
    least = linalg.eigh(normal)[1][:, 0]

    filling = basis.filled < d
    grown = filling & (found.norm > 0)
    slot = jax.nn.one_hot(jnp.where(grown, basis.filled, d), d + 1, dtype=least.dtype)
    dropped = jnp.where(filling, slot, least)
    dropped = dropped * sign(dropped[d])
    filled = basis.filled + grown.astype(jnp.int32)
    return _change(dropped, jnp.eye(d, dtype=least.dtype), moments, filled)


def _moments(basis: Basis, found: Residual, rate: chex.Numeric) -> chex.Array:
    """(1−ρ)·(E ⊕ 0) + ρ·z zᵀ, shape (d + 1, d + 1)."""
    z = jnp.append(found.inside, found.norm)
    return (1 - rate) * jnp.pad(basis.energy, (0, 1)) + rate * z[:, None] * z[None, :]


def _change(
    dropped: chex.Array, mixing: chex.Array, moments: chex.Array, filled: chex.Array
) -> Change:
    new = matmul(mixing, embedding(dropped).T)
    return Change(dropped, mixing, symmetric(matmul(new, moments, new.T)), filled)


def follow_gradient(basis: Basis, found: Residual, amount: chex.Numeric) -> Change:
    """The notebooks' rule, orth(V + Γg): the same small vector is added to every direction.

    orth is the Gram–Schmidt process from the first direction on.
    """
    d = basis.energy.shape[0]
    ones = jnp.ones(d, found.inside.dtype)
    amount = jnp.where(found.square > 0, amount, 0.0)
    # Orthogonal to all rows of (V + Γ1zᵀ): the direction that is lost.
    normal = jnp.append(-amount * found.norm * ones, 1 + amount * jnp.sum(found.inside))
    normal = normal / jnp.max(jnp.abs(normal))
    dropped = normal / jnp.sqrt(jnp.sum(normal * normal))
    dropped = dropped * sign(dropped[d])
    pushed = jnp.eye(d, d + 1, dtype=ones.dtype)
    pushed += amount * ones[:, None] * jnp.append(found.inside, found.norm)[None, :]
    # Gram–Schmidt of the rows is the QR factorisation of the transpose, with a positive diagonal.
    q, r = jnp.linalg.qr(matmul(pushed, embedding(dropped)).T)
    mixing = (q * sign(jnp.diagonal(r))).T
    return _change(dropped, mixing, jnp.pad(basis.energy, (0, 1)), basis.filled)


def follow(kind: str, basis: Basis, found: Residual, rate: chex.Numeric) -> Change:
    """The change of basis by either rule; ``rate`` is ρ or Γ."""
    if kind == "pca":
        return follow_principal_components(basis, found, rate)
    return follow_gradient(basis, found, rate)


def overlap(change: Change) -> chex.Array:
    """Mean squared overlap of the new basis with the former one, ‖V'Vᵀ‖²/d in [0, 1]."""
    inner = transport(change)[:, :-1]
    return jnp.sum(inner * inner) / inner.shape[0]


def energy_fraction(inside: chex.Array, square: chex.Array, otherwise: chex.Array) -> chex.Array:
    """‖Vg‖²/‖g‖², or what it was if the gradient vanishes."""
    fraction = jnp.sum(inside * inside) / jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, jnp.minimum(fraction, 1.0), otherwise)


def along_residual(
    found: Residual, grads: optax.Updates, x: chex.ArrayTree, basis: Basis
) -> chex.Array:
    """⟨r, x⟩/‖r‖, shape ()."""
    product = linalg.dot(grads, x) - jnp.sum(found.projection * trees.project(basis.rows, x))
    return jnp.where(found.norm > 0, product / jnp.where(found.norm > 0, found.norm, 1.0), 0.0)


def embedding(dropped: chex.Array) -> chex.Array:
    """The rows of V − c tᵀ as columns, in coordinates (V, r/‖r‖); shape (d + 1, d)."""
    c, t = _rank_one(dropped)
    return jnp.eye(t.shape[0], c.shape[0], dtype=t.dtype) - t[:, None] * c[None, :]


def transport(change: Change) -> chex.Array:
    """The new basis in the coordinates (V, r/‖r‖), shape (d, d + 1)."""
    return matmul(change.mixing, embedding(change.dropped).T)


def _rank_one(dropped: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Amounts c and coordinates of t, of the rotation that takes the axis of r to ``dropped``."""
    c = dropped[:-1] / (1 + dropped[-1])
    return c, dropped.at[-1].add(1.0)


class RankOne(NamedTuple):
    """The change of the rows, S ← S − c tᵀ with t = a·g + Σ wᵢSᵢ."""

    amounts: chex.Array  # c, shape (d,)
    along_gradient: chex.Array  # a, shape ()
    along_rows: chex.Array  # w, shape (d,)


def rank_one(basis: Basis, found: Residual, change: Change) -> RankOne:
    """What a change of basis does to the rows."""
    c, t = _rank_one(change.dropped)
    valid = found.norm > 0
    along_gradient = jnp.where(valid, t[-1] / jnp.where(valid, found.norm, 1), 0.0)
    along_rows = row_coordinates(basis, t[:-1]) - along_gradient * found.projection
    return RankOne(jnp.linalg.solve(basis.rotation, c), along_gradient, along_rows)


def apply_change(
    basis: Basis, grads: optax.Updates, change: Change, update: RankOne, along_rows: optax.Params
) -> Basis:
    """The new basis: S ← S − c tᵀ in place, R ← PR; ``along_rows`` is Σ wᵢSᵢ."""

    def one(rows: chex.Array, g: chex.Array, x: chex.Array) -> chex.Array:
        vector = update.along_gradient.astype(rows.dtype) * g.astype(rows.dtype) + x
        amounts = update.amounts.astype(rows.dtype).reshape(-1, *[1] * g.ndim)
        return rows - amounts * vector[None]

    rows = leafwise.tree_map(one, basis.rows, grads, along_rows)
    rotation = matmul(change.mixing, basis.rotation)
    return Basis(rows, rotation, change.energy, change.filled)


def move(
    basis: Basis, grads: optax.Updates, found: Residual, change: Change, *weights: chex.Array
) -> tuple[Basis, list[optax.Params]]:
    """The new basis, and Σ wᵢSᵢ of the former rows for each w of ``weights``, shape (d,).

    All sums over rows are one product, so that S is read once and then overwritten.
    """
    update = rank_one(basis, found, change)
    *vectors, along_rows = _each(combine(jnp.stack([*weights, update.along_rows]), basis))
    return apply_change(basis, grads, change, update, along_rows), vectors


def combine_one(weights: chex.Array, basis: Basis) -> optax.Params:
    """Σ wᵢSᵢ, a tree like the parameters."""
    return leafwise.tree_map(lambda x: x[0], combine(weights[None], basis))


def _each(tree: optax.Params) -> list[optax.Params]:
    """The slices of a tree along its leading axis."""
    leaves = jax.tree.leaves(tree)
    return [leafwise.tree_map(lambda x, i=i: x[i], tree) for i in range(leaves[0].shape[0])]


def after(steps: optax.Updates, basis: Basis) -> optax.Updates:
    """``steps``, ordered after the rows: what is stored in between is one leaf at a time."""
    return leafwise.tree_map(lambda x, rows: trees.ordered_after(x, rows[0]), steps, basis.rows)


def rotate(basis: Basis, rotation: chex.Array) -> Basis:
    """The basis whose directions are the rows of ``rotation`` in coordinates of this one."""
    return basis._replace(
        rotation=matmul(rotation, basis.rotation),
        energy=symmetric(matmul(rotation, basis.energy, rotation.T)),
    )


def gram(basis: Basis) -> chex.Array:
    """V Vᵀ, shape (d, d); the identity up to rounding, with zeros for directions not yet found."""
    inner = linalg.gram(basis.rows, basis.rows)
    return matmul(basis.rotation, inner, basis.rotation.T)


def orthonormal_rotation(basis: Basis) -> tuple[chex.Array, chex.Array]:
    """Cholesky-QR: the R that makes V orthonormal, L⁻¹R with LLᵀ = VVᵀ, and the former error.

    Returns:
      R, shape (d, d), and the largest entry of |VVᵀ − 1| before, shape ().
    """
    products = gram(basis)
    d = products.shape[0]
    known = jnp.arange(d) < basis.filled
    identity = jnp.eye(d, dtype=products.dtype)
    products = jnp.where(known[:, None] & known[None, :], products, identity)
    factor = jnp.linalg.cholesky(products)
    solved = jax.scipy.linalg.solve_triangular(factor, basis.rotation, lower=True)
    usable = jnp.all(jnp.isfinite(solved))  # a basis that lost its rank is left as it is
    rotation = jnp.where(usable, solved, basis.rotation).astype(basis.rotation.dtype)
    return rotation, jnp.max(jnp.abs(products - identity)).astype(basis.rotation.dtype)


def maintained(basis: Basis, error: chex.Array, count: chex.Array) -> tuple[Basis, chex.Array]:
    """The basis, re-orthonormalised when due, and how far it last was from orthonormal."""
    rotation, error = jax.lax.cond(
        count % _ORTHONORMALIZE_EVERY == 0,
        lambda: orthonormal_rotation(basis),
        lambda: (basis.rotation, error),
    )
    return basis._replace(rotation=rotation), error


def matmul(*factors: chex.Array) -> chex.Array:
    """The product of small matrices and vectors, in full precision."""
    product = factors[-1]
    for factor in factors[-2::-1]:
        product = jnp.matmul(factor, product, precision=_EXACT)
    return product


def symmetric(matrix: chex.Array) -> chex.Array:
    """The symmetric part, which `jnp.linalg.eigh` relies on."""
    return (matrix + matrix.T) / 2


def sign(x: chex.Array) -> chex.Array:
    """±1, never 0."""
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)

"""The loss on a Krylov space: what the methods that descend in a small subspace share."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import linalg, oracles, trees


class Model(NamedTuple):
    """Curvatures and gradient of the loss on a subspace, along the curvatures' own directions."""

    basis: chex.ArrayTree  # V, orthonormal rows; those that are not used are zero
    curvatures: chex.Array  # Λ, Ritz values, ascending, shape (rows,); 0 for each unused row
    axes: chex.Array  # Q, VᵀHV = QΛQᵀ, shape (rows, rows)

    @property
    def size(self) -> chex.Array:
        """The largest curvature's size, shape ()."""
        return jnp.max(jnp.abs(self.curvatures))

    def coordinates(self, x: chex.ArrayTree) -> chex.Array:
        """QᵀVᵀx, shape (rows,)."""
        return _matmul(self.axes.T, trees.project(self.basis, x))

    def vector(self, coordinates: chex.Array) -> chex.ArrayTree:
        """VQy, a tree like the parameters in at least float32."""
        return trees.combine(_matmul(self.axes, coordinates), self.basis)


def model(
    product: linalg.Product, start: chex.ArrayTree, rows: int, previous: chex.ArrayTree | None
) -> Model:
    """The space that ``rows`` products with a matrix span, and the previous step if there is one.

    Args:
      product: v -> Av.
      start: the first direction, of any length.
      rows: number of Lanczos' vectors, no more than the start has entries.
      previous: one more direction (and product), where it is not in the space already.
    """
    space = linalg.lanczos(product, start, rows)
    if previous is not None:
        space = linalg.extend(space, product, previous)
    curvatures, axes = linalg.eigh(space.projected)
    return Model(space.basis, curvatures, axes)


def rows_of(k: int, params: optax.Params) -> int:
    """k, or as many as there are parameters."""
    return min(k, trees.size(params))


def cost_of(rows: int, use_previous: bool, product_cost: float) -> float:
    """Of the incoming gradient and the products of `model`, in gradient equivalents."""
    return 1.0 + (rows + use_previous) * product_cost


def first_previous(params: optax.Params, use_previous: bool) -> chex.ArrayTree | None:
    """The field ``previous`` of a state before the first step, None if it is not used."""
    return linalg.zeros_like(params) if use_previous else None


def next_previous(
    accepted: chex.Array, updates: optax.Updates, previous: chex.ArrayTree | None
) -> chex.ArrayTree | None:
    """The step that was taken, else the one before."""
    if previous is None:
        return None
    return linalg.where(accepted, linalg.widened(updates), previous)


def ends(model: Model, last: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
    """Smallest and largest Ritz value; those of the last step where they are not numbers."""
    found = (model.curvatures[0], model.curvatures[-1])
    finite = jnp.isfinite(found[0])
    least, most = (jnp.where(finite, x, y) for x, y in zip(found, last, strict=True))
    return least, most


def product_cost(hvp: str, curvature: str = "hessian") -> float:
    """Of one product."""
    if curvature == "ggn":
        return oracles.GAUSS_NEWTON_PRODUCT_COST
    return oracles.HESSIAN_PRODUCT_COST[hvp]


def _matmul(matrix: chex.Array, vector: chex.Array) -> chex.Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)

"""Newton's equation (B + λI)d = b, posed and solved by conjugate gradients."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles

CURVATURES = ("hessian", "ggn")
GGN_ARGS = "optgrad.curvature_args(loss_fn, outputs=..., out_loss=...)"


class Step(NamedTuple):
    """An approximate solution of (B + λI)d = b."""

    direction: chex.ArrayTree  # d
    predicted: chex.Array  # bᵀd − ½dᵀBd, the decrease of the model without its damping, shape ()
    iterations: chex.Array  # products spent on conjugate gradients, int32, shape ()
    negative_curvature: chex.Array  # they ended at a direction of negative curvature, bool ()
    hit_boundary: chex.Array  # d has the length of the radius, bool, shape ()


def solve(
    product: linalg.Product,
    b: chex.ArrayTree,
    damping: chex.Numeric,
    tolerance: chex.Numeric,
    maxiter: int,
    *,
    radius: chex.Numeric | None = None,
    start: chex.ArrayTree | None = None,
    weights: chex.ArrayTree | None = None,
) -> Step:
    """Solves (B + λW)d = b by conjugate gradients.

    Args:
      product: v -> Bv.
      b: the right-hand side.
      damping: λ ≥ 0.
      tolerance: ends where the residual is no longer (an absolute length).
      maxiter: most products.
      radius: of a trust region.
      start: where to begin.
      weights: the diagonal W > 0, a tree like b, which preconditions too; None is the identity.

    Returns:
      A `Step`, NaN where a product is not finite.
    """

    def weighted(v: Any) -> Any:
        return v if weights is None else jax.tree.map(jnp.multiply, weights, v)

    def divided(v: Any) -> Any:
        return jax.tree.map(jnp.divide, v, weights)

    b = linalg.widened(b)
    found = linalg.conjugate_gradients(
        lambda v: linalg.axpy(damping, weighted(v), product(v)),
        b,
        maxiter,
        tolerance,
        radius=radius,
        start=start,
        preconditioner=None if weights is None else divided,
    )
    d = found.solution
    damped = 0.5 * (linalg.dot(d, b) + linalg.dot(d, found.residual))
    predicted = damped + 0.5 * damping * linalg.dot(d, weighted(d))
    # A product that is not finite ends the iterations as negative curvature does, and a right-hand
    # side whose square overflows ends them before the first: neither is a solution.
    posed = jnp.isfinite(predicted) & jnp.isfinite(linalg.norm(b))
    d = linalg.where(posed, d, linalg.scale(jnp.nan, d))
    return Step(d, predicted, found.iterations, found.negative_curvature, found.hit_boundary)


@dataclasses.dataclass(frozen=True)
class Solver:
    """How Newton's equation is posed and solved; the arguments of the public factories."""

    maxiter: int
    curvature: str = "hessian"
    hvp: str = "exact"
    forcing: str | float = "sqrt"
    warm: float = 0.0

    def __post_init__(self) -> None:
        checks.check_count("maxiter", self.maxiter, 1)
        checks.check_one_of("curvature", self.curvature, CURVATURES)
        checks.check_one_of("hvp", self.hvp, oracles.HESSIAN_PRODUCT_COST)
        if isinstance(self.forcing, str):
            checks.check_one_of("forcing", self.forcing, ("sqrt",))
        else:
            checks.check_in_range("forcing", self.forcing, 0.0, 1.0, high_open=True)
        checks.check_in_range("warm", self.warm, 0.0, 1.0)

    @property
    def product_cost(self) -> float:
        """Gradient equivalents of one product."""
        if self.curvature == "ggn":
            return oracles.GAUSS_NEWTON_PRODUCT_COST
        return oracles.HESSIAN_PRODUCT_COST[self.hvp]

    def cost(self, iterations: chex.Array) -> chex.Array:
        """Gradient equivalents of a solution."""
        return self.product_cost * (iterations + (1.0 if self.warm else 0.0))

    def product(
        self, params: optax.Params, value_fn: Any, outputs_fn: Any, out_loss_fn: Any
    ) -> linalg.Product:
        """The product v -> Bv at these parameters; refuses a missing function by its name."""
        if self.curvature == "hessian":
            value_fn = oracles.require_function("value_fn", value_fn)
            return oracles.hessian_product(value_fn, params, self.hvp)
        outputs_fn = oracles.require_function("outputs_fn", outputs_fn, GGN_ARGS)
        out_loss_fn = oracles.require_function("out_loss_fn", out_loss_fn, GGN_ARGS)
        return oracles.gauss_newton_product(outputs_fn, out_loss_fn, params)

    def tolerance(self, b: chex.ArrayTree) -> chex.Array:
        """Length of the residual at which conjugate gradients end."""
        length = linalg.norm(b)
        if isinstance(self.forcing, str):
            return jnp.minimum(0.5, jnp.sqrt(length)) * length
        return self.forcing * length

    def remembered(self, tree: chex.ArrayTree) -> Any:
        """What of a step the next one begins with; nothing unless it is a warm start."""
        return linalg.widened(tree) if self.warm else ()

    def solve(
        self,
        product: linalg.Product,
        b: chex.ArrayTree,
        damping: chex.Numeric,
        previous: Any,
        radius: chex.Numeric | None = None,
    ) -> Step:
        """Solves (B + λI)d = b, from a multiple of the previous solution if it is remembered."""
        start = None
        if self.warm:
            share = jnp.asarray(self.warm, linalg.norm(previous).dtype)
            if radius is not None:  # inside of the region
                length = self.warm * linalg.norm(previous)
                share *= jnp.minimum(1.0, 0.9 * radius / jnp.where(length > 0, length, 1.0))
            start = linalg.scale(share, previous)
        return solve(
            product, b, damping, self.tolerance(b), self.maxiter, radius=radius, start=start
        )

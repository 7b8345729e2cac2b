"""Steps of linearised least-squares problems: what Gauss–Newton and Levenberg–Marquardt share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, linalg, oracles, shards, transforms, trees
from optgrad.curvature import newton_equation, trial

SOLVERS = ("cg", "dense")
SCALINGS = ("identity", "marquardt")
RESIDUAL_ARGS = "optgrad.curvature_args(loss_fn, residual=...)"

_AT_ONCE = 64  # columns or rows of a Jacobian computed together


class LinearModel(NamedTuple):
    """The residuals at some parameters, and their Jacobian J as two functions."""

    residual: Any  # r, any tree
    push: Callable[[Any], Any]  # v -> Jv, of a tree like the parameters in at least float32
    pull: Callable[[Any], Any]  # w -> Jᵀw, in at least float32

    @property
    def value(self) -> chex.Array:
        """Σr², shape ()."""
        return linalg.dot(self.residual, self.residual)


def linearize(residual_fn: Callable[[Any], Any], params: optax.Params) -> LinearModel:
    """The linear model at ``params``; residuals are computed once for all products."""
    residual, push = jax.linearize(residual_fn, params)
    pull = jax.linear_transpose(push, params)
    return LinearModel(
        residual,
        lambda v: linalg.widened(push(transforms.cast_like(v, params))),
        lambda w: linalg.widened(pull(transforms.cast_like(w, residual))[0]),
    )


@dataclasses.dataclass(frozen=True)
class Solver:
    """How (2s·JᵀJ + λD)d = b is solved; the arguments of the public factories."""

    solver: str
    scaling: str
    maxiter: int
    tolerance: Any
    residual_scale: Any
    max_size: int

    def __post_init__(self) -> None:
        checks.check_one_of("solver", self.solver, SOLVERS)
        checks.check_one_of("scaling", self.scaling, SCALINGS)
        checks.check_count("maxiter", self.maxiter, 1)
        checks.check_count("max_size", self.max_size, 1)
        checks.check_in_range("tolerance", self.tolerance, 0.0, 1.0, high_open=True)
        checks.check_in_range(
            "residual_scale", self.residual_scale, 0.0, low_open=True, high_open=True
        )

    def check_size(self, params: optax.Params) -> None:
        """Raises ``ValueError`` for too many parameters of a dense solution."""
        size = trees.size(params)
        if self.solver == "dense" and size > self.max_size:
            raise ValueError(
                f"params has {size} entries; accepted with solver = 'dense': at most max_size = "
                f"{self.max_size}, since matrices of {size} columns are factorised "
                "(solver = 'cg' has no such limit)"
            )

    def scale(self, count: chex.Array) -> chex.Array:
        """The factor s of the loss s·Σr²."""
        return trial.scalar(transforms.hyperparameter_at(self.residual_scale, count))

    def solve(
        self, model: LinearModel, b: chex.ArrayTree, damping: chex.Array, count: chex.Array
    ) -> tuple[newton_equation.Step, chex.Array]:
        """Solves (2s·JᵀJ + λD)d = b; also what it costs, in gradient equivalents."""
        b = linalg.widened(b)
        twice = 2.0 * self.scale(count)
        if self.solver == "dense":
            step = _solve_dense(model, b, twice, damping, self.scaling)
            return step, trial.scalar(float(trees.size(b)))
        weights, cost = None, 0.0
        if self.scaling == "marquardt":
            diagonal, cost = _jacobian_squares(model, b)
            weights = _floored(linalg.scale(twice, diagonal))
        tolerance = transforms.hyperparameter_at(self.tolerance, count) * linalg.norm(b)
        step = newton_equation.solve(
            lambda v: linalg.scale(twice, model.pull(model.push(v))),
            b,
            damping,
            tolerance,
            self.maxiter,
            weights=weights,
        )
        return step, cost + oracles.GAUSS_NEWTON_PRODUCT_COST * step.iterations


def _jacobian_squares(model: LinearModel, like: Any) -> tuple[chex.ArrayTree, float]:
    """The diagonal of JᵀJ, from one row of J after the other, and how many there are."""
    shards.require_whole(model.residual, "the diagonal of JᵀJ, one row of J after the other,")
    flat, unravel = trees.ravel(model.residual)

    def add(total: chex.ArrayTree, i: chex.Array) -> tuple[chex.ArrayTree, None]:
        row = model.pull(unravel((jnp.arange(flat.size) == i).astype(flat.dtype)))
        return jax.tree.map(lambda t, x: t + x * x, total, row), None

    rows = jnp.arange(flat.size)
    return jax.lax.scan(add, linalg.zeros_like(like), rows)[0], float(flat.size)


def _floored(diagonal: chex.ArrayTree) -> chex.ArrayTree:
    """Entries that are zero, or nothing beside the largest one, raised to a rounding of it."""
    leaves = [jnp.max(x, initial=0.0) for x in jax.tree.leaves(diagonal)]
    largest = jnp.max(jnp.stack(shards.maxima(leaves))).astype(averages.scalar_dtype())
    floor = jnp.where(largest > 0, linalg.epsilon() * largest, 1.0)
    return jax.tree.map(lambda x: jnp.maximum(x, floor.astype(x.dtype)), diagonal)


def _solve_dense(
    model: LinearModel, b: chex.ArrayTree, twice: chex.Array, damping: chex.Array, scaling: str
) -> newton_equation.Step:
    """By the factor R of A = [√(2s)·J; √λ·D^½], AᵀA = RᵀR, whose condition is not squared.

    One step of refinement with A itself makes up for what is lost by solving for AᵀA (the
    corrected seminormal equations). NaN where A is singular to working precision.
    """
    right, unravel = trees.ravel(b)

    def column(unit: chex.Array) -> chex.Array:
        return trees.ravel(model.push(unravel(unit)))[0].astype(right.dtype)

    size = right.size
    columns = jax.lax.map(column, jnp.eye(size, dtype=right.dtype), batch_size=_AT_ONCE)
    jacobian = jnp.sqrt(twice).astype(right.dtype) * columns.T
    weights = jnp.ones_like(right)
    if scaling == "marquardt":
        weights = _floored(jnp.sum(jacobian**2, axis=0))
    shift = damping.astype(right.dtype)
    matrix = jnp.concatenate([jacobian, jnp.diag(jnp.sqrt(shift * weights))])
    finite = jnp.all(jnp.isfinite(matrix))
    factor = jnp.linalg.qr(jnp.where(finite, matrix, 0.0), mode="r")
    pivots = jnp.abs(jnp.diagonal(factor))
    eps = np.finfo(right.dtype).eps
    regular = finite & (jnp.min(pivots) > size * eps * jnp.max(pivots))
    safe = jnp.where(regular, factor, jnp.eye(size, dtype=right.dtype))

    def solved(y: chex.Array) -> chex.Array:
        half = jax.scipy.linalg.solve_triangular(safe, y, trans=1)
        return jax.scipy.linalg.solve_triangular(safe, half)

    def dot(x: chex.Array, y: chex.Array) -> chex.Array:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    d = solved(right)
    d += solved(right - dot(matrix.T, dot(matrix, d)))
    d = jnp.where(regular, d, jnp.nan)
    along = dot(jacobian, d)
    predicted = (dot(right, d) - 0.5 * dot(along, along)).astype(averages.scalar_dtype())
    false = jnp.asarray(False)
    return newton_equation.Step(unravel(d), predicted, trial.zero_count(), false, false)

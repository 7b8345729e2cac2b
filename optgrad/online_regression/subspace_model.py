"""Statistics of positions and gradients in a subspace, and the steps that follow from them."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, leafwise, linalg, trees
from optgrad.online_regression import parabola, subspace

STEPS = ("regression", "momentum", "last_point")


class Model(NamedTuple):
    """Statistics of positions and gradients in the directions of a basis."""

    paraboloid: parabola.Paraboloid  # positions are relative to the current parameters
    gradient_covariance: chex.Array | None  # C_gg, shape (d, d), with correlation_one


class Coordinates(NamedTuple):
    """What a step is made of, each of shape (d,)."""

    gradient: chex.Array  # Vg
    momentum: chex.Array  # V·momentum


def init_model(d: int, correlation_one: bool, prior: float = 0.0) -> Model:
    """The statistics before the first sample; ``prior`` times 1 for covariances of one kind."""
    empty = parabola.init_paraboloid(d)
    start = prior * jnp.eye(d, dtype=empty.covariance.dtype)
    model = empty._replace(position_covariance=start)
    return Model(model, jnp.copy(start) if correlation_one else None)


def sample(
    model: Model, displacement: chex.Array, gradient: chex.Array, weights: averages.SampleWeights
) -> Model:
    """The statistics after one more gradient.

    Args:
      model: statistics, relative to the former parameters.
      displacement: by how much the parameters moved since then, shape (d,).
      gradient: Vg.
      weights: of the new sample.
    """
    moved = moved_along(model, displacement).paraboloid
    here = jnp.zeros_like(displacement)
    new = parabola.update_paraboloid(moved, here, gradient, weights)
    second = model.gradient_covariance
    if second is not None:
        second = parabola.update_gradient_covariance(second, gradient, new.mean_gradient, weights)
    return Model(new, second)


def sample_deviations(
    model: Model,
    gradient: chex.Array,
    deviations: tuple[chex.Array, chex.Array],
    weights: averages.SampleWeights,
    *,
    notebook: bool,
) -> Model:
    """The same with means that are kept elsewhere, for all parameters, and projected.

    Args:
      model: statistics so far; its means are replaced.
      gradient: Vg.
      deviations: V(θ − m) and V(g − n), each of shape (d,): from the new means; or from those
        before the sample for the form of the notebooks.
      weights: of the new sample.
      notebook: whether the covariances become (1−κ)C + κ·d dᵀ with old means, which is the exact
        one times a constant, but for its initial value.
    """
    old, new = weights.old, weights.new if notebook else weights.deviation

    def pair(c: chex.Array, x: chex.Array, y: chex.Array) -> chex.Array:
        return old * c + new * x[:, None] * y[None, :]

    d, e = deviations
    second = model.gradient_covariance
    remaining = old if notebook else 1.0
    moments = parabola.Paraboloid(
        mean_position=-remaining * d,
        mean_gradient=gradient - remaining * e,
        position_covariance=pair(model.paraboloid.position_covariance, d, d),
        covariance=pair(model.paraboloid.covariance, e, d),
    )
    return Model(moments, None if second is None else pair(second, e, e))


def transport_model(model: Model, change: chex.Array, residual_mean: chex.Numeric = 0.0) -> Model:
    """The statistics in other directions.

    Args:
      model: statistics along V.
      change: the new directions in coordinates V, shape (d, d), or (V, r/‖r‖), shape (d, d + 1).
      residual_mean: mean gradient along r/‖r‖.
    """
    d = change.shape[0]
    inner = change[:, :d]

    def congruent(x: chex.Array) -> chex.Array:
        return subspace.matmul(inner, x, inner.T)

    old, second = model
    n = jnp.append(old.mean_gradient, residual_mean) if change.shape[1] > d else old.mean_gradient
    new = parabola.Paraboloid(
        mean_position=subspace.matmul(inner, old.mean_position),
        mean_gradient=subspace.matmul(change, n),
        position_covariance=subspace.symmetric(congruent(old.position_covariance)),
        covariance=congruent(old.covariance),
    )
    return Model(new, None if second is None else subspace.symmetric(congruent(second)))


def model_hessian(model: Model, ridge: chex.Numeric) -> chex.Array:
    """The full symmetric H, shape (d, d): least squares, or the geometric mean."""
    moments, second = model
    estimator = "symmetric_least_squares" if second is None else "geometric_mean"
    hessian = parabola.hessian(
        moments.position_covariance, moments.covariance, second, estimator=estimator, ridge=ridge
    )
    return subspace.symmetric(hessian)


def diagonal_curvatures(model: Model, ridge: chex.Numeric) -> chex.Array:
    """λ_i = B_ii/C_ii, or σg/σθ, along each direction, shape (d,)."""
    moments, second = model
    variances = jnp.diagonal(moments.position_covariance)
    variances = variances + ridge * jnp.mean(variances)
    if second is not None:
        # What rounding, in turning with the basis, left below 0 counts as 0.
        return jnp.sqrt(_divide(jnp.maximum(jnp.diagonal(second), 0.0), variances))
    return _divide(jnp.diagonal(moments.covariance), variances)


def principal_axes(model: Model, filled: chex.Array, ridge: chex.Numeric) -> chex.Array:
    """Eigenvectors of H as rows; directions that are not found yet keep their place, at the end."""
    hessian = model_hessian(model, ridge)
    missing = jnp.arange(hessian.shape[0]) >= filled
    largest = jnp.max(jnp.abs(hessian))
    beyond = 4 * hessian.shape[0] * jnp.where(largest > 0, largest, 1.0)
    vectors = linalg.eigh(hessian + jnp.diag(jnp.where(missing, beyond, 0.0)))[1]
    return vectors.T


def step_inside(
    model: Model, at: Coordinates, *, full: bool, ridge: chex.Numeric, **options: Any
) -> tuple[chex.Array, chex.Array]:
    """The step in coordinates V and the curvatures that it used, each of shape (d,).

    Args:
      model: statistics along V.
      at: gradient and momentum along V.
      full: whether H is estimated with its off-diagonal entries, or λ_i along each direction.
      ridge: added to the positions' variances, relative to their mean.
      **options: of `modelled_step`.
    """
    if not full:
        curvatures = diagonal_curvatures(model, ridge)
        return modelled_step(model, at, curvatures, **options), curvatures
    curvatures, vectors = linalg.eigh(model_hessian(model, ridge))
    axes = vectors.T
    turned = Coordinates(*(subspace.matmul(axes, x) for x in at))
    y = modelled_step(transport_model(model, axes), turned, curvatures, **options)
    return subspace.matmul(vectors, y), curvatures


def modelled_step(
    model: Model,
    at: Coordinates,
    curvatures: chex.Array,
    *,
    rule: str,
    alpha: chex.Numeric,
    lr_max: chex.Numeric,
    epsilon: chex.Numeric | None,
) -> chex.Array:
    """Step along each direction, entry by entry, shape (d,).

    Args:
      model: statistics along directions in which the Hessian counts as diagonal.
      at: gradient and momentum along them.
      curvatures: λ.
      rule: one of `STEPS`.
      alpha: confidence α.
      lr_max: largest step size.
      epsilon: largest step before α, or None.
    """
    # min(α/|λ|, lr_max)/α, and finite for α = 0 too, where a schedule may end.
    bounded = jnp.maximum(jnp.abs(curvatures), _smallest(curvatures.dtype))
    rates = 1 / jnp.maximum(bounded, jnp.asarray(alpha / lr_max, curvatures.dtype))
    if rule == "regression":
        moments = model.paraboloid
        centre = subspace.sign(curvatures) * moments.mean_position
        whole = centre - rates * moments.mean_gradient
    else:
        whole = -rates * (at.momentum if rule == "momentum" else at.gradient)
    return alpha * (whole if epsilon is None else jnp.clip(whole, -epsilon, epsilon))


def _divide(x: chex.Array, y: chex.Array) -> chex.Array:
    """x/y, and 0 where y is 0 or subnormal."""
    valid = y >= np.finfo(y.dtype).tiny
    return jnp.where(valid, x / jnp.where(valid, y, 1.0), 0.0)


def _smallest(dtype: Any) -> Any:
    """The smallest curvature over which α does not overflow."""
    return np.finfo(dtype).tiny * 1e3


def step_sizes(curvatures: chex.Array, alpha: chex.Numeric, lr_max: chex.Numeric) -> chex.Array:
    """min(α/|λ|, lr_max), entry by entry: the notebooks' 1/max(div·|λ|, cut)."""
    bounded = jnp.maximum(jnp.abs(curvatures), _smallest(curvatures.dtype))
    rates = jnp.asarray(alpha, curvatures.dtype) / bounded
    return jnp.minimum(rates, jnp.asarray(lr_max, curvatures.dtype))


class Position(NamedTuple):
    """What tells how the parameters moved since the last step; what is not needed is None.

    With "trusted" positions that is nothing: the model moves along with the update.
    """

    previous: optax.Params | None  # "measured": parameters of the last step
    mean_position: optax.Params | None  # paper: the notebooks' means, like the parameters
    mean_gradient: optax.Updates | None


def init_position(params: optax.Params, form: str, dtype: Any | None) -> Position:
    """The position before the first step; ``form`` is "measured", "trusted" or "means"."""
    if form == "measured":
        copy = lambda p: jnp.array(p, averages.average_dtype(p), copy=True)  # noqa: E731
        return Position(jax.tree.map(copy, params), None, None)
    if form == "trusted":
        return Position(None, None, None)
    zeros = [averages.zeros_like_average(params, dtype) for _ in range(2)]
    return Position(None, *zeros)


def displacement(basis: subspace.Basis, position: Position, params: optax.Params) -> chex.Array:
    """V(θ − θ_previous), shape (d,); 0 where the model was moved along with the last update."""
    if position.previous is None:
        return jnp.zeros(basis.rotation.shape[0], basis.rotation.dtype)
    moved = leafwise.tree_map(lambda p, q: trees.wide(p) - q, params, position.previous)
    return subspace.coordinates(basis, moved)


def moved_along(model: Model, displacement: chex.Array) -> Model:
    """The statistics relative to parameters that moved by ``displacement``, shape (d,)."""
    old = model.paraboloid
    moved = old._replace(mean_position=old.mean_position - displacement)
    return model._replace(paraboloid=moved)


def next_position(position: Position, params: optax.Params, moved: chex.Array) -> Position:
    """The position to measure the next displacement from, after ``moved`` was measured."""
    if position.previous is None:
        return position
    # A measurement that is NaN changes nothing; so the result depends on the measurement, and XLA
    # may overwrite in place what was measured.
    valid = ~jnp.isnan(jnp.sum(moved))
    keep = lambda p, q: jnp.where(valid, p.astype(q.dtype), q)  # noqa: E731
    return position._replace(previous=leafwise.tree_map(keep, params, position.previous))


def sample_with_means(
    basis: subspace.Basis,
    model: Model,
    means: tuple[optax.Params, optax.Updates],
    point: tuple[optax.Params, optax.Updates],
    weights: averages.SampleWeights,
    *,
    notebook: bool,
) -> tuple[chex.Array, Model]:
    """Vg, and the statistics from means of all parameters, projected.

    Args:
      basis: V.
      model: statistics so far; its means are replaced.
      means: of positions and of gradients; with the new sample, or without it for the form of the
        notebooks.
      point: parameters and gradient of the sample.
      weights: of the new sample.
      notebook: see `sample_deviations`.
    """
    apart = leafwise.tree_map(lambda p, m: trees.wide(p) - m, point[0], means[0])
    inside = subspace.coordinates(basis, point[1])
    deviations = (
        subspace.coordinates(basis, apart),
        inside - subspace.coordinates(basis, means[1]),
    )
    return inside, sample_deviations(model, inside, deviations, weights, notebook=notebook)


def aligned(
    basis: subspace.Basis,
    model: Model,
    count: chex.Array,
    period: int,
    ridge: chex.Numeric,
) -> tuple[subspace.Basis, Model]:
    """The basis rotated to the eigenvectors of the modelled Hessian, when due."""
    d = basis.rotation.shape[0]
    axes = jax.lax.cond(
        count % period == 0,
        lambda: principal_axes(model, basis.filled, ridge),
        lambda: jnp.eye(d, dtype=basis.rotation.dtype),
    )
    return subspace.rotate(basis, axes), transport_model(model, axes)

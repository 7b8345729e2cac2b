r"""The parabola model: a weighted linear regression of gradients against positions.

Along one direction, :math:`f(\theta) \approx h + \frac12\lambda(\theta-p)^2` has the derivative
:math:`g \approx \lambda(\theta-p)`. With normalised means m of positions and n of gradients and
their normalised central moments v (variance of positions), c (covariance), u (variance of
gradients), least squares gives

.. math::
  \lambda = c/v, \qquad p = m - n/\lambda, \qquad \sigma_\theta/\sigma_g = \sqrt{v/u}, \qquad
  \operatorname{corr} = c/\sqrt{vu}, \qquad H = B C^{-1}

whatever the sum of the weights: equations (1)–(9) and (12) of J. Duda, "SGD momentum optimizer with
step estimation by online parabola model", 2019, in central form. Every function works on arrays
of any shape, entry by entry, so that one model or one per coordinate are the same code; H is for
several directions at once.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.core import averages, checks, linalg

REFERENCE = 'J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019'
FOLLOW_UP = (
    'J. Duda, "Improving SGD convergence by online linear regression of gradients in multiple '
    'statistically relevant directions", 2019'
)
ESTIMATORS = ("symmetric_least_squares", "regression", "geometric_mean", "elementwise")


class Parabola(NamedTuple):
    """Statistics of (position, gradient) pairs; all fields have the same shape."""

    mean_position: chex.Array  # m
    mean_gradient: chex.Array  # n
    position_variance: chex.Array  # v ≥ 0
    covariance: chex.Array  # c
    gradient_variance: chex.Array  # u ≥ 0


def init_parabola(shape: tuple[int, ...] = (), dtype: Any | None = None) -> Parabola:
    """The statistics before the first sample."""
    dtype = averages.scalar_dtype() if dtype is None else dtype
    return Parabola(*(jnp.zeros(shape, dtype) for _ in Parabola._fields))


def update_parabola(
    state: Parabola,
    position: chex.Array,
    gradient: chex.Array,
    weights: averages.SampleWeights,
) -> Parabola:
    """The statistics after one more pair (Eq. 3, in central form).

    Args:
      state: statistics so far.
      position: θ of the new sample.
      gradient: g of the new sample.
      weights: from `optgrad.core.averages.sample_weights`.
    """
    m = averages.update_mean(state.mean_position, position, weights)
    n = averages.update_mean(state.mean_gradient, gradient, weights)
    return Parabola(
        mean_position=m,
        mean_gradient=n,
        position_variance=averages.update_variance(state.position_variance, position, m, weights),
        covariance=averages.update_covariance(state.covariance, position, m, gradient, n, weights),
        gradient_variance=averages.update_variance(state.gradient_variance, gradient, n, weights),
    )


def fit_parabola(
    positions: chex.Array, gradients: chex.Array, weights: chex.Array | None = None
) -> Parabola:
    r"""Static weighted regression, Eqs. (1)–(2).

    Args:
      positions: θ of T samples, leading axis of size T; further axes are separate models.
      gradients: g of the samples, the same shape.
      weights: wᵗ ≥ 0, shape (T,), of any positive sum; default: all equal.

    Returns:
      The statistics, without the leading axis; `curvature` and `minimum` give λ and p.

    Raises:
      ValueError: for shapes that do not fit.

    Examples:
      >>> fit = fit_parabola(jnp.array([0.0, 1.0, 2.0]), jnp.array([-3.0, -1.0, 1.0]))
      >>> print(f"{curvature(fit):.3f} {minimum(fit):.3f}")
      2.000 1.500
    """
    positions, gradients = jnp.asarray(positions), jnp.asarray(gradients)
    if positions.shape != gradients.shape or positions.ndim == 0 or positions.shape[0] == 0:
        raise ValueError(
            f"positions has shape {positions.shape} and gradients {gradients.shape}; "
            "accepted: equal shapes with a leading axis of at least one sample"
        )
    w = jnp.ones(positions.shape[0]) if weights is None else jnp.asarray(weights)
    if w.shape != positions.shape[:1]:
        raise ValueError(
            f"weights has shape {w.shape}; accepted: one weight for each of the "
            f"{positions.shape[0]} samples"
        )
    dtype = jnp.result_type(positions, gradients, w, jnp.float32)
    w = (w / jnp.sum(w)).astype(dtype).reshape(-1, *[1] * (positions.ndim - 1))
    m = jnp.sum(w * positions, axis=0)
    n = jnp.sum(w * gradients, axis=0)
    d, e = positions - m, gradients - n
    moments = (jnp.sum(w * x * y, axis=0) for x, y in ((d, d), (d, e), (e, e)))
    return Parabola(m, n, *moments)


def shift(state: Parabola, displacement: chex.Array) -> Parabola:
    """The statistics with positions measured from an origin moved by ``displacement``.

    Only the mean position changes. (Algorithm 7 shifts raw averages and forgets their sum of
    weights, which matters while s < 1.)
    """
    return state._replace(mean_position=state.mean_position - displacement)


def curvature(state: Parabola) -> chex.Array:
    """λ = c/v, the slope of the gradient (Eq. 2); 0 where the positions have no spread."""
    return _divide(state.covariance, state.position_variance)


def minimum(state: Parabola) -> chex.Array:
    """Position p = m − n/λ of the parabola's extremum (Eq. 2); infinite or NaN where λ = 0."""
    return state.mean_position - state.mean_gradient / curvature(state)


def sigma_ratio(state: Parabola) -> chex.Array:
    """σθ/σg = √(v/u), the learning rate of Eqs. (8)–(9); infinite where only g has no spread."""
    v, u = state.position_variance, state.gradient_variance
    return jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 0) / u), 0.0)


def correlation(state: Parabola) -> chex.Array:
    """corr(g, θ) in [−1, 1] (Eq. 7); 0 where either has no spread."""
    scale = jnp.sqrt(state.position_variance) * jnp.sqrt(state.gradient_variance)
    return jnp.clip(_divide(state.covariance, scale), -1.0, 1.0)


def curvature_standard_error(
    state: Parabola, gradient_noise: chex.Numeric, beta: chex.Numeric
) -> chex.Array:
    r"""Standard error of λ (Eq. 12).

    .. math:: \frac{\sigma}{\sigma_\theta}\sqrt{\frac{1-\beta}{1+\beta}}

    Args:
      state: the statistics, of many samples (s ≈ 1).
      gradient_noise: σ, standard deviation of one gradient; `residual_deviation` estimates it.
      beta: decay β in [0, 1).
    """
    effective = jnp.sqrt((1 - beta) / (1 + beta))
    return gradient_noise * effective / jnp.sqrt(state.position_variance)


def residual_deviation(state: Parabola) -> chex.Array:
    """Standard deviation of the gradients around the regression line, √(u − c²/v) ≥ 0."""
    explained = _divide(state.covariance**2, state.position_variance)
    return jnp.sqrt(jnp.maximum(state.gradient_variance - explained, 0.0))


def _divide(x: chex.Array, y: chex.Array) -> chex.Array:
    """x/y, and 0 where y is 0."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)


class Paraboloid(NamedTuple):
    """Statistics of positions and gradients in d directions."""

    mean_position: chex.Array  # m, shape (d,)
    mean_gradient: chex.Array  # n, shape (d,)
    position_covariance: chex.Array  # C, symmetric ≥ 0, shape (d, d)
    covariance: chex.Array  # B, B_ij = avg of e_i·d_j (gradient i, position j), shape (d, d)


def init_paraboloid(d: int, dtype: Any | None = None) -> Paraboloid:
    """The statistics before the first sample."""
    dtype = averages.scalar_dtype() if dtype is None else dtype
    return Paraboloid(*(jnp.zeros(shape, dtype) for shape in ((d,), (d,), (d, d), (d, d))))


def update_paraboloid(
    state: Paraboloid,
    position: chex.Array,
    gradient: chex.Array,
    weights: averages.SampleWeights,
) -> Paraboloid:
    """The statistics after one more pair of vectors of shape (d,).

    C ← (1−κ)C + κ/(1−κ)·d dᵀ and B ← (1−κ)B + κ/(1−κ)·e dᵀ, with deviations from the new means.
    """
    m = averages.update_mean(state.mean_position, position, weights)
    n = averages.update_mean(state.mean_gradient, gradient, weights)
    d, e = position - m, gradient - n
    return Paraboloid(
        mean_position=m,
        mean_gradient=n,
        position_covariance=_update_matrix(state.position_covariance, d, d, weights),
        covariance=_update_matrix(state.covariance, e, d, weights),
    )


def update_gradient_covariance(
    covariance: chex.Array,
    gradient: chex.Array,
    new_mean: chex.Array,
    weights: averages.SampleWeights,
) -> chex.Array:
    """C_gg, the average of e eᵀ, after one more gradient of shape (d,)."""
    e = gradient - new_mean
    return _update_matrix(covariance, e, e, weights)


def _update_matrix(
    matrix: chex.Array, x: chex.Array, y: chex.Array, weights: averages.SampleWeights
) -> chex.Array:
    old, new = weights.old.astype(matrix.dtype), weights.deviation.astype(matrix.dtype)
    return old * matrix + new * (x[:, None] * y[None, :]).astype(matrix.dtype)


def hessian(
    position_covariance: chex.Array,
    covariance: chex.Array,
    gradient_covariance: chex.Array | None = None,
    *,
    estimator: str = "symmetric_least_squares",
    ridge: chex.Numeric = 0.0,
) -> chex.Array:
    r"""Hessian of shape (d, d) from the second moments of positions and gradients.

    =========================== ==================================================================
    ``symmetric_least_squares`` the symmetric H with least squared error, :math:`HC + CH = B + B^T`:
                                with :math:`C = U\Lambda U^T`,
                                :math:`H = U\,[(U^T(B+B^T)U)_{ij}/(\Lambda_i+\Lambda_j)]\,U^T`
    ``regression``              :math:`BC^{-1}`, not symmetric under noise
    ``geometric_mean``          :math:`C^{-1/2}(C^{1/2}C_{gg}C^{1/2})^{1/2}C^{-1/2} \ge 0`, the
                                matrix analogue of :math:`\sigma_g/\sigma_\theta`: curvatures
                                without sign, enlarged by noise
    ``elementwise``             Eq. (14) as printed, :math:`\sqrt{(C_{gg})_{ij}/C_{ij}}`: *not* an
                                estimate of H; NaN where the signs differ
    =========================== ==================================================================

    Args:
      position_covariance: C, shape (d, d), symmetric.
      covariance: B, shape (d, d), gradient index first.
      gradient_covariance: C_gg, shape (d, d), for the last two estimators.
      estimator: one of the four.
      ridge: r ≥ 0; adds r·tr(C)/d to each eigenvalue of C.

    Raises:
      ValueError: for an unknown estimator, a negative ridge, or a missing ``gradient_covariance``.

    Examples:
      >>> H = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> C = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> print(hessian(C, H @ C).round(4))
      [[2. 1.]
       [1. 3.]]
      >>> wrong = hessian(C, H @ C, H @ C @ H, estimator="elementwise")
      >>> print([f"{x:.2f}" for x in wrong.ravel()])
      ['2.65', '4.12', '4.12', '3.61']

    References:
      J. Duda, 2019, Eq. (14) and Section V; symmetric form: the author's later notebooks.
    """
    checks.check_one_of("estimator", estimator, ESTIMATORS)
    checks.check_in_range("ridge", ridge, 0.0)
    if estimator in {"geometric_mean", "elementwise"} and gradient_covariance is None:
        raise ValueError(f"gradient_covariance = None; estimator = {estimator!r} needs it")
    if estimator == "elementwise":
        return jnp.sqrt(gradient_covariance / position_covariance)
    eigenvalues, vectors = linalg.eigh(position_covariance)
    # What rounding left below 0 counts as 0; a direction without any spread has no curvature.
    floor = ridge * jnp.mean(jnp.diagonal(position_covariance))
    rounding = 10 * eigenvalues.shape[0] * np.finfo(eigenvalues.dtype).eps
    seen = eigenvalues > rounding * eigenvalues[-1]
    eigenvalues = jnp.maximum(eigenvalues, 0.0) + floor
    if estimator == "regression":
        return _matmul(covariance, vectors * _divide(jnp.ones(()), eigenvalues), vectors.T)
    if estimator == "symmetric_least_squares":
        rotated = _matmul(vectors.T, covariance + covariance.T, vectors)
        solved = _divide(rotated, eigenvalues[:, None] + eigenvalues[None, :])
        # Between two directions without spread there is rounding only, which a ridge would keep.
        solved = jnp.where(seen[:, None] | seen[None, :], solved, 0.0)
        return _matmul(vectors, solved, vectors.T)
    # Both of about size 1, so that their products neither overflow nor underflow.
    second = jnp.asarray(gradient_covariance)
    of_positions, of_gradients = (_even_power(jnp.trace(c)) for c in (position_covariance, second))
    root = jnp.sqrt(eigenvalues / of_positions)
    half = _matmul(vectors * root, vectors.T)
    inverse = _matmul(vectors * _divide(jnp.ones(()), root), vectors.T)
    product = _matmul(half, second / of_gradients, half)
    inner, inner_vectors = linalg.eigh(product)
    middle = _matmul(inner_vectors * jnp.sqrt(jnp.maximum(inner, 0.0)), inner_vectors.T)
    return jnp.sqrt(of_gradients) / jnp.sqrt(of_positions) * _matmul(inverse, middle, inverse)


def _even_power(x: chex.Array) -> chex.Array:
    """A power of 4 near x > 0, by which one divides, and by its root, without rounding; 1 for 0."""
    exponent = jnp.frexp(x)[1] // 2 * 2
    return jnp.where(x > 0, jnp.ldexp(jnp.ones_like(x), exponent), 1.0)


def _matmul(*factors: chex.Array) -> chex.Array:
    return jnp.linalg.multi_dot(factors, precision=jax.lax.Precision.HIGHEST)

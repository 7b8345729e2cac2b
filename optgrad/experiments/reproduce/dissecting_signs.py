r"""Moments of the signs of Gaussian gradients, exact.

For :math:`g \sim \mathcal N(\mu, \Sigma)` and s = sign(g), with h = μ/σ and correlations ρ,

.. math::
  E[s_i] = \operatorname{erf}(h_i/\sqrt2), \qquad
  \operatorname{cov}[s_i, s_j] = 4\,(\Phi_2(h_i, h_j; \rho) - \Phi(h_i)\Phi(h_j))
  = \frac2\pi \int_{\arccos\rho}^{\pi/2}
    \exp\Bigl(-\frac{h_i^2 + h_j^2 - 2 h_i h_j\cos u}{2\sin^2 u}\Bigr)\,du,

the second by Plackett's identity :math:`\partial\Phi_2/\partial\rho = \varphi_2` with ρ = cos u.
The arcsine law is its case h = 0. The integral is a Gauss-Legendre sum in log u: near ρ = 1 the
integrand changes on the scale of u itself.

References:
  Z. Drezner and G. O. Wesolowsky, On the computation of the bivariate normal integral, Journal of
  Statistical Computation and Simulation 35, 1990.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.scipy.special
import numpy as np

NODES = 20  # in float64: 1e-15 for |ρ| ≤ 0.95, 1e-12 for 0.99, 1e-8 for 0.999


class Quadrature(NamedTuple):
    """Nodes of the integral for given correlations, leading axis of nodes."""

    cosine: Any  # cos u
    half_inverse_square: Any  # 1/(2 sin² u)
    weight: Any  # with the factor 2/π
    sign: Any  # of the correlation, no axis of nodes


def quadrature(correlation: Any, nodes: int = NODES) -> Quadrature:
    """The nodes for correlations of any shape, |ρ| < 1."""
    abscissae, weights = np.polynomial.legendre.leggauss(nodes)
    shape = (nodes,) + (1,) * np.ndim(correlation)
    correlation = jnp.asarray(correlation)
    x = jnp.asarray((abscissae + 1) / 2, correlation.dtype).reshape(shape)
    w = jnp.asarray(weights / 2, correlation.dtype).reshape(shape)
    low = jnp.arccos(jnp.abs(correlation))
    length = jnp.log(jnp.pi / 2 / low)
    u = low * jnp.exp(length * x)
    return Quadrature(
        jnp.cos(u),
        0.5 / jnp.sin(u) ** 2,
        2 / jnp.pi * w * length * u,
        jnp.where(correlation < 0, -1.0, 1.0).astype(correlation.dtype),
    )


def expected_sign(h: Any) -> Any:
    """E[sign(X)] of X ~ N(h, 1)."""
    return jax.scipy.special.erf(jnp.asarray(h) / np.sqrt(2))


def sign_covariance(h: Any, k: Any, rule: Quadrature) -> Any:
    """cov[sign(X), sign(Y)] of standard normals X, Y with means h, k and the rule's correlations.

    Args:
      h: means of X over their standard deviations, of the correlations' shape.
      k: those of Y.
      rule: `quadrature` of the correlations.
    """
    k = k * rule.sign  # (X, −Y) has the opposite correlation, and the opposite covariance of signs
    exponent = (h * h + k * k - 2 * h * k * rule.cosine) * rule.half_inverse_square
    return rule.sign * jnp.sum(rule.weight * jnp.exp(-exponent), axis=0)


def orthant_probability(h: Any, k: Any, correlation: Any, nodes: int = NODES) -> Any:
    """P[X > 0, Y > 0] of jointly normal X, Y with means h, k and variances 1.

    Args:
      h: means of X.
      k: means of Y, of the same shape.
      correlation: in (−1, 1), of the same shape.
      nodes: of the quadrature.

    Examples:
      >>> bool(abs(orthant_probability(0.0, 0.0, 0.5) - 1 / 3) < 1e-6)
      True
    """
    covariance = sign_covariance(jnp.asarray(h), jnp.asarray(k), quadrature(correlation, nodes))
    ndtr = jax.scipy.special.ndtr
    return ndtr(jnp.asarray(h)) * ndtr(jnp.asarray(k)) + covariance / 4

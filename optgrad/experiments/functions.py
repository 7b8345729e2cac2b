"""Test functions: what landscapes, toys and the problems of the harness have in common.

A function of one array takes the coordinates on its last axis, and works on NumPy and JAX arrays
alike unless it says otherwise. Where a function f is a sum of squares, ``…_residuals`` are the r
with f = ½ Σ r².
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

_ROOT2 = 2**0.5


def beale(x: Any) -> Any:
    """Beale's function, flat far from its curved valley; minimum 0 at (3, 1/2)."""
    u, v = x[..., 0], x[..., 1]
    return (1.5 - u + u * v) ** 2 + (2.25 - u + u * v**2) ** 2 + (2.625 - u + u * v**3) ** 2


def beale_residuals(x: Any) -> Any:
    """√2 times what `beale` squares, shape (…, 3); of JAX arrays."""
    u, v = x[..., 0], x[..., 1]
    terms = (1.5 - u + u * v, 2.25 - u + u * v**2, 2.625 - u + u * v**3)
    return _ROOT2 * jnp.stack(terms, axis=-1)


def beale_3d(x: Any) -> Any:
    """Two of Beale's functions that share a coordinate: b(x, y) + b(z, y)."""
    return beale(x[..., [0, 1]]) + beale(x[..., [2, 1]])


def beale_3d_residuals(x: Any) -> Any:
    """√2 times what `beale_3d` squares, shape (…, 6); of JAX arrays."""
    pair = (beale_residuals(x[..., jnp.array(one)]) for one in ([0, 1], [2, 1]))
    return jnp.concatenate(list(pair), axis=-1)


def rosenbrock(x: Any) -> Any:
    """Rosenbrock's curved valley; minimum 0 at (1, 1)."""
    u, v = x[..., 0], x[..., 1]
    return (1 - u) ** 2 + 100 * (v - u**2) ** 2


def rosenbrock_chain(x: Any) -> Any:
    """Rosenbrock's function in two or more dimensions; minimum 0 where every coordinate is 1.

    The sum of `rosenbrock` over neighbouring coordinates. In two dimensions the same number up to
    rounding; that one is kept apart because published runs on it depend on the last bit.
    """
    u, v = x[..., :-1], x[..., 1:]
    return ((1 - u) ** 2 + 100 * (v - u**2) ** 2).sum(axis=-1)


def rosenbrock_residuals(x: Any) -> Any:
    """√2 times what `rosenbrock_chain` squares, shape (…, 2(n − 1)); of JAX arrays."""
    u, v = x[..., :-1], x[..., 1:]
    return _ROOT2 * jnp.concatenate([10.0 * (v - u**2), 1.0 - u], axis=-1)


def matyas(x: Any) -> Any:
    """Matyas' function, a quadratic of condition 25; minimum 0 at the origin."""
    u, v = x[..., 0], x[..., 1]
    return 0.26 * (u**2 + v**2) - 0.48 * u * v


def matyas_residuals(x: Any) -> Any:
    """√2 times the roots in 0.01 (u + v)² + 0.25 (u − v)² = `matyas`, shape (…, 2); JAX arrays."""
    u, v = x[..., 0], x[..., 1]
    return _ROOT2 * jnp.stack([0.1 * (u + v), 0.5 * (u - v)], axis=-1)


def goldstein_price(x: Any) -> Any:
    """Goldstein & Price: four local minima and six decades of values; minimum 3 at (0, −1)."""
    u, v = x[..., 0], x[..., 1]
    first = 19 - 14 * u + 3 * u**2 - 14 * v + 6 * u * v + 3 * v**2
    second = 18 - 32 * u + 12 * u**2 + 48 * v - 36 * u * v + 27 * v**2
    return (1 + (u + v + 1) ** 2 * first) * (30 + (2 * u - 3 * v) ** 2 * second)


STYBLINSKI_TANG_MINIMIZER = -2.903534027771177  # of each coordinate; the other minimum is local
STYBLINSKI_TANG_MINIMUM = -39.16616570377142  # of each coordinate


def styblinski_tang(x: Any) -> Any:
    """½ Σ (x⁴ − 16x² + 5x), of Styblinski & Tang (1990): each coordinate has two minima.

    The global one is `STYBLINSKI_TANG_MINIMUM` per coordinate, at `STYBLINSKI_TANG_MINIMIZER`;
    the local one, at 2.7468, is higher by 14.14.
    """
    return 0.5 * (x**4 - 16 * x**2 + 5 * x).sum(axis=-1)


def rotated_quadratic(x: Any, curvature: float) -> Any:
    """½ (p² + κq²), with (p, q) = x in axes that are rotated by 30°; minimum 0 at the origin."""
    p, q = _rotated(x)
    return 0.5 * (p**2 + curvature * q**2)


def rotated_quadratic_residuals(x: Any, curvature: float, slope: Any = 0.0) -> Any:
    """What `rotated_quadratic` squares and halves, shape (…, 2); of JAX arrays.

    With a slope s, of an array like x, half their squares are the quadratic + sᵀx + a constant.
    """
    p, q = _rotated(x)
    a, b = _rotated(jnp.broadcast_to(slope, x.shape))
    root = curvature**0.5
    return jnp.stack([p + a, root * q + b / root], axis=-1)


def _rotated(x: Any) -> tuple[Any, Any]:
    u, v = x[..., 0], x[..., 1]
    cos, sin = 0.75**0.5, 0.5
    return cos * u + sin * v, cos * v - sin * u


def plateau(x: Any) -> Any:
    """s/(1 + s) with s = ½ (x² + 10y²): a basin in a plain at height 1; minimum 0 at the origin.

    The loss of Geman & McClure (1987), of two coordinates. Far away the gradient falls like the
    third power of the distance.
    """
    s = 0.5 * (x[..., 0] ** 2 + 10 * x[..., 1] ** 2)
    return s / (1 + s)


def plateau_residuals(x: Any) -> Any:
    """What `plateau` squares and halves, shape (…, 2); of JAX arrays."""
    r = jnp.stack([x[..., 0], 10**0.5 * x[..., 1]], axis=-1)
    return r / jnp.sqrt(1 + 0.5 * jnp.sum(r * r, axis=-1, keepdims=True))


def saddle(x: Any) -> Any:
    """x² − y² + y⁴/4 + 1, a saddle at the origin; minima 0 at (0, ±√2)."""
    return saddle_of(x[..., 0], x[..., 1]) + 1


def saddle_residuals(x: Any) -> Any:
    """√2 times the roots in x² + (y²/2 − 1)² = `saddle`, shape (…, 2); of JAX arrays."""
    u, v = x[..., 0], x[..., 1]
    return _ROOT2 * jnp.stack([u, 0.5 * v**2 - 1.0], axis=-1)


def saddle_of(u: Any, v: Any) -> Any:
    """u² − v² + v⁴/4, a saddle at the origin; minima −1 at (0, ±√2)."""
    return u**2 - v**2 + 0.25 * v**4


def ill_conditioned_saddle_of(u: Any, v: Any) -> Any:
    """50 u² + 0.01 (−v² + v⁴/4): curvatures 100 and −0.02; minima −0.01 at (0, ±√2)."""
    return 50.0 * u**2 + 0.01 * (-(v**2) + 0.25 * v**4)


YAO_CURVATURES = np.array([1000.0, 1.0])
YAO_CONVEX_START = np.array([-1.0, 2.0])
YAO_ROSENBROCK_START = np.array([-1.0, 0.0])


def yao_convex(w: Any) -> Any:
    """½wᵀQw with Q = diag(1000, 1), Yao's convex problem; of one JAX array of shape (2,)."""
    return 0.5 * jnp.sum(jnp.asarray(YAO_CURVATURES, w.dtype) * w * w)


def yao_convex_residuals(w: Any) -> Any:
    """What `yao_convex` squares and halves."""
    return jnp.asarray(np.sqrt(YAO_CURVATURES), w.dtype) * w

"""The Hessian estimators against plain linear algebra, and their errors under noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.online_regression import parabola

D, SAMPLES, RUNS = 5, 40, 60


def root(a):
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def slow_estimates(c, b, cgg):
    """Each estimator by its defining equation, in float64."""
    eye = np.eye(len(c))
    # HC + CH = B + Bᵀ as one linear system for the entries of H.
    lyapunov = np.linalg.solve(np.kron(eye, c) + np.kron(c, eye), (b + b.T).ravel())
    half = root(c)
    inverse = np.linalg.inv(half)
    return {
        "regression": b @ np.linalg.inv(c),
        "symmetric_least_squares": lyapunov.reshape(c.shape),
        "geometric_mean": inverse @ root(half @ cgg @ half) @ inverse,
    }


def samples(seed, noise):
    """A Hessian, and moments of a correlated path and its noisy gradients."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(D, D)))
    hessian = (q * np.linspace(1.0, 5.0, D)) @ q.T
    mixing, x, path = rng.normal(size=(D, D)), np.zeros(D), []
    for _ in range(SAMPLES):
        x = 0.5 * x + np.sqrt(0.75) * mixing @ rng.normal(size=D)
        path.append(x)
    positions = np.array(path)
    gradients = positions @ hessian + noise * rng.normal(size=positions.shape)
    d, e = positions - positions.mean(0), gradients - gradients.mean(0)
    return hessian, (d.T @ d / SAMPLES, e.T @ d / SAMPLES, e.T @ e / SAMPLES)


def estimate(moments, estimator, **options):
    return np.asarray(parabola.hessian(*map(jnp.asarray, moments), estimator=estimator, **options))


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", ["regression", "symmetric_least_squares", "geometric_mean"])
def test_definition(x64, name, noise):
    """Each one solves its own equation; without noise it is the Hessian."""
    hessian, moments = samples(0, noise)
    actual = estimate(moments, name)
    np.testing.assert_allclose(actual, slow_estimates(*moments)[name], rtol=1e-8, atol=1e-9)
    if noise == 0:
        np.testing.assert_allclose(actual, hessian, rtol=1e-8, atol=1e-9)


def error(estimated, hessian):
    return np.linalg.norm(estimated - hessian) / np.linalg.norm(hessian)


def test_errors_under_noise(x64):
    """Least squares among symmetric matrices halves the error of B·C⁻¹ (specification, §3.5)."""
    errors = {"regression": [], "symmetrised": [], "symmetric_least_squares": []}
    errors["geometric_mean"] = []
    for seed in range(RUNS):
        hessian, moments = samples(seed, 1.05)
        for name in set(errors) - {"symmetrised"}:
            errors[name].append(error(estimate(moments, name), hessian))
        plain = estimate(moments, "regression")
        errors["symmetrised"].append(error((plain + plain.T) / 2, hessian))
    median = {name: np.median(values) for name, values in errors.items()}
    assert median["regression"] == pytest.approx(0.23, rel=0.2)
    assert median["symmetrised"] == pytest.approx(0.18, rel=0.2)
    assert median["symmetric_least_squares"] == pytest.approx(0.097, rel=0.2)
    assert 0.25 < median["geometric_mean"] < 0.6


def test_printed_estimate_is_none(x64):
    """Eq. (14) on exact data: NaN off the diagonal or large errors, and a wrong diagonal too."""
    off_diagonal, diagonal = [], []
    for seed in range(RUNS):
        hessian, moments = samples(seed, 0.0)
        printed = estimate(moments, "elementwise")
        outside = ~np.eye(D, dtype=bool)
        relative = np.abs(printed - hessian) / np.abs(hessian)
        off_diagonal.append(np.nanmedian(relative[outside]))
        diagonal.append(np.max(relative[~outside]))
        assert np.isnan(printed[outside]).any() or off_diagonal[-1] > 0.5
    assert np.median(off_diagonal) > 0.5
    assert np.median(diagonal) > 0.05


@pytest.mark.parametrize("name", ["regression", "symmetric_least_squares", "geometric_mean"])
def test_unvisited_directions(name):
    """A singular C gives no NaN, and no curvature that is rounding."""
    rng = np.random.default_rng(0)
    path = np.zeros((SAMPLES, D))
    path[:, :2] = rng.normal(size=(SAMPLES, 2))
    hessian = np.diag([1.0, 2.0, 3.0, 4.0, 5.0])
    q, _ = np.linalg.qr(rng.normal(size=(D, D)))
    moments = [np.float32(q @ m @ q.T) for m in (path.T @ path, hessian @ path.T @ path)]
    second = np.float32(q @ hessian @ path.T @ path @ hessian @ q.T)
    for ridge in (0.0, 1e-3):
        found = q.T @ estimate((*moments, second), name, ridge=ridge) @ q
        np.testing.assert_allclose(found[:2, :2], hessian[:2, :2], atol=0.05)
        if name == "symmetric_least_squares":
            np.testing.assert_allclose(found[2:, 2:], 0.0, atol=1e-4)


def test_jit_and_vmap():
    """One compilation for many Hessians."""
    many = [samples(seed, 0.5)[1] for seed in range(3)]
    stacked = [jnp.asarray(np.stack(column), jnp.float32) for column in zip(*many, strict=True)]
    together = jax.jit(jax.vmap(parabola.hessian))(*stacked[:2])
    for found, moments in zip(together, many, strict=True):
        expected = slow_estimates(*moments)["symmetric_least_squares"]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

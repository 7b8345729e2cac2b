"""The mixture of coordinates and subspace, against NumPy and against its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.online_regression import subspace

from .beale import geometric_means
from .test_ogr_subspace import D, flat, lyapunov, pca_step, quadratic, tree

WARMUP = 10


def parts(correlation_one, **options):
    """The method, and the one of its coordinates alone."""
    whole = optgrad.ogr_diagonal_subspace(d=3, correlation_one=correlation_one, **options)
    options.pop("mix", None)
    options = {"alpha": 0.5, "beta": 0.9, "lr_max": 0.3, "skip_zero_gradients": False} | options
    alone = (
        optgrad.adaptive_sgd(momentum=True, **options)
        if correlation_one
        else (optgrad.ogr_diagonal(**options))
    )
    return whole, alone


def run(optimizer):
    """Path, gradients and updates on a tree of two leaves."""
    hessian, start, noises = quadratic()

    def step(carry, noise):
        params, state = carry
        g = jnp.asarray(hessian) @ flat(params) + noise
        updates, state = optimizer.update(tree(g), state, params)
        return (optax.apply_updates(params, updates), state), (flat(params), g, flat(updates))

    params = tree(jnp.asarray(start))
    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.asarray(noises))


def replay(optimizer, path, gradients):
    """The updates of an optimizer that is shown a path of another."""

    def step(state, pair):
        updates, state = optimizer.update(tree(pair[1]), state, tree(pair[0]))
        return state, flat(updates)

    return jax.lax.scan(step, optimizer.init(tree(path[0])), (path, gradients))[1]


def geometric_mean(c, cgg):
    def root(a):
        values, vectors = np.linalg.eigh((a + a.T) / 2)
        return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T

    half = root(c)
    inverse = np.linalg.inv(half)
    return inverse @ root(half @ cgg @ half) @ inverse


def corrections(path, gradients, diagonal, correlation_one, mix=0.4, beta=0.9, alpha=0.5, cap=0.3):
    """w·Vᵀ(y − Vu) at every step, from the specification's basis rule."""
    d, ridge = 3, 1e-3
    v, e, updates = np.zeros((d, D)), np.zeros(d), []
    mean, mean_gradient = path[0].copy(), np.zeros(D)
    c, b, cgg = np.zeros((d, d)), np.zeros((d, d)), np.zeros((d, d))
    for t, (x, g, u) in enumerate(zip(path, gradients, diagonal, strict=True), start=1):
        dx, dg = v @ (x - mean), v @ (g - mean_gradient)  # from the old means
        mean = mean + (1 - beta) * (x - mean)
        mean_gradient = mean_gradient + (1 - beta) * (g - mean_gradient)
        c = beta * (c + (1 - beta) * np.outer(dx, dx))
        b = beta * (b + (1 - beta) * np.outer(dg, dx))
        cgg = beta * (cgg + (1 - beta) * np.outer(dg, dg))
        update = np.zeros(D)
        if t > WARMUP:
            ridged = c + ridge * np.trace(c) / d * np.eye(d)
            hessian = geometric_mean(ridged, cgg) if correlation_one else lyapunov(c, b, ridge)
            values, o = np.linalg.eigh(hessian)
            momentum = v @ mean_gradient / (1 - beta**t)
            y = -o @ (np.minimum(alpha / np.abs(values), cap) * (o.T @ momentum))
            update = mix * v.T @ (y - v @ u)
        updates.append(update)
        v, e, w, _ = pca_step(v, e, g, 0.02)
        inner = w[:, :d]
        c, b, cgg = (inner @ a @ inner.T for a in (c, b, cgg))
    return np.array(updates)


@pytest.mark.parametrize("correlation_one", [False, True])
def test_box(x64, correlation_one):
    """Coordinates' step outside, a mixture inside."""
    whole, alone = parts(correlation_one)
    _, (path, gradients, updates) = run(whole)
    diagonal = np.asarray(replay(alone, path, gradients))
    expected = corrections(np.asarray(path), np.asarray(gradients), diagonal, correlation_one)
    assert np.max(np.abs(expected)) > 1e-2
    np.testing.assert_allclose(np.asarray(updates) - diagonal, expected, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("correlation_one", [False, True])
def test_without_mixing_it_is_the_diagonal_model(x64, correlation_one):
    """w = 0."""
    whole, alone = parts(correlation_one, mix=0.0)
    _, (path, gradients, updates) = run(whole)
    np.testing.assert_allclose(updates, replay(alone, path, gradients), atol=1e-13)


def test_full_mixing_leaves_nothing_of_the_diagonal_step_inside(x64):
    """w = 1: within the subspace the update is the subspace's step."""
    _, (path, gradients, updates) = run(optgrad.ogr_diagonal_subspace(1.0, d=D))
    diagonal = replay(parts(False)[1], path, gradients)
    assert np.max(np.abs(np.asarray(updates - diagonal)[WARMUP:])) > 1e-2


@pytest.mark.slow
def test_notebook_preset_on_3d_beale():
    """With the notebooks' settings the mixture is ahead of the diagonal model."""
    mixed = geometric_means(optgrad.ogr_diagonal_subspace(0.4, d=2, paper=True))
    alone = geometric_means(optgrad.ogr_diagonal_subspace(0.0, d=2, paper=True))
    assert np.mean(np.log(mixed)) < np.mean(np.log(alone)) - 0.1


@pytest.mark.slow
def test_notebook_preset_contains_ogr_diagonal(x64):
    """The notebooks' preset without mixing is that of `ogr_diagonal`."""
    whole = optgrad.ogr_diagonal_subspace(0.0, d=2, paper=True)
    _, (path, gradients, updates) = run(whole)
    alone = optgrad.ogr_diagonal(paper=True)
    np.testing.assert_allclose(updates, replay(alone, path, gradients), atol=1e-13)


def test_diagnostics():
    """Both models' entries; the basis is orthonormal."""
    (_, state), _ = run(optgrad.ogr_diagonal_subspace(d=2))
    entries = optgrad.diagnostics(state)
    assert {"diagonal_curvature_geomean", "curvatures", "energy_inside"} <= entries.keys()
    assert entries["curvatures"].shape == (2,)
    assert all(np.isfinite(value).all() for value in entries.values())
    np.testing.assert_allclose(subspace.gram(state.basis), np.eye(2), atol=1e-4)


def test_too_many_directions():
    """Refused in init."""
    with pytest.raises(ValueError, match="d = 4 is more than the 3 parameters"):
        optgrad.ogr_diagonal_subspace(d=4).init(jnp.zeros(3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mix": 1.5}, {"alpha": 0.0}, {"beta": 1.0}, {"lr_max": 0.0}, {"d": 0}, {"basis": "oja"},
        {"basis_rate": 1.5}, {"ridge": -1.0}, {"warmup_steps": -1},
    ],
)  # fmt: skip
def test_wrong_arguments(arguments):
    """Refused at the door, by name."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optgrad.ogr_diagonal_subspace(**arguments)

"""Test functions and noisy quadratics against their formulas in NumPy, float64."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad import registry
from optgrad.core import oracles
from optgrad.experiments import (
    catalogue,
    create_problem,
    function_problem,
    functions,
    landscapes,
    quadratics,
)
from optgrad.experiments.engine import Runs, Trainer

pytestmark = pytest.mark.slow  # together a minute, in CI's slow stage

KEY = jax.random.key(3)


def batch_of(problem, step=0, key=KEY):
    (drawn,) = problem.batches(problem.data, key, step, 1)
    return problem.batch(problem.data, drawn)


# The functions --------------------------------------------------------------------------------


def chain(x):
    return sum(
        100 * (x[i + 1] - x[i] ** 2) ** 2 + (1 - x[i]) ** 2 for i in range(len(x) - 1)
    )  # as it is written in textbooks


FORMULAS = {
    "rosenbrock_chain": (functions.rosenbrock_chain, chain, 5),
    "rosenbrock_chain_2d": (functions.rosenbrock_chain, functions.rosenbrock, 2),
    "yao_convex": (functions.yao_convex, lambda w: 500 * w[0] ** 2 + 0.5 * w[1] ** 2, 2),
    "saddle": (
        lambda x: functions.saddle_of(x[0], x[1]),
        lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4, 2,
    ),
    "ill_conditioned_saddle": (
        lambda x: functions.ill_conditioned_saddle_of(x[0], x[1]),
        lambda x: 50 * x[0] ** 2 - 0.01 * x[1] ** 2 + 0.0025 * x[1] ** 4, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_functions_follow_their_formulas(name, x64):
    function, formula, dimension = FORMULAS[name]
    for point in np.random.default_rng(0).normal(size=(5, dimension)):
        np.testing.assert_allclose(function(jnp.array(point)), formula(point), rtol=1e-12)


RESIDUALS = {
    **{k: (v.function, v.residuals) for k, v in landscapes.landscapes().items() if v.residuals},
    "yao_convex": (functions.yao_convex, functions.yao_convex_residuals),
    "chain": (functions.rosenbrock_chain, functions.rosenbrock_residuals),
}


@pytest.mark.parametrize("place", RESIDUALS)
def test_half_the_squared_residuals_are_the_function(place, x64):
    function, residuals = RESIDUALS[place]
    found = landscapes.landscapes().get(place)
    dimension = len(found.box) if found else 2
    for point in np.random.default_rng(1).normal(size=(5, dimension)):
        r = residuals(jnp.array(point))
        np.testing.assert_allclose(0.5 * np.sum(np.square(r)), function(jnp.array(point)))


# Noise ----------------------------------------------------------------------------------------


def moments(gradients):
    return gradients.mean(axis=0), np.cov(gradients, rowvar=False)


def test_a_functions_noise_has_the_stated_covariance():
    """Example gradients are ∇f + N(0, σ²I), and the batch's is their mean."""
    sigma, count = 0.5, 20_000
    problem = create_problem("rosenbrock", batch_size=count, dimension=3, noise=sigma)
    point = jnp.array([0.3, -0.2, 0.5])
    batch = batch_of(problem)
    each = oracles.per_example_grads(problem.example_loss, point, batch)
    mean, covariance = moments(np.asarray(each, float))
    exact = jax.grad(functions.rosenbrock_chain)(point)
    np.testing.assert_allclose(mean, exact, atol=4 * sigma / count**0.5)
    np.testing.assert_allclose(covariance, sigma**2 * np.eye(3), atol=0.03 * sigma**2)
    np.testing.assert_allclose(jax.grad(problem.loss)(point, batch), mean, rtol=1e-4, atol=1e-5)
    losses = jax.vmap(problem.example_loss, (None, 0))(point, batch)
    np.testing.assert_allclose(problem.loss(point, batch), np.mean(losses), rtol=1e-5)


def test_outputs_give_the_loss_with_noise():
    problem = create_problem("lattice", batch_size=3, function="beale_3d", noise=2.0)
    point, batch = jnp.array([0.3, -0.2, 0.5]), batch_of(problem)
    assert problem.residuals is None  # it is no sum of squares
    through = problem.out_loss(problem.outputs(point, batch), batch)
    np.testing.assert_allclose(through, problem.loss(point, batch), rtol=1e-5)


def test_no_noise_gives_equal_examples():
    problem = create_problem("saddle", batch_size=4)
    batch = batch_of(problem)
    assert batch.shape == (4, 2)
    assert not np.any(batch)


@pytest.mark.parametrize("name", ["noisy_quadratic", "rosenbrock"])
def test_examples_are_fresh_and_follow_from_key_and_step(name):
    problem = create_problem(name, batch_size=2, noise=1.0)
    whole = problem.batches(None, KEY, 0, 6)
    batches = [np.asarray(problem.batch(None, drawn)) for drawn in whole]
    assert len(np.unique(np.stack(batches)[..., 0])) == 12
    part = problem.batches(None, KEY, 4, 2)
    np.testing.assert_array_equal(batches[5], problem.batch(None, part[1]))
    other = problem.batches(None, jax.random.key(4), 0, 1)
    assert not np.any(batches[0] == np.asarray(problem.batch(None, other[0])))


def test_parameters_may_be_any_tree():
    start = {"x": 1.0, "y": np.array([2.0, 3.0])}
    problem = function_problem(
        lambda p: p["x"] ** 2 + jnp.sum(p["y"] ** 2), start, batch_size=5, noise=0.1,
        minimum=0.0, minimizers=[{"x": 0.0, "y": np.zeros(2)}, {"x": 9.0, "y": np.zeros(2)}],
    )  # fmt: skip
    params = problem.init(KEY)
    assert {k: v.shape for k, v in batch_of(problem).items()} == {"x": (5,), "y": (5, 2)}
    found = problem.evaluate(params, None, "test", 0)
    np.testing.assert_allclose(found["loss"], 14.0)
    np.testing.assert_allclose(found["distance"], 14**0.5, rtol=1e-6)  # to the nearest
    assert problem.score.metric == "excess"
    unknown = function_problem(lambda p: p**2, 1.0)
    assert (unknown.score.metric, unknown.score.is_exact) == ("loss", True)
    assert set(unknown.evaluate(jnp.ones(()), None, "test", 0)) == {"loss", "count"}


# Quadratics -----------------------------------------------------------------------------------


def test_the_spectra_are_those_of_the_paper():
    values = quadratics.eigenvalues(1000, "uniform", np.random.default_rng(0))
    assert 0.1 <= values.min() < 0.11
    assert 1.09 < values.max() <= 1.1
    values = quadratics.eigenvalues(1000, "clustered", np.random.default_rng(0))
    small, large = values[values <= 1], values[values > 1]
    assert (len(small), len(large)) == (900, 100)
    assert 30 <= large.min() < 32
    assert 58 < large.max() <= 60
    assert 0 <= small.min() < 0.01


@pytest.mark.parametrize("spectrum", quadratics.SPECTRA)
def test_rotation_changes_the_axes_and_not_the_eigenvalues(spectrum):
    plain, rotated = (quadratics.hessian_factor(20, spectrum, rotated=r) for r in (False, True))
    q, turned = plain.T @ plain, rotated.T @ rotated
    np.testing.assert_array_equal(q, np.diag(np.diag(q)))
    assert np.abs(turned - np.diag(np.diag(turned))).max() > 0.05
    np.testing.assert_allclose(np.linalg.eigvalsh(turned), np.sort(np.diag(q)), atol=1e-12)


def test_rotations_are_uniformly_distributed():
    """The first eigenvector's coordinates have mean 0 and variance 1/d, whatever the sign."""
    first = []
    for seed in range(2000):
        factor = quadratics.hessian_factor(3, seed=seed)
        first.append(factor[0] / np.linalg.norm(factor[0]))
    np.testing.assert_allclose(np.mean(first, axis=0), 0, atol=0.04)
    np.testing.assert_allclose(np.cov(first, rowvar=False), np.eye(3) / 3, atol=0.03)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_quadratics_gradients_have_mean_and_covariance_of_the_closed_form(rotated):
    nu, count = 0.7, 40_000
    options = {"dimension": 5, "spectrum": "uniform", "seed": 2}
    problem = create_problem(
        "noisy_quadratic", batch_size=count, noise=nu, rotated=rotated, **options
    )
    factor = quadratics.hessian_factor(5, "uniform", rotated=rotated, seed=2)
    q = factor.T @ factor
    theta = np.random.default_rng(0).normal(size=5)
    batch = batch_of(problem)
    each = oracles.per_example_grads(problem.example_loss, jnp.array(theta, "f4"), batch)
    losses = jax.vmap(problem.example_loss, (None, 0))(jnp.array(theta, "f4"), batch)
    mean, covariance = moments(np.asarray(each, float))
    np.testing.assert_allclose(mean, q @ theta, atol=4 * nu * 1.1 / count**0.5)
    np.testing.assert_allclose(covariance, nu**2 * q @ q, atol=0.03 * nu**2)
    # Example by example, with the x of each: ½(θ − x)ᵀQ(θ − x).
    x = np.linalg.solve(factor, np.asarray(batch[:10], float).T).T
    formula = [0.5 * (theta - xk) @ q @ (theta - xk) for xk in x]
    np.testing.assert_allclose(losses[:10], formula, rtol=1e-4)
    # And in expectation.
    metrics = problem.evaluate(jnp.array(theta, "f4"), None, "test", 0)
    np.testing.assert_allclose(metrics["excess"], 0.5 * theta @ q @ theta, rtol=1e-5)
    expected = 0.5 * theta @ q @ theta + 0.5 * nu**2 * np.trace(q)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(np.mean(losses), expected, rtol=0.02)
    np.testing.assert_allclose(metrics["distance"], np.linalg.norm(theta), rtol=1e-5)


def test_the_quadratics_loss_outputs_and_residuals_agree():
    problem = create_problem("noisy_quadratic", batch_size=3, dimension=4, noise=1.0)
    theta, batch = jnp.array([1.0, -2.0, 0.5, 3.0]), batch_of(problem)
    loss = problem.loss(theta, batch)
    each = [problem.example_loss(theta, example) for example in batch]
    np.testing.assert_allclose(np.mean(each), loss, rtol=1e-6)
    through = problem.out_loss(problem.outputs(theta, batch), batch)
    np.testing.assert_allclose(through, loss, rtol=1e-6)
    half_squares = 0.5 * jnp.sum(problem.residuals(theta, batch) ** 2)
    np.testing.assert_allclose(half_squares, loss, rtol=1e-6)


def train(name, method, rate=None, *, steps=6, seeds=(0,), eval_every=2, **options):
    trainer = Trainer(
        create_problem(name, **options), registry.get_method(method),
        eval_every=eval_every, vectorize="vmap",
    )  # fmt: skip
    rates = {} if rate is None else {"learning_rate": np.full(len(seeds), rate)}
    return trainer.train(Runs(rates, np.array(seeds)), steps)


def test_sgd_settles_on_the_quadratic_where_theory_says():
    """Per eigenvalue λ, the stationary variance of θ is αλν²/(2 − αλ)."""
    rate, nu = 0.3, 2.0
    history = train(
        "noisy_quadratic", "sgd", rate, steps=600, eval_every=20, seeds=range(20), noise=nu,
        dimension=20,
    )  # fmt: skip
    values = np.diag(quadratics.hessian_factor(20, rotated=False)) ** 2  # the same spectrum
    expected = 0.5 * np.sum(values * rate * values * nu**2 / (2 - rate * values))
    found = history.metrics["test_excess"][:, history.steps > 300].mean()
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_gradient_descent_on_yaos_convex_problem():
    rate = 9e-4
    history = train("yao_convex", "sgd", rate, steps=40, eval_every=10)
    steps = np.arange(0, 41, 10)
    exact = 500 * (1 - 1000 * rate) ** (2 * steps) + 2 * (1 - rate) ** (2 * steps)
    np.testing.assert_allclose(history.metrics["test_excess"][0], exact, rtol=1e-4)


def test_rosenbrocks_start_and_excess():
    problem = create_problem("rosenbrock", dimension=4)
    start = problem.init(KEY)
    np.testing.assert_array_equal(start, [-1, 0, -1, 0])
    metrics = problem.evaluate(start, None, "test", 0)
    assert metrics["excess"] == chain([-1, 0, -1, 0])
    np.testing.assert_allclose(metrics["distance"], 10**0.5, rtol=1e-6)


def test_lattice_starts_are_points_of_the_lattice_by_seed():
    problem = create_problem("lattice", function="goldstein_price", side=5)
    starts = np.stack([problem.init(jax.random.key(seed)) for seed in range(40)])
    assert set(starts.ravel()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert len(np.unique(starts, axis=0)) > 15
    value = problem.evaluate(jnp.array([0.0, -1.0]), None, "test", 0)
    assert (value["loss"], value["excess"], value["distance"]) == (3.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", ["plain", "ill_conditioned"])
def test_both_minima_of_a_saddle(shape):
    problem = create_problem("saddle", shape=shape, distance=0.25)
    np.testing.assert_array_equal(problem.init(KEY), [1.0, 0.25])
    for y in (2**0.5, -(2**0.5)):
        found = problem.evaluate(jnp.array([0.0, y]), None, "test", 0)
        np.testing.assert_allclose([found["excess"], found["distance"]], 0, atol=1e-6)


# Every problem, every kind of method ----------------------------------------------------------

KINDS = {
    "sgd": {"rate": 1e-4},
    "m_svag_mb": {"rate": 1e-4, "batch_size": 4},  # per example
    "newton": {},
    "hessian_free": {},
    "levenberg_marquardt": {},
}
NEEDS_RESIDUALS = {"hessian_free", "levenberg_marquardt"}
FITTED = {"sparse_logistic", "embedding", "attention"}  # to data: no minimum is known
SMALL = {
    "sparse_logistic": {"dimension": 10, "batch_size": 2000, "l2": 0.01},
    "embedding": {"width": 2, "batch_size": 16},
    "attention": {"width": 2, "context": 4, "batch_size": 16},
}


TOO_LARGE = {("embedding", "newton"), ("attention", "newton")}  # for a dense Hessian


def pairs():
    """Problems and kinds; those of the curvature family meet every second problem."""
    for (i, problem), (k, kind) in itertools.product(
        enumerate(catalogue.problems()), enumerate(KINDS)
    ):
        is_seldom = registry.get_method(kind).family == "curvature"
        if (problem, kind) not in TOO_LARGE and not (is_seldom and (i + k) % 2):
            yield problem, kind


@pytest.mark.parametrize(("name", "method"), list(pairs()))
def test_methods_run_on_every_problem(name, method):
    """Those of the curvature family in the slow stage."""
    lacks = {"saddle": NEEDS_RESIDUALS, **{key: {"levenberg_marquardt"} for key in FITTED}}
    if method in lacks.get(name, ()):
        with pytest.raises(ValueError, match="does not have; accepted: a Problem with"):
            train(name, method)
        return
    options = dict(KINDS[method])
    if name in {"lattice", "noisy_quadratic"}:
        options["noise"] = 0.0
    if name in {"rosenbrock", "noisy_quadratic"}:
        options["dimension"] = 5
    options |= SMALL.get(name, {})
    history = train(name, method, options.pop("rate", None), **options)
    assert (history.diverged_at == 0).all()
    score = "test_loss" if name in FITTED else "test_excess"
    assert np.isfinite(history.metrics["test_loss"][0]).all()
    assert history.metrics[score][0, -1] < history.metrics[score][0, 0]


def test_the_package_itself_needs_no_extra():
    code = "import sys, optgrad.experiments; print('flax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'Problm'"):
        _ = optgrad.experiments.Problm

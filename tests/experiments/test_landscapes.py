"""Test functions and descents on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad.experiments import functions
from optgrad.experiments import landscapes as lib

LANDSCAPES = list(lib.landscapes().values())
by_landscape = pytest.mark.parametrize("landscape", LANDSCAPES, ids=lambda x: x.name)


@by_landscape
def test_minimizers_are_strict_minima_of_the_stated_value(landscape, x64):
    for minimizer in landscape.minimizers:
        point = jnp.array(minimizer)
        np.testing.assert_allclose(landscape.function(point), landscape.minimum, atol=1e-12)
        np.testing.assert_allclose(jax.grad(landscape.function)(point), 0, atol=1e-9)
        eigenvalues = np.linalg.eigvalsh(jax.hessian(landscape.function)(point))
        assert eigenvalues.min() > 0.03
        around = np.random.default_rng(0).normal(point, 0.3, (200, len(minimizer)))
        assert (landscape.function(around) > landscape.minimum).all()


# Values from the functions' definitions, by hand.
@pytest.mark.parametrize(
    ("name", "point", "value"),
    [
        ("beale", (0, 0), 1.5**2 + 2.25**2 + 2.625**2),
        ("beale", (1, 1), 1.5**2 + 2.25**2 + 2.625**2),
        ("beale", (2, -1), 2.5**2 + 2.25**2 + 1.375**2),
        ("beale_3d", (2, -1, 0), 2.5**2 + 2.25**2 + 1.375**2 + 1.5**2 + 2.25**2 + 2.625**2),
        ("rosenbrock", (0, 0), 1),
        ("rosenbrock", (-1, 2), 104),
        ("matyas", (1, 2), 0.26 * 5 - 0.96),
        ("goldstein_price", (0, 0), 600),
        ("goldstein_price", (1, 1), 1876),
        ("goldstein_price", (-0.6, -0.4), 30),  # its second-best minimum
        ("saddle", (0, 0), 1),
        ("saddle", (1, 2), 1 - 4 + 4 + 1),
    ],
)
def test_values(name, point, value):
    function = lib.landscapes()[name].function
    np.testing.assert_allclose(function(np.array(point, float)), value, rtol=1e-12)
    np.testing.assert_allclose(function(jnp.array(point, float)), value, rtol=1e-5)


@by_landscape
def test_gradients_agree_with_differences(landscape, x64):
    rng = np.random.default_rng(1)
    for point in rng.uniform(*np.array(landscape.box).T, (5, len(landscape.box))):
        gradient = jax.grad(landscape.function)(jnp.array(point))
        steps = 1e-5 * np.eye(len(point))
        f = landscape.function
        differences = [(f(point + h) - f(point - h)) / 2e-5 for h in steps]
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-4)


def test_functions_take_leading_axes():
    points = np.random.default_rng(0).normal(size=(4, 5, 3))
    values = functions.beale_3d(points)
    assert values.shape == (4, 5)
    np.testing.assert_allclose(values[1, 2], functions.beale_3d(points[1, 2]))


def test_lattice():
    lattice = lib.landscapes()["beale_3d"].lattice(5)
    assert lattice.shape == (125, 3)
    assert len(np.unique(lattice, axis=0)) == 125
    assert set(lattice.ravel()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_excess_counts_what_ended_nowhere():
    landscape = lib.landscapes()["matyas"]
    points = np.array([[0.0, 0.0], [1.0, 1.0], [np.nan, 0.0], [np.inf, 1.0], [1e30, -1e30]])
    np.testing.assert_allclose(landscape.excess(points), [1e-12, 0.04, 1e12, 1e12, 1e12])


def test_descent_follows_the_noisy_gradient_of_every_run():
    """Against a loop in NumPy, for each rate, seed and start."""
    landscape = lib.landscapes()["matyas"]
    starts, rates = landscape.lattice(2), np.array([0.1, 0.5])
    noise = lib.gaussian_noise(0, (3, 4, 7, 2), 0.1)
    found = lib.final_points(landscape, "sgd", starts, noise, sweep={"learning_rate": rates})
    assert found.shape == (2, 3, 4, 2)
    hessian = np.array([[0.52, -0.48], [-0.48, 0.52]])
    for i, rate in enumerate(rates):
        for seed in range(3):
            for j, start in enumerate(starts):
                point = start
                for added in np.asarray(noise)[seed, j]:
                    point = point - rate * (hessian @ point + added)
                np.testing.assert_allclose(found[i, seed, j], point, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["beale", "rosenbrock", "goldstein_price", "saddle"])
def test_one_program_serves_every_landscape(name):
    landscape = lib.landscapes()[name]
    start, noise = np.array([[0.3, -0.2]]), lib.gaussian_noise(1, (1, 1, 4, 2), 0.1)
    found = lib.final_points(landscape, "adam", start, noise, hyperparams={"learning_rate": 0.1})
    alone = lib.descend(
        landscape.function,
        optgrad.create("adam", learning_rate=0.1),
        jnp.array(start[0]),
        noise[0, 0],
    )
    np.testing.assert_allclose(found[0, 0, 0], alone.params, rtol=1e-5, atol=1e-6)


def test_noise_has_the_deviation():
    noise = np.asarray(lib.gaussian_noise(0, (20_000, 2), 0.25))
    np.testing.assert_allclose(noise.std(), 0.25, rtol=0.02)
    np.testing.assert_allclose(noise.mean(), 0, atol=0.005)

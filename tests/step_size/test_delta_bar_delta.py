"""Delta-bar-delta against its rule in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

from . import curvature_runs as runs


def box(single, kappa=1e-3, phi=0.1, theta=0.7, initial_rate=0.01):
    """The test uses the old average, the step the new rate."""
    e, average = np.full(runs.SIZE, initial_rate), np.zeros(runs.SIZE)

    def step(w, t):
        nonlocal e, average
        g = single.gradient(w, t)
        for i in range(runs.SIZE):
            if average[i] * g[i] > 0:
                e[i] += kappa
            elif average[i] * g[i] < 0:
                e[i] *= 1 - phi
        average = (1 - theta) * g + theta * average
        return -e * g

    return step


@pytest.mark.parametrize(
    "options",
    [{}, {"kappa": 0.02, "phi": 0.3}, {"theta": 0.0, "initial_rate": 0.2}, {"phi": 0.0}],
)
def test_follows_the_rule(x64, options):
    """On a noisy linear model."""
    single = runs.stream()
    runs.assert_follows(optgrad.delta_bar_delta(**options), box(single, **options), ())


def test_rates_by_hand():
    """The old average decides, the new rate steps; a gradient of 0 changes nothing."""
    optimizer = optgrad.delta_bar_delta(0.5, 0.25, 0.5, initial_rate=1.0)
    state = optimizer.init(jnp.zeros(()))
    rates, steps = [], []
    for gradient in (2.0, 2.0, -1.0, -1.0, 0.0, -1.0):  # averages 1, 3/2, 1/4, −3/8, −3/16
        updates, state = optimizer.update(jnp.array(gradient), state)
        rates.append(float(state.rate))
        steps.append(float(updates))
    assert rates == [1.0, 1.5, 1.125, 0.84375, 0.84375, 1.34375]
    assert steps == [-2.0, -3.0, 1.125, 0.84375, 0.0, 1.34375]


def test_tiny_gradients_count_by_their_sign():
    """Their product underflows."""
    optimizer = optgrad.delta_bar_delta(0.5, initial_rate=1.0)
    state = optimizer.init(jnp.zeros(2))
    for gradient in ([1e-30, 1e-30], [1e-30, -1e-30]):
        _, state = optimizer.update(jnp.array(gradient), state)
    np.testing.assert_allclose(state.rate, [1.5, 0.9])


def test_least_squares_table(x64):
    """0.015 / 2.2e-3 / 0 in the specification, which does not say κ; 1e-3 fits."""
    optimizer = optgrad.delta_bar_delta()
    assert runs.is_within(runs.excess(optimizer, 1, 5000)[0], 0.015)
    assert runs.is_within(runs.excess(optimizer, 20, 5000)[0], 2.2e-3)
    assert runs.excess(optimizer, None, 2000)[0].max() < 1e-17


def test_rosenbrock(x64):
    """3e-22 in the specification."""
    assert runs.on_rosenbrock(optgrad.delta_bar_delta(1e-5, initial_rate=1e-3)) < 1e-20


def test_noise_sets_the_rates(x64):
    """Signs at random: growth κ/2 and decay φ·ε/2 on average, whatever the curvature."""
    optimizer = optgrad.delta_bar_delta(1e-3, 0.1)

    def body(state, gradient):
        _, state = optimizer.update(gradient, state)
        return state, state.rate

    gradients = jax.random.normal(jax.random.key(0), (3000, 50)) * jnp.logspace(-2, 2, 50)
    _, rates = jax.lax.scan(body, optimizer.init(jnp.zeros(50)), gradients)
    np.testing.assert_allclose(np.mean(rates[500:], axis=0), 0.01, rtol=0.3)


def test_diagnostics():
    """The range of the rates."""
    optimizer = optgrad.delta_bar_delta(initial_rate=0.2)
    found = optgrad.diagnostics(optimizer.init(jnp.zeros(3)))
    assert sorted(found) == ["step_size_geomean", "step_size_max", "step_size_min"]
    np.testing.assert_allclose(list(found.values()), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kappa": -1.0},
        {"phi": 1.0},
        {"phi": -0.1},
        {"theta": 1.0},
        {"initial_rate": 0.0},
        {"state_dtype": "int32"},
    ],
)
def test_wrong_arguments(arguments):
    """Refused at the door, by name."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optgrad.delta_bar_delta(**arguments)

"""Frequent small and rare large steps, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad


def loop(gradients, rate, large, period):
    """The updates, from all gradients since the last large step."""
    updates, since = [], []
    for t, g in enumerate(gradients, start=1):
        since.append(g)
        update = -rate * g
        if t % period == 0:
            update = update - rate * large * np.mean(since, axis=0)
            since = []
        updates.append(update)
    return np.array(updates)


@pytest.mark.parametrize(("large", "period"), [(5.0, 10), (2.0, 3), (0.0, 4), (1.5, 1)])
def test_loop(x64, large, period):
    """Entry by entry, several periods long."""
    gradients = np.random.default_rng(0).normal(size=(31, 4))
    optimizer = optgrad.momentum_sgd_hybrid(0.1, large, period=period)

    def step(state, g):
        updates, state = optimizer.update(g, state)
        return state, updates

    _, updates = jax.lax.scan(step, optimizer.init(jnp.zeros(4)), jnp.asarray(gradients))
    np.testing.assert_allclose(updates, loop(gradients, 0.1, large, period), atol=1e-12)


def test_without_large_steps_it_is_sgd():
    """Λ = 0."""
    optimizer, sgd = optgrad.momentum_sgd_hybrid(0.3, 0.0), optax.sgd(0.3)
    g = jnp.array([1.0, -2.0])
    state, sgd_state = optimizer.init(g), sgd.init(g)
    for _ in range(12):
        updates, state = optimizer.update(g, state)
        expected, sgd_state = sgd.update(g, sgd_state)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_a_nan_is_forgotten_with_its_period():
    """What was not finite in one period leaves no trace in the next."""
    optimizer = optgrad.momentum_sgd_hybrid(0.1, period=2)
    state = optimizer.init(jnp.zeros(2))
    for value in (jnp.nan, 1.0, 1.0, 1.0):
        updates, state = optimizer.update(jnp.array([value, 1.0]), state)
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("arguments", [{"large": -1.0}, {"period": 0}])
def test_wrong_arguments(arguments):
    """Refused at the door, by name."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optgrad.momentum_sgd_hybrid(0.1, **arguments)

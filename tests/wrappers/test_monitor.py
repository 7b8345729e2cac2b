"""`monitor`: its numbers, intervals and sample, and under scan, vmap and other wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import problem

import optgrad

CURVATURE = jnp.array([0.5, 1.0, 2.0, 8.0], jnp.float32)


def run(optimizer, steps, start=1.0):
    """The states after every step on a quadratic, stacked."""
    params = jnp.full(4, start, jnp.float32)

    def step(carry, _):
        params, state = carry
        gradient = CURVATURE * params
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (state, updates, params)

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


def at(states, t):
    return jax.tree.map(lambda x: x[t], states)


# The numbers ----------------------------------------------------------------------------------


def test_an_interval_by_hand():
    """Minimum, mean, maximum and quantiles in NumPy, of the second interval of three."""
    optimizer = optgrad.monitor(
        optax.sgd(0.1), ["update", "relative_update"], interval=4, quantiles=(0.0, 0.3, 1.0)
    )
    states, updates, params = run(optimizer, 11)
    found = optgrad.monitored(at(states, 10))
    sizes = np.abs(np.asarray(updates, np.float64))[4:8]
    for name, x in (("update", sizes), ("relative_update", sizes / np.asarray(params)[4:8])):
        summary = found[name]
        np.testing.assert_allclose(summary.min, x.min(), rtol=1e-5)
        np.testing.assert_allclose(summary.max, x.max(), rtol=1e-5)
        np.testing.assert_allclose(summary.mean, x.mean(), rtol=1e-5)
        quantiles = np.quantile(x, [0.0, 0.3, 1.0], axis=1).mean(axis=1)
        np.testing.assert_allclose(summary.quantiles, quantiles, rtol=1e-5)
    np.testing.assert_array_equal(states.intervals, np.arange(1, 12) // 4)
    np.testing.assert_array_equal(states.step, np.arange(1, 12) % 4)


def test_before_the_first_interval():
    optimizer = optgrad.monitor(optax.sgd(0.1), interval=4)
    found = optgrad.monitored(at(run(optimizer, 3)[0], 2))
    assert np.isnan(np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])).all()


def test_the_updates_are_those_of_the_wrapped():
    inner = optgrad.adaptive_sgd()
    np.testing.assert_array_equal(run(optgrad.monitor(inner), 9)[1], run(inner, 9)[1])


def test_modelled_curvatures():
    """|c|/v and v/|c| of the state."""
    states, *_ = run(optgrad.monitor(optgrad.ogr_diagonal(), interval=1), 7)
    state = at(states, -1)
    curvature = np.abs(state.inner.covariance) / state.inner.position_variance
    found = optgrad.monitored(state)
    for name, x in (("curvature", curvature), ("step_size", 1 / curvature)):
        expected = [x.min(), x.mean(), x.max()]
        np.testing.assert_allclose(np.stack(found[name][:3]), expected, rtol=1e-5)


def test_relative_variance():
    """Of gradients with the mean 1 and the deviation 2 in one coordinate, and 0 in the other."""
    optimizer = optgrad.monitor(optgrad.svag(0.0, beta=0.999), interval=2000)
    noise = jax.random.rademacher(jax.random.key(0), (2000,), jnp.float32)
    gradients = jnp.stack([1 + 2 * noise, jnp.ones_like(noise)], axis=1)

    def step(state, g):
        return optimizer.update(g, state, jnp.zeros(2))[1], None

    state = jax.lax.scan(step, optimizer.init(jnp.zeros(2)), gradients)[0]
    last = optgrad.per_parameter(state.inner)
    np.testing.assert_allclose(last["relative_variance"], [4.0, 0.0], atol=0.8)
    np.testing.assert_allclose(
        last["variance_adaptation"], 1 / (1 + last["relative_variance"]), rtol=1e-6
    )
    found = optgrad.monitored(state)
    assert float(found["relative_variance"].min) == 0.0
    assert float(found["variance_adaptation"].max) == 1.0


def test_what_is_not_finite_is_left_out():
    """Also a quantity that has nothing at some steps, and one that never has anything."""

    def read(state):
        t = state.count
        return {
            "a": jnp.where(t == 2, jnp.nan, jnp.stack([t * 1.0, jnp.inf])),
            "b": jnp.zeros((0, 2)),
        }

    fields = {"mixed": read, "never": lambda state: jnp.full(3, jnp.nan), "none": lambda state: {}}
    inner = optgrad.adaptive_sgd()
    found = optgrad.monitored(at(run(optgrad.monitor(inner, fields, interval=3), 3)[0], -1))
    assert [float(x) for x in found["mixed"][:3]] == [1.0, 2.0, 3.0]
    np.testing.assert_allclose(found["mixed"].quantiles, 2.0)
    for name in ("never", "none"):
        assert np.isnan(np.asarray(found[name].mean))


# The sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(10_000,), (100, 100), (1, 10_000), (10, 10, 10, 10), (7, 1_429), (3, 3, 33, 33)]
)
def test_quantiles_of_a_sample(shape):
    """Within three standard deviations of those of all, from about as many entries as asked."""
    x = jax.random.normal(jax.random.key(1), shape)
    optimizer = optgrad.monitor(optax.sgd(1.0), interval=1, quantiles=(0.1, 0.5), sample=500)
    state = optimizer.update(x, optimizer.init(x), x)[1]
    found = np.asarray(optgrad.monitored(state)["update"].quantiles)
    sizes = np.abs(np.asarray(x)).ravel()
    for p, value in zip((0.1, 0.5), found, strict=True):
        assert abs(np.mean(sizes <= value) - p) < 3 * np.sqrt(p * (1 - p) / 250)


def test_every_leaf_is_in_the_sample():
    params = {"large": jnp.zeros(100_000), "small": jnp.zeros(3)}
    optimizer = optgrad.monitor(optax.sgd(1.0), interval=1, quantiles=(1.0,), sample=100)
    g = {"large": jnp.zeros(100_000), "small": jnp.full(3, 5.0)}
    state = optimizer.update(g, optimizer.init(params), params)[1]
    assert float(optgrad.monitored(state)["update"].quantiles[0]) == 5.0


# Under transformations ------------------------------------------------------------------------


def test_vmap_and_fixed_types():
    optimizer = optgrad.monitor(optgrad.m_svag(0.1), interval=2)
    states, *_ = jax.vmap(functools.partial(run, optimizer, 6))(jnp.array([1.0, 3.0]))
    one = run(optimizer, 6, 3.0)[0]
    problem.assert_close(jax.tree.map(lambda x: x[1], states), one)
    assert optgrad.monitored(states)["update"].quantiles.shape == (2, 6, 3)
    params = jnp.ones(4)
    state = optimizer.init(params)
    assert problem.avals(optimizer.update(params, state, params)[1]) == problem.avals(state)


def test_with_a_guard_and_accumulation():
    """Rejected steps are a quantity like others, and a snapshot's record is not reported."""
    guarded = optgrad.guard(optgrad.adaptive_sgd(), rollback_after=3)
    optimizer = optgrad.monitor(guarded, ["rejected_steps", "step_size"], interval=2)
    params = jnp.ones(4)
    state = optimizer.init(params)
    for g in (params, jnp.full(4, jnp.nan)):
        _, state = optimizer.update(g, state, params)
    assert float(optgrad.monitored(state)["rejected_steps"].max) == 1.0
    inside = optgrad.MultiSteps(
        optgrad.guard(optgrad.monitor(optax.sgd(0.1), interval=1), rollback_after=2), 2
    )
    assert [*optgrad.monitored(inside.init(params))] == ["update"]


def test_two_in_a_chain():
    both = optax.chain(
        optgrad.monitor(optax.scale(2.0), interval=1), optgrad.monitor(optax.scale(3.0), interval=1)
    )
    _, state = both.update(jnp.ones(2), both.init(jnp.ones(2)))
    found = optgrad.monitored(state)
    assert {name: float(x.max) for name, x in found.items()} == {"update": 2.0, "update_2": 6.0}


def test_bfloat16_parameters():
    params = jnp.ones(4, jnp.bfloat16)
    optimizer = optgrad.monitor(optgrad.adaptive_sgd(), interval=1)
    state = optimizer.update(params, optimizer.init(params), params)[1]
    found = optgrad.monitored(state)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


# What is refused ------------------------------------------------------------------------------


def test_unknown_field():
    with pytest.raises(ValueError, match=r"fields = 'step_sise' .*'step_size'"):
        optgrad.monitor(optgrad.adaptive_sgd(), ["step_sise"]).init(jnp.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": "update"}, "fields = 'update' is a string"),
        ({"interval": 0}, "interval = 0 is not accepted"),
        ({"sample": 0}, "sample = 0 is not accepted"),
        ({"quantiles": (0.5, 1.5)}, "quantiles = 1.5 is outside its range"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optgrad.monitor(optax.sgd(0.1), **arguments)


def test_no_monitor_in_a_state():
    with pytest.raises(ValueError, match="state has no monitor in it"):
        optgrad.monitored(optax.sgd(0.1).init(jnp.ones(2)))


def test_relative_update_needs_parameters():
    optimizer = optgrad.monitor(optax.sgd(0.1), ["relative_update"])
    with pytest.raises(ValueError, match="params"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))

"""IDBD against Sutton's rule in NumPy, and on his tracking task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import curvature_runs as runs

FEATURES, CURVATURE = ("features",), ("curvature_diagonal",)


def box(single, eta, initial_rate=0.05, clip=2.0, floor=-10.0):
    """β += clip(−ηgh), α = e^β, w −= αg, h = h·max(1 − αc, 0) − αg."""
    beta, h = np.full(runs.SIZE, np.log(initial_rate)), np.zeros(runs.SIZE)

    def step(w, t):
        nonlocal beta, h
        g, c = single.gradient(w, t), single.curvature(t)
        beta = np.maximum(beta + np.clip(-eta * g * h, -clip, clip), floor)
        alpha = np.exp(beta)
        h = h * np.maximum(1 - alpha * c, 0) - alpha * g
        return -alpha * g

    return step


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.01},
        {"eta": 0.1, "initial_rate": 0.3},  # α·c > 1 now and then
        {"eta": 0.3, "clip": 0.02},
        {"eta": 0.3, "floor": -3.0},
        {"eta": 0.0},
    ],
)
def test_follows_the_rule(x64, options):
    """With the curvature of minibatches."""
    single = runs.stream()
    state = runs.assert_follows(optgrad.idbd(**options), box(single, **options), CURVATURE)
    rates = np.asarray(runs.flat(state.rate))
    start = options.get("initial_rate", 0.05)
    assert np.all(rates == pytest.approx(start)) if options["eta"] == 0 else np.ptp(rates) > 1e-4


def test_features_of_one_sample(x64):
    """LMS: c = x², −g = δx."""
    single = runs.stream(examples=1)
    runs.assert_follows(optgrad.idbd(0.05), box(single, 0.05), FEATURES, single)


def test_curvature_is_preferred():
    """Where both are given."""
    optimizer, one = optgrad.idbd(), jnp.ones(1)
    state = optimizer.init(one)
    states = [
        optimizer.update(one, state, **extras)[1]
        for extras in (
            {"curvature_diagonal": 4 * one},
            {"curvature_diagonal": 4 * one, "features": 5 * one},
            {"features": 2 * one},
        )
    ]
    updated = [optimizer.update(one, s, features=3 * one)[1].trace for s in states]
    np.testing.assert_array_equal(updated[0], updated[1])
    np.testing.assert_array_equal(updated[0], updated[2])


def tracking_task(steps=20_000, seed=0):
    """Twenty inputs, five of them relevant; every 20 samples one of the five changes its sign."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(steps, 20))
    signs = np.ones((steps // 20, 5))
    signs[np.arange(steps // 20), rng.integers(0, 5, steps // 20)] = -1
    signs = np.repeat(np.cumprod(signs, axis=0), 20, axis=0)
    return jnp.asarray(inputs), jnp.asarray(np.sum(inputs[:, :5] * signs, axis=1))


def track(optimizer):
    """Mean squared error over the second half, and the last state."""

    def body(carry, example):
        w, state = carry
        x, y = example
        error = w @ x - y
        updates, state = optimizer.update(error * x, state, w, features=x)
        return (w + updates, state), error**2

    w = jnp.zeros(20)
    (_, state), errors = jax.lax.scan(body, (w, optimizer.init(w)), tracking_task())
    return jnp.mean(errors[errors.size // 2 :]), state


def test_sutton_tracking_task(x64):
    """Less than half of the best fixed rate's error, and rates that tell what is relevant."""

    def lms(rate):
        return track(optax.with_extra_args_support(optax.sgd(rate)))[0]

    rates = jnp.array([0.01, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.07])
    best = np.min(jax.jit(jax.vmap(lms))(rates))
    assert 3.2 < best < 3.5
    error, state = jax.jit(lambda: track(optgrad.idbd(0.01)))()
    assert error < best / 2
    assert np.min(state.rate[:5]) > 8 * np.max(state.rate[5:])
    geomeans = [np.exp(np.mean(np.log(x))) for x in (state.rate[:5], state.rate[5:])]
    assert geomeans[0] > 10 * geomeans[1]


def test_eta_scales_like_the_inverse_square_of_gradients(x64):
    """A loss times 100, rates over 100: the same path with η times 1/100² · 100."""
    optimizer, other = optgrad.idbd(0.1), optgrad.idbd(0.001, initial_rate=5e-4)
    w = jnp.array([1.0, -2.0])
    first, second = [w, optimizer.init(w)], [w, other.init(w)]
    for t in range(30):
        for run, rule, scale in ((first, optimizer, 1.0), (second, other, 100.0)):
            gradient = scale * (run[0] - 0.1 * t)
            curvature = jnp.full(2, scale)
            updates, run[1] = rule.update(gradient, run[1], curvature_diagonal=curvature)
            run[0] = run[0] + updates
    np.testing.assert_allclose(first[0], second[0], rtol=1e-10)
    assert np.abs(first[1].rate / 0.05 - 1).max() > 0.05


def test_least_squares_table(x64):
    """The specification's row 8.4e-3 / 3.2e-3 / 0.018 is that of an initial rate of 0.02.

    With 0.05, as it says, the second and third numbers are smaller.
    """
    optimizer = optgrad.idbd(0.01, initial_rate=0.02)
    for batch, steps, expected in ((1, 5000, 8.4e-3), (20, 5000, 3.2e-3), (None, 2000, 0.018)):
        assert runs.is_within(runs.excess(optimizer, batch, steps, CURVATURE)[0], expected)
    found, state = runs.excess(optgrad.idbd(), None, 2000, CURVATURE)
    assert not runs.is_within(found, 0.018)
    assert np.max(state.rate) < 0.05 * 1.5  # gradients are small: little is learned


def test_rosenbrock(x64):
    """2e-10 in the specification, with an initial rate of 0.001."""
    assert 1e-10 < runs.on_rosenbrock(optgrad.idbd(0.01, initial_rate=1e-3)) < 4e-10


def test_bounds():
    """β does not fall below the floor nor α rise above the cap, in any number of steps."""
    optimizer = optgrad.idbd(1.0, initial_rate=0.1, floor=-4.0, max_rate=0.5)
    state = optimizer.init(jnp.zeros(2))
    for t in range(60):
        gradient = jnp.array([3.0, 3.0 * (-1) ** t])
        updates, state = optimizer.update(gradient, state, curvature_diagonal=jnp.zeros(2))
    np.testing.assert_allclose(state.rate, [0.5, np.exp(-4.0)], rtol=1e-6)
    assert updates[0] == pytest.approx(-1.5)


@pytest.mark.parametrize("size", [1e-30, 1e15])
@pytest.mark.parametrize("curvature", [0.0, 1.0, 1e15])
def test_rates_stay_finite(size, curvature):
    """Gradients of one sign, without end."""
    optimizer = optgrad.idbd()

    def body(state, _):
        extras = {"curvature_diagonal": jnp.full(2, curvature)}
        updates, state = optimizer.update(jnp.full(2, size), state, **extras)
        return state, updates

    state, updates = jax.lax.scan(body, optimizer.init(jnp.zeros(2)), None, 300)
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(state.rate))
    assert np.all(np.isfinite(state.trace))


def test_diagnostics():
    """The range of the rates."""
    state = optgrad.idbd().init({"a": jnp.zeros(2), "b": jnp.zeros(())})
    state = state._replace(rate={"a": jnp.array([0.1, 0.4]), "b": jnp.array(0.2)})
    found = optgrad.diagnostics(state)
    assert {k: pytest.approx(float(v)) for k, v in found.items()} == {
        "step_size_geomean": 0.2,
        "step_size_min": 0.1,
        "step_size_max": 0.4,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"eta": -1.0},
        {"initial_rate": 0.0},
        {"clip": 0.0},
        {"floor": float("inf")},
        {"max_rate": 0.0},
        {"state_dtype": "int32"},
    ],
)
def test_wrong_arguments(arguments):
    """Refused at the door, by name."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optgrad.idbd(**arguments)


@pytest.mark.parametrize("name", ["features", "curvature_diagonal"])
@pytest.mark.parametrize("wrong", [jnp.ones(3), {"a": jnp.ones(2)}, jnp.ones(())])
def test_wrong_shapes(name, wrong):
    """Refused by name, with what is accepted."""
    optimizer = optgrad.idbd()
    with pytest.raises(ValueError, match=rf"{name} has leaves of shapes .*accepted.*\(2,\)"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)), **{name: wrong})

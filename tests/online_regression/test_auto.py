"""`auto`: its formulas, what it promises about units, and where noise alone leaves the path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import coordinates as co


def noise_constant(decay_x, decay):
    """c from the impulse response: noise -> average -> sum -> distance from its average."""
    average, distance, c = 0.0, 0.0, 0.0
    for t in range(20_000):
        average = decay * average + (1 - decay) * (t == 0)
        distance = decay_x * (distance + average)
        c += distance**2
    return c


class Box:
    """The docstring's formulas in float64, for one tensor; the order is that of a step."""

    def __init__(
        self, theta, beta=0.9, rate_v=0.99, rate_x=0.99, rate_s=0.97, initial=0.05, search=100.0,
        total=None, decay=0.0,
    ):  # fmt: skip
        self.rates, self.search, self.total = (rate_v, rate_x, rate_s), search, total
        self.beta, self.decay = beta, decay
        self.mean, self.m, self.v = np.array(theta), np.zeros_like(theta), np.zeros_like(theta)
        size = np.sqrt(np.mean(np.square(theta)))
        self.s = initial * (size if size > 0 else 0.2)
        self.c = noise_constant(rate_x, beta)
        self.t = 0

    def __call__(self, theta, g):
        seen = g != 0
        rate_v, rate_x, rate_s = self.rates
        self.t += 1
        self.mean = np.where(seen, rate_x * self.mean + (1 - rate_x) * theta, self.mean)
        if self.t > 1 and seen.any():
            spread = np.mean((theta - self.mean)[seen] ** 2)
            self.s = np.sqrt(rate_s * self.s**2 + (1 - rate_s) * spread)
        self.m = np.where(seen, self.beta * self.m + (1 - self.beta) * g, self.m)
        self.v = np.where(seen, rate_v * self.v + (1 - rate_v) * (g - self.m) ** 2, self.v)
        m, v = self.m / (1 - self.beta**self.t), self.v / (1 - rate_v**self.t)
        gain = 1 + self.search / (self.t + self.search / 2)
        if self.total:
            left = min(1, (self.total - self.t + 1) / (self.total / 2))
            gain = (gain + 1) * max(0, left) ** 2
        length = np.sqrt(gain / self.c) * self.s
        direction = m / np.sqrt(np.where(seen, v + m**2, 1))
        return np.where(seen, -length * (direction + self.decay * theta), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seen", [1.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"total_steps": 50}, {"weight_decay": 0.1}, {"beta": 0.5, "beta_position": 0.9},
     {"beta_variance": 0.9, "beta_spread": 0.9, "initial_spread": 0.3, "search_steps": 10.0}],
    ids=lambda x: "-".join(x) or "defaults",
)  # fmt: skip
@pytest.mark.parametrize("form", ["mean", "displacement", "trusted"])
def test_the_formulas(options, seen, form):
    problem = co.noisy_quadratic(seen=seen)
    names = {
        "beta_variance": "rate_v", "beta_position": "rate_x", "beta_spread": "rate_s",
        "initial_spread": "initial", "search_steps": "search", "total_steps": "total",
        "weight_decay": "decay",
    }  # fmt: skip
    box = Box(problem[1], **{names.get(key, key): x for key, x in options.items()})
    found, _ = co.run(optgrad.auto(**options, position=form), *problem)
    np.testing.assert_allclose(found, co.run_box(box, *problem), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_each_tensor_has_its_own_spread():
    first, second = co.noisy_quadratic(), co.noisy_quadratic(seed=1)
    optimizer = optgrad.auto()

    def step(carry, noises):
        params, state = carry
        grads = {"a": first[0] * params["a"], "b": 7 * second[0] * params["b"]}
        grads = jax.tree.map(jnp.add, grads, {"a": noises[0], "b": 7 * noises[1]})
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = {"a": jnp.asarray(first[1]), "b": jnp.asarray(second[1])}
    _, path = jax.lax.scan(step, (params, optimizer.init(params)), (first[2], second[2]))
    path = np.stack([path["a"], path["b"]])
    alone = np.stack([co.run(optimizer, *problem)[0] for problem in (first, second)])
    np.testing.assert_allclose(path[0], alone[0], rtol=1e-10)
    np.testing.assert_allclose(path[1], alone[1], rtol=1e-9)  # and units of the loss do not matter


@pytest.mark.parametrize("unit", [2.0**10, 2.0**-10])
def test_units_do_not_matter(unit):
    """A loss in other units changes no bit; parameters in others are the same path in these."""
    problem = co.noisy_quadratic()
    curvature, start, noises, visible = problem
    plain, _ = co.run(optgrad.auto(), *problem)
    loss, _ = co.run(optgrad.auto(), unit * curvature, start, unit * noises, visible)
    np.testing.assert_array_equal(loss, plain)
    longer, _ = co.run(optgrad.auto(), curvature / unit, unit * start, noises, visible)
    np.testing.assert_array_equal(longer, unit * plain)


def test_no_entry_moves_farther_than_the_step_length():
    """α_t·s, reached by the first step."""
    curvature, params, noises, _ = co.noisy_quadratic(noise=3.0)
    params, optimizer = jnp.asarray(params), optgrad.auto()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t, noise in enumerate(noises[:30], 1):
        updates, state = update(curvature * params + noise, state, params)
        gain = 1 + 100 / (t + 50)
        length = np.sqrt(gain / noise_constant(0.99, 0.9)) * state.spread[0]
        assert np.abs(updates).max() <= length * (1 + 1e-5)
        if t == 1:
            np.testing.assert_allclose(np.abs(updates), length / np.sqrt(1.81), rtol=1e-5)
        params = optax.apply_updates(params, updates)


def spread_after(steps, search_steps=0.0, drift=0.0, **options):
    """s of a large tensor after gradients of white noise and a common drift, relative to s₀."""
    optimizer = optgrad.auto(search_steps=search_steps, **options)
    params = jnp.ones(4000)

    def step(carry, key):
        params, state = carry
        gradient = drift + jax.random.normal(key, params.shape)
        updates, state = optimizer.update(gradient, state, params)
        return (params + updates, state), state.spread[0]

    keys = jax.random.split(jax.random.key(0), steps)
    _, spreads = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return float(spreads[-1] / 0.05)


def test_noise_alone_leaves_the_path_as_wide_as_it_is_and_drift_widens_it():
    """κ = 1 is the edge: within a factor over 2,000 steps, in which κ = 1.3 would make e⁸."""
    assert 0.2 < spread_after(2000) < 2
    assert spread_after(300, drift=0.3) > 100


def test_steps_fall_with_the_number_of_steps_in_the_noise_around_a_minimum():
    """f − f* at 500, 2,000 and 8,000 steps: 1/t up to a factor; a constant rate stays."""
    _, path = co.chains(optgrad.auto(), 8000)
    loss = np.square(np.asarray(path)).mean(axis=1)
    averages = [loss[t - t // 5 : t].mean() for t in (500, 2000, 8000)]
    assert averages[0] > 2 * averages[1] > 4 * averages[2]


def test_a_tensor_without_gradients_keeps_its_spread():
    optimizer = optgrad.auto()
    params = {"used": jnp.ones(3), "unused": jnp.ones(3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(50):
        grads = {"used": params["used"], "unused": jnp.zeros(3)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert state.spread[0] == np.float32(0.05)  # "unused": leaves are in the order of their names
    assert state.spread[1] != np.float32(0.05)
    np.testing.assert_array_equal(params["unused"], 1.0)


def test_initial_spreads_follow_the_tensors():
    params = {"a": jnp.full(4, 2.0), "b": jnp.zeros(12), "c": jnp.full(4, 1e-9)}
    spread = optgrad.auto().init(params).spread
    np.testing.assert_allclose(spread, [0.1, 0.1 / 5**0.5, 0.1 / 5**0.5], rtol=1e-6)
    np.testing.assert_allclose(optgrad.auto().init(jnp.zeros(3)).spread, [0.01], rtol=1e-6)
    np.testing.assert_allclose(optgrad.auto().init(jnp.full(3, jnp.inf)).spread, [0.01], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["mean", "displacement", "trusted"])
def test_the_mean_position_is_an_average_of_the_parameters(form):
    curvature, start, noises, visible = co.noisy_quadratic()
    path, state = co.run(optgrad.auto(position=form), curvature, start, noises, visible)
    mean = start
    for theta in path if form == "trusted" else path[:-1]:
        mean = 0.99 * mean + 0.01 * theta
    if form == "trusted":  # the distance from the mean before it contains the last position
        mean = (mean - 0.01 * path[-1]) / 0.99
    found = optgrad.mean_position({"inner": state}, jnp.asarray(path[-1]), form)
    np.testing.assert_allclose(found, mean, rtol=1e-9)


def test_nothing_moves_after_the_planned_end():
    problem = co.noisy_quadratic(steps=60)
    path, _ = co.run(optgrad.auto(total_steps=40), *problem)
    assert (np.abs(np.diff(path[:40], axis=0)).min(axis=1) > 0).all()
    np.testing.assert_array_equal(path[40:], np.broadcast_to(path[39], path[40:].shape))


@pytest.mark.parametrize("form", ["mean", "displacement", "trusted"])
def test_long_runs_stay_finite(form):
    """A spread that falls to 0 after the planned end, or grows on a slope without end."""

    def followed(slope, **options):
        optimizer = optgrad.auto(position=form, **options)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(slope(params), state, params)
            return (params + updates, state), None

        params = jnp.ones(3)
        return jax.lax.scan(step, (params, optimizer.init(params)), length=10_000)[0]

    for slope, options in ((lambda x: x, {"total_steps": 100}), (lambda x: -jnp.ones(3), {})):
        params, state = followed(slope, **options)
        assert jnp.isfinite(params).all()
        assert (jnp.isfinite(state.spread) & (state.spread > 0)).all()


def test_a_gradient_that_is_not_a_number_is_seen():
    optimizer, params = optgrad.auto(), jnp.ones(2)
    updates, _ = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(params), params)
    np.testing.assert_array_equal(np.isnan(updates), [False, True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, r"total_steps = 0 is outside its range \[1, inf\)"),
        ({"weight_decay": -1.0}, r"weight_decay = -1.0 is outside"),
        ({"beta": 1.0}, r"beta = 1.0 is outside its range \[0, 1\)"),
        ({"beta_position": 0.0}, r"beta_position = 0.0 is outside its range \(0, 1\)"),
        ({"beta_spread": 1.0}, r"beta_spread = 1.0 is outside"),
        ({"initial_spread": 0.0}, r"initial_spread = 0.0 is outside"),
        ({"search_steps": -1.0}, r"search_steps = -1.0 is outside"),
        ({"position": "median"}, "position"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        optgrad.auto(**options)


def test_missing_parameters_and_states():
    optimizer = optgrad.auto()
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="holds none of auto"):
        optgrad.mean_position(optax.sgd(0.1).init(params), params)

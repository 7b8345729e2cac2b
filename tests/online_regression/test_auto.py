"""`auto`: its formulas, what it promises about units, and where noise alone leaves the path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import coordinates as co


class Box:
    """The docstring's formulas in float64, for one tensor; the order is that of a step."""

    def __init__(
        self, theta, beta=0.9, rate_v=0.99, rate_x=0.99, speed=0.02, initial=0.01, search=100.0,
        total=None, decay=0.0,
    ):  # fmt: skip
        self.beta, self.rate_v, self.rate_x, self.speed = beta, rate_v, rate_x, speed
        self.search, self.total, self.decay = search, total, decay
        self.mean, self.m, self.v = np.array(theta), np.zeros_like(theta), np.zeros_like(theta)
        size = np.sqrt(np.mean(np.square(theta)))
        self.size = initial * (size if size > 0 else 0.2)
        self.direction, self.square, self.product, self.part = 0 * theta, 0.0, 0.0, 1.0
        self.scale, self.old_scale, self.t = 0.0, 0.0, 0

    def average(self, x):
        return np.sum(self.v * x) / np.sum(self.v)

    def __call__(self, theta, g):
        ratio, number = self.ratio(theta)
        return self.step(theta, g, ratio, number / (number + 10))

    def ratio(self, theta):
        """ρ of the new position, and the number n of entries as far as they count."""
        self.t += 1
        self.mean = self.rate_x * self.mean + (1 - self.rate_x) * theta
        ratio, number = 1.0, 0.0
        if self.t > 1:
            number = np.sum(self.v) ** 2 / np.sum(self.v**2)
            part, energy = self.part, self.average(self.direction**2)
            both = self.square + 2 * part * self.product + part**2 * energy
            self.square = self.rate_x**2 * both
            fallen = np.sqrt(self.old_scale / self.scale) if self.t > 2 else 1
            self.product = self.rate_x * self.beta * fallen * (self.product + part * energy)
            self.old_scale = self.scale
            ratio = self.average((theta - self.mean) ** 2) / self.size**2 / self.square
            ratio = min(ratio, 10)
        return ratio, number

    def step(self, theta, g, ratio, trust):
        """The update, with ρ and what multiplies a as they come from all tensors."""
        gain = 1 + self.search / (self.t + self.search / 2)
        exponent = gain * ratio - 1
        if self.total and ratio < 1:
            if ratio < 1 / (gain + 1):
                exponent = (gain + 1) * ratio - 1
            else:
                exponent = max(0, gain * ratio - 1 + ratio * (1 - ratio))
        exponent = min(exponent, 9)
        if self.t > 1:
            self.size *= np.exp(self.speed * trust * exponent)
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.v = self.rate_v * self.v + (1 - self.rate_v) * (g - self.m) ** 2
        m, v = self.m / (1 - self.beta**self.t), self.v / (1 - self.rate_v**self.t)
        square = v + m**2
        self.direction = np.where(square > 0, m / np.sqrt(np.where(square > 0, square, 1)), 0)
        self.scale = np.mean(square)
        left = 1 if not self.total else (self.total - self.t + 1) / (self.total / 2)
        self.part = min(1, max(0, left))
        return -self.part * self.size * (self.direction + self.decay * theta)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seen", [1.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"total_steps": 50}, {"weight_decay": 0.1}, {"beta": 0.5, "beta_position": 0.9},
     {"beta_variance": 0.9, "adaptation": 0.1, "initial_step": 0.3, "search_steps": 10.0}],
    ids=lambda x: "-".join(x) or "defaults",
)  # fmt: skip
@pytest.mark.parametrize("form", ["mean", "displacement", "trusted"])
def test_the_formulas(options, seen, form):
    problem = co.noisy_quadratic(seen=seen)
    names = {
        "beta_variance": "rate_v", "beta_position": "rate_x", "adaptation": "speed",
        "initial_step": "initial", "search_steps": "search", "total_steps": "total",
        "weight_decay": "decay",
    }  # fmt: skip
    box = Box(problem[1], **{names.get(key, key): x for key, x in options.items()})
    found, _ = co.run(optgrad.auto(**options, position=form), *problem)
    np.testing.assert_allclose(found, co.run_box(box, *problem), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_several_tensors():
    """Each has a step size; ρ is drawn towards the mean over all entries. Units do not matter."""
    problems = {"a": co.noisy_quadratic(), "b": co.noisy_quadratic(seed=1, dimensions=3)}
    units = {"a": 1.0, "b": 7.0}
    boxes = {name: Box(problem[1]) for name, problem in problems.items()}
    optimizer = optgrad.auto()
    theirs = {name: problem[1] for name, problem in problems.items()}
    ours = jax.tree.map(jnp.asarray, theirs)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for t in range(60):
        ratios = {name: box.ratio(theirs[name]) for name, box in boxes.items()}
        everything = sum(n for _, n in ratios.values())
        mean = sum(n * ratio for ratio, n in ratios.values()) / (everything or 1)
        for name, box in boxes.items():
            curvature, _, noises, _ = problems[name]
            gradient, (ratio, n) = curvature * theirs[name] + noises[t], ratios[name]
            ratio, trust = (n * ratio + 10 * mean) / (n + 10), everything / (everything + 10)
            theirs[name] = theirs[name] + box.step(theirs[name], gradient, ratio, trust)
        grads = {k: units[k] * (p[0] * ours[k] + p[2][t]) for k, p in problems.items()}
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, theta in ours.items():
            np.testing.assert_allclose(theta, theirs[name], rtol=1e-9)


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


def test_no_entry_moves_farther_than_the_step_size():
    """η of its tensor, of which the first step takes 1/√1.81."""
    curvature, params, noises, _ = co.noisy_quadratic(noise=3.0)
    params, optimizer = jnp.asarray(params), optgrad.auto()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t, noise in enumerate(noises[:30], 1):
        updates, state = update(curvature * params + noise, state, params)
        size = state.step_size[0]
        assert np.abs(updates).max() <= size * (1 + 1e-5)
        if t == 1:
            np.testing.assert_allclose(np.abs(updates), size / np.sqrt(1.81), rtol=1e-5)
        params = optax.apply_updates(params, updates)


def growth_after(steps, *, shape=(4000,), drift=0.0, scale=None, keys=1, **options):
    """log η/η₀ of gradients of white noise and a common drift, the mean over some keys.

    ``scale`` makes of a key what the noise of a step is multiplied by.
    """
    optimizer = optgrad.auto(**{"search_steps": 0.0} | options)
    start = jnp.ones(shape)

    def step(carry, key):
        params, state = carry
        key, other = jax.random.split(key)
        noise = jax.random.normal(key, shape) * (1.0 if scale is None else scale(other))
        updates, state = optimizer.update(drift + noise, state, params)
        return (params + updates, state), None

    @jax.jit
    @jax.vmap
    def run(key):
        (_, state), _ = jax.lax.scan(
            step, (start, optimizer.init(start)), jax.random.split(key, steps)
        )
        return jnp.log(state.step_size[0] / 0.01)

    return float(jnp.mean(run(jax.random.split(jax.random.key(0), keys))))


def test_noise_alone_leaves_the_steps_as_long_as_they_are_and_drift_makes_them_longer():
    """κ = 1 is the edge; κ = 1.3 for 2,000 steps would make e⁸."""
    assert abs(growth_after(2000)) < 1
    assert growth_after(300, drift=0.3) > 3


def test_noise_that_changes_its_size_all_the_time_leaves_them_too():
    """A common factor eᴺ in each step."""
    assert (
        abs(growth_after(4000, shape=(1000,), scale=lambda key: jnp.exp(jax.random.normal(key))))
        < 1.5
    )


@pytest.mark.parametrize(("entries", "least"), [((), -4.5), ((3,), -6), ((10,), -5)])
def test_small_tensors_keep_most_of_their_steps_in_noise(entries, least):
    """Over 8,000 steps; without the damping of small tensors it is −11 for one entry."""
    assert growth_after(8000, shape=entries, keys=8, search_steps=100.0) > least


def test_a_plan_does_not_make_steps_grow_in_noise():
    """Only as a power of t; κ = 2 would make e⁶ of η in these 1,000 steps, and no end of it."""
    options = {"shape": (1000,), "search_steps": 100.0}
    planned, free = (growth_after(1000, total_steps=t, **options) for t in (20_000, None))
    assert abs(planned - free) < 2


def test_entries_of_very_different_units_do_not_freeze():
    """g = cᵢ(0.03θᵢ + noise) with c from e⁻⁶ to e⁶: few entries have nearly all the weight."""
    units = jnp.exp(2 * jax.random.normal(jax.random.key(5), (200,)))
    optimizer = optgrad.auto()

    def step(carry, key):
        params, state = carry
        gradient = units * (0.03 * params + jax.random.normal(key, params.shape))
        updates, state = optimizer.update(gradient, state, params)
        return (params + updates, state), None

    def run(key):
        params = jnp.ones(200)
        keys = jax.random.split(key, 10_000)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return jnp.mean(params**2)

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4))
    assert jnp.mean(found) < 0.24  # 0.27, and no better ever after, if all entries count as one


def test_a_tensor_with_a_gradient_now_and_then_converges():
    """A gradient every 50th step, beside one in all."""
    optimizer = optgrad.auto()

    def step(carry, sample):
        params, state = carry
        noise = jax.random.normal(sample[1], (2, 100))
        seen = sample[0] % 50 == 0
        grads = {"seldom": jnp.where(seen, params["seldom"] + noise[0], 0.0)}
        grads["always"] = params["always"] + noise[1]
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"seldom": jnp.full(100, 3.0), "always": jnp.ones(100)}
    samples = (jnp.arange(20_000), jax.random.split(jax.random.key(0), 20_000))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), samples)
    assert jnp.mean(params["seldom"] ** 2) < 0.05


def test_steps_below_the_rounding_of_16_bits_grow_until_they_are_not():
    """bfloat16, ``trusted``, a target that jumps after 3,000 noisy steps, where steps were lost."""
    optimizer = optgrad.auto(position="trusted")

    def step(carry, sample):
        params, state = carry
        target = jnp.where(sample[0] < 3000, 1.1, 2.3)
        gradient = params.astype(jnp.float32) - target
        gradient += 0.3 * jax.random.normal(sample[1], params.shape)
        updates, state = optimizer.update(gradient.astype(jnp.bfloat16), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(100, jnp.bfloat16)
    samples = (jnp.arange(6000), jax.random.split(jax.random.key(0), 6000))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), samples)
    assert jnp.mean((params.astype(jnp.float32) - 2.3) ** 2) < 0.02


def test_a_tensor_that_is_not_finite_leaves_the_others_alone():
    optimizer = optgrad.auto()
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(30):
        if t == 5:
            params["a"] = params["a"].at[0].set(jnp.inf)
        grads = {"a": jnp.full(3, 1.0 + t % 2), "b": params["b"] + (-1.0) ** t}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.isfinite(params["b"]).all()
    assert jnp.isfinite(state.step_size).all()


def test_a_scalar_with_noise_is_found():
    """θ²/2 with gradient noise 1 from 5: 1/t at 8,000 steps, at a random start of the noise."""

    def run(key):
        optimizer = optgrad.auto()

        def step(carry, key):
            theta, state = carry
            updates, state = optimizer.update(theta + jax.random.normal(key), state, theta)
            return (theta + updates, state), None

        theta = jnp.array(5.0)
        carry = (theta, optimizer.init(theta))
        (theta, _), _ = jax.lax.scan(step, carry, jax.random.split(key, 8000))
        return theta**2

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 16))
    assert jnp.median(found) < 1e-3
    assert found.max() < 0.05


def test_rows_seen_rarely_are_found():
    """2 of 300 rows in a step: each is seen some 27 times in 4,000 steps."""
    optimizer, rows = optgrad.auto(), 300

    def step(carry, key):
        params, state = carry
        which, noise = jax.random.split(key)
        seen = jnp.zeros((rows, 1)).at[jax.random.randint(which, (2,), 0, rows)].set(1.0)
        gradient = seen * (params - 1 + 0.3 * jax.random.normal(noise, (rows, 4)))
        updates, state = optimizer.update(gradient, state, params)
        return (params + updates, state), None

    params = jnp.zeros((rows, 4))
    keys = jax.random.split(jax.random.key(0), 4000)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    assert jnp.mean((params - 1) ** 2) < 0.03


def test_steps_fall_with_the_number_of_steps_in_the_noise_around_a_minimum():
    """f − f* at 500, 2,000 and 8,000 steps: 1/t up to a factor; a constant rate stays."""
    _, path = co.chains(optgrad.auto(), 8000)
    loss = np.square(np.asarray(path)).mean(axis=1)
    averages = [loss[t - t // 5 : t].mean() for t in (500, 2000, 8000)]
    assert averages[0] > 2 * averages[1] > 4 * averages[2]


def test_a_tensor_without_gradients_keeps_its_step_size():
    """From the start, and later: after it has come to rest, some fifty steps, no bit changes."""
    optimizer = optgrad.auto()
    params = {"paused": jnp.ones(3), "unused": jnp.ones(3), "used": jnp.ones(3)}
    state, update, sizes = optimizer.init(params), jax.jit(optimizer.update), []
    noises = np.random.default_rng(0).standard_normal((3000, 2, 3))
    for t, noise in enumerate(noises):
        paused = (params["paused"] + noise[0]) * (t < 100)
        grads = {"paused": paused, "unused": jnp.zeros(3), "used": params["used"] + noise[1]}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        sizes.append(np.asarray(state.step_size))
    sizes = np.array(sizes)
    assert (sizes[:, 1] == np.float32(0.01)).all()
    assert (sizes[160:, 0] == sizes[160, 0]).all()
    assert sizes[160, 0] > 0.05 * sizes[100, 0]
    assert np.unique(sizes[200:300, 2]).size > 50
    np.testing.assert_array_equal(params["unused"], 1.0)


def test_gradients_that_are_nearly_0_do_not_count():
    """999 dead entries, one with a drift: the steps grow as those of that entry alone."""
    drift = jnp.zeros(1000).at[0].set(1.0) + 1e-15

    def size(gradient):
        optimizer, params = optgrad.auto(), jnp.ones(gradient.shape)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for t in range(60):
            updates, state = update(gradient * (1 + 0.1 * (-1) ** t), state, params)
            params = optax.apply_updates(params, updates)
        return float(state.step_size[0])

    alone = size(jnp.ones(1))
    assert alone > 1.1 * 0.01
    np.testing.assert_allclose(size(drift), alone, rtol=1e-4)


def test_initial_step_sizes_follow_the_tensors():
    params = {
        "a": jnp.full(4, 2.0),
        "b": jnp.zeros(12),
        "c": jnp.full(4, 1e-9),
        "d": jnp.ones(9) / 2,
    }
    size = optgrad.auto().init(params).step_size
    np.testing.assert_allclose(size, [0.02, 0.01, 0.01, 0.005], rtol=1e-6)
    np.testing.assert_allclose(optgrad.auto().init(jnp.zeros(3)).step_size, [0.002], rtol=1e-6)
    infinite = optgrad.auto().init(jnp.full(3, jnp.inf)).step_size
    np.testing.assert_allclose(infinite, [0.002], rtol=1e-6)


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
    """Gradients far below 1 after the planned end, or grows on a slope without end."""

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
        assert (jnp.isfinite(state.step_size) & (state.step_size > 0)).all()


def test_a_gradient_that_is_not_a_number_is_seen():
    optimizer, params = optgrad.auto(), jnp.ones(2)
    updates, _ = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(params), params)
    np.testing.assert_array_equal(np.isnan(updates), [False, True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, r"total_steps = 0 is outside its range \[1, inf\)"),
        ({"weight_decay": -1.0}, r"weight_decay = -1.0 is outside"),
        ({"beta": 0.0}, r"beta = 0.0 is outside its range \(0, 1\)"),
        ({"beta_position": 0.0}, r"beta_position = 0.0 is outside its range \(0, 1\)"),
        ({"adaptation": -0.1}, r"adaptation = -0.1 is outside"),
        ({"initial_step": 0.0}, r"initial_step = 0.0 is outside"),
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

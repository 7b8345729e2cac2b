"""Adaptive SGD: Algorithm 8, its guards, and where σθ/σg collapses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import coordinates as co


class Printed:
    """Algorithm 8 line by line: raw averages."""

    def __init__(self, theta, alpha=0.5, beta=0.9, sigma_theta=1.0, sigma_g=1.0):
        self.alpha, self.beta = alpha, beta
        self.theta, self.g = np.array(theta, np.float64), np.zeros_like(theta, np.float64)
        self.theta2 = self.theta**2 + sigma_theta**2
        self.g2 = np.full_like(self.theta, sigma_g**2)

    def __call__(self, theta, g):
        b = self.beta
        self.theta = b * self.theta + (1 - b) * theta
        self.theta2 = b * self.theta2 + (1 - b) * theta**2
        self.g = b * self.g + (1 - b) * g
        self.g2 = b * self.g2 + (1 - b) * g**2
        return -self.alpha * np.sqrt((self.theta2 - self.theta**2) / (self.g2 - self.g**2)) * g


class Guarded:
    """The specification's recursion, from deviations of the old means."""

    def __init__(
        self, theta, alpha=0.7, beta=0.9, rate=0.99, epsilon=0.0, floor=0.0, cap=10.0,
        momentum=True, skip=True, sigma_theta=1e-2, sigma_g=0.0,
    ):  # fmt: skip
        self.alpha, self.beta, self.rate, self.epsilon = alpha, beta, rate, epsilon
        self.floor, self.cap, self.momentum, self.skip = floor, cap, momentum, skip
        self.m, self.n = np.array(theta, np.float64), np.zeros_like(theta, np.float64)
        self.v = np.full_like(self.m, sigma_theta**2)
        self.u = np.full_like(self.m, sigma_g**2)
        self.t = 0

    def __call__(self, theta, g):
        old = self.m, self.n, self.v, self.u
        b, r = self.beta, self.rate
        self.t += 1
        d, e = theta - self.m, g - self.n
        self.m, self.n = self.m + (1 - b) * d, self.n + (1 - b) * e
        if r is None:  # one rate for all: κ-recursion with κ = 1 − β
            self.v = b * (self.v + (1 - b) * d * d)
            self.u = b * (self.u + (1 - b) * e * e)
        else:
            self.v = r * self.v + (1 - r) * (b * d) ** 2
            self.u = r * self.u + (1 - r) * (b * e) ** 2
        size = np.sqrt(self.v / np.maximum(self.u + self.epsilon, 1e-300))
        lr = np.clip(np.where(self.u > 1e-300, size, self.floor), self.floor, self.cap)
        step = -self.alpha * lr * (self.n / (1 - b**self.t) if self.momentum else g)
        if self.skip:
            hidden = g == 0
            new = self.m, self.n, self.v, self.u
            self.m, self.n, self.v, self.u = (
                np.where(hidden, x, y) for x, y in zip(old, new, strict=True)
            )
            step = np.where(hidden, 0.0, step)
        return step


@pytest.mark.parametrize("beta", [0.9, 0.99])
def test_printed_algorithm(x64, beta):
    """The box with raw averages, while positions spread as wide as they are large."""
    problem = co.noisy_quadratic()
    actual, _ = co.run(co.create("adaptive_sgd", paper=True, beta=beta), *problem)
    expected = co.run_box(Printed(problem[1], beta=beta), *problem)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


GUARDED = {
    "default": ({}, {}),
    "own_decays": ({"beta": 0.8, "beta_variance": 0.95}, {"beta": 0.8, "rate": 0.95}),
    "gradient": ({"momentum": False}, {"momentum": False}),
    "positive_epsilon": ({"epsilon": 0.05}, {"epsilon": 0.05}),
    "negative_epsilon": ({"epsilon": -0.05}, {"epsilon": -0.05}),
    "floor": ({"lr_min": 0.2, "lr_max": 0.5}, {"floor": 0.2, "cap": 0.5}),
    "no_skip": ({"skip_zero_gradients": False}, {"skip": False}),
    "priors": (
        {"sigma_theta": 0.1, "sigma_gradient": 0.5},
        {"sigma_theta": 0.1, "sigma_g": 0.5},
    ),
    "paper_with_guards": (
        {"paper": True, "momentum": True, "lr_max": 3.0, "skip_zero_gradients": True},
        {"alpha": 0.5, "rate": None, "cap": 3.0, "sigma_theta": 1.0, "sigma_g": 1.0},
    ),
}


@pytest.mark.parametrize("options", list(GUARDED))
@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_guarded_algorithm(x64, options, position):
    """Every option, in the three forms of the position, which are the same numbers."""
    arguments, of_box = GUARDED[options]
    problem = co.noisy_quadratic(steps=100, seen=0.8)
    actual, state = co.run(co.create("adaptive_sgd", position=position, **arguments), *problem)
    expected = co.run_box(Guarded(problem[1], **of_box), *problem)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
    vectors = sum(x.size for x in jax.tree.leaves(state)[1:]) / problem[1].size
    assert vectors == (5 if position == "displacement" else 4)


def test_options_are_told_apart():
    """The comparison above is worth something: every option changes the path."""
    problem = co.noisy_quadratic(steps=100, seen=0.8)
    paths = [co.run_box(Guarded(problem[1], **of_box), *problem) for _, of_box in GUARDED.values()]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            assert np.max(np.abs(path - other)) > 1e-3


# --- first step ------------------------------------------------------------------------------


def first_step(gradient, **hyperparams):
    optimizer = co.create("adaptive_sgd", **hyperparams)
    theta = jnp.zeros_like(gradient)
    return np.asarray(optimizer.update(gradient, optimizer.init(theta), theta)[0])


GRADIENTS = np.array([1e-4, 1e-2, 1.0, -1e2, -1e4], np.float32)


def test_first_step_is_a_sign_step():
    """α·σθ0/√(1−β), or α·σθ0·√β'/(β·√(1−β')), for |g| from 1e-4 to 1e4 (§9, 7)."""
    prior = {"sigma_gradient": 0.0, "sigma_theta": 1e-3}
    for beta in (0.9, 0.99):
        actual = first_step(GRADIENTS, paper=True, alpha=0.5, beta=beta, **prior)
        expected = -np.sign(GRADIENTS) * 0.5 * 1e-3 / np.sqrt(1 - beta)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    length = 0.7 * 1e-3 * np.sqrt(0.99) / (0.9 * np.sqrt(0.01))
    actual = first_step(GRADIENTS, sigma_theta=1e-3, lr_max=1e6)
    np.testing.assert_allclose(actual, -np.sign(GRADIENTS) * length, rtol=1e-4)


@pytest.mark.parametrize("hyperparams", [{}, {"paper": True, "sigma_gradient": 0.0}, {"alpha": 3}])
def test_initial_step(hyperparams):
    """The first step has the length asked for."""
    actual = first_step(GRADIENTS, initial_step=0.02, lr_max=1e6, **hyperparams)
    np.testing.assert_allclose(actual, -0.02 * np.sign(GRADIENTS), rtol=1e-4)


def test_initial_step_of_a_traced_alpha():
    steps = jax.vmap(lambda a: optgrad.adaptive_sgd(a, initial_step=0.02).init(jnp.ones(())))(
        jnp.array([0.5, 1.0])
    ).position_variance
    np.testing.assert_allclose(steps[0], 4 * steps[1], rtol=1e-5)


# --- self-consistency under noise (§4) -------------------------------------------------------

# α, β, steps: simulated medians of a = α·lr·λ in the specification; 0 where all chains are dead.
ALIVE = {
    (0.5, 0.99, 4000): 0.105,
    (0.5, 0.999, 20000): 0.123,
    (0.25, 0.99, 8000): 0.013,
    (1.0, 0.9, 2000): 0.323,
    (1.0, 0.99, 4000): 0.482,
}
DEAD = [(0.5, 0.9, 2000), (0.1, 0.99, 8000)]


def mean_field(alpha, beta):
    """The prediction: α² ≤ 2(1−β) collapses, else a = (α² − 2(1−β))/(1+β)."""
    return (alpha**2 - 2 * (1 - beta)) / (1 + beta)


def relative_step(alpha, beta, steps, **hyperparams):
    """a = α·σθ/σg of 200 chains on θ²/2 with unit noise, at the end."""
    optimizer = co.create("adaptive_sgd", paper=True, alpha=alpha, beta=beta, **hyperparams)
    state, _ = co.chains(optimizer, steps)
    return alpha * co.step_size(state)


@pytest.mark.parametrize("setting", list(ALIVE))
def test_step_size_under_noise(setting):
    alpha, beta, steps = setting
    median = np.median(relative_step(alpha, beta, steps))
    assert median == pytest.approx(ALIVE[setting], rel=0.25)
    assert median < mean_field(alpha, beta)  # fluctuations only lower it
    if alpha**2 > 10 * (1 - beta):
        assert median > 0.7 * mean_field(alpha, beta)


@pytest.mark.parametrize("setting", DEAD)
def test_collapse_under_noise(setting):
    """Below the threshold or too near it, every chain dies."""
    alpha, beta, steps = setting
    assert mean_field(alpha, beta) < 0.03
    steps = relative_step(alpha, beta, steps)
    assert np.mean(steps < 1e-3) > 0.98
    assert np.median(steps) < 1e-4


def test_noise_study():
    """§9, 6: α .5 lives with β .99, dies with .9, and is kept alive by a floor."""
    assert 0.08 <= np.median(relative_step(0.5, 0.99, 4000)) <= 0.13
    assert np.median(relative_step(0.5, 0.9, 2000)) < 1e-4
    floored = co.create("adaptive_sgd", paper=True, alpha=0.5, lr_min=1e-2)
    state, path = co.chains(floored, 2000, start=10.0)
    assert np.median(np.abs(path[-1])) < 0.5  # where the dead ones stopped it is larger
    assert np.median(np.maximum(co.step_size(state), 1e-2)) >= 1e-2


def test_a_factor_behind_is_a_change_of_alpha():
    """`optax.scale(0.25)` behind a living setting makes it a dead one."""
    alive = co.create("adaptive_sgd", paper=True, alpha=0.5, beta=0.99)
    state, _ = co.chains(optax.chain(alive, optax.scale(0.25)), 8000)
    assert np.median(co.step_size(state[0])) < 1e-3
    assert np.median(co.step_size(co.chains(alive, 8000)[0])) > 0.1


def test_known_noise_is_subtracted():
    """ε = −σ² makes the step longer, within the cap; ε = +σ² shorter."""
    medians = []
    for epsilon in (-1.0, 0.0, 1.0):
        optimizer = co.create("adaptive_sgd", paper=True, beta=0.99, epsilon=epsilon, lr_max=2.0)
        state, path = co.chains(optimizer, 2000)
        assert np.all(np.isfinite(path))
        v, u = np.asarray(state.position_variance), np.asarray(state.gradient_variance)
        medians.append(np.median(np.sqrt(v / np.maximum(u + epsilon, 1e-30))))
    assert medians[0] > 2 * medians[1]
    assert medians[1] > 1.5 * medians[2]


@pytest.mark.parametrize("share", [-0.5, -0.9, 1.0])
def test_relative_epsilon_is_a_change_of_alpha(x64, share):
    """ε = r·vg divides the step by √(1+r); ε below −vg meets the cap."""
    curvature, start, noises, visible = co.noisy_quadratic()
    problem = (curvature, start, noises[:-1], visible[:-1])
    path, state = co.run(co.create("adaptive_sgd"), *problem)
    theta, gradient = jnp.asarray(path[-1]), jnp.asarray(curvature * path[-1] + noises[-1])

    def step(epsilon):
        optimizer = co.create("adaptive_sgd", epsilon=epsilon, lr_max=1e3)
        return optimizer.update(gradient, state, theta)

    plain, after = step(0.0)
    for i in range(theta.size):
        actual = step(share * float(after.gradient_variance[i]))[0][i]
        np.testing.assert_allclose(actual, plain[i] / np.sqrt(1 + share), rtol=1e-10)
    capped = step(-10 * float(after.gradient_variance.max()))[0]
    direction = after.mean_gradient / (1 - 0.9 ** len(noises))
    np.testing.assert_allclose(capped, -0.7 * 1e3 * direction, rtol=1e-10)


# --- convergence -----------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("hyperparams", [{"paper": True}, {"beta_variance": 0.9}])
def test_parabola_without_noise(x64, curvature, hyperparams):
    """§9, 5: (θ−50)² < 1e-13 in 300 steps, and finite for 2500."""
    optimizer = co.create("adaptive_sgd", **{"lr_max": 1e4, **hyperparams})
    squares = co.parabola_run(optimizer, curvature, 2500)
    assert squares[:300].min() < 1e-13
    assert np.all(np.isfinite(squares))
    assert squares[-1] < 1e-13


# --- rounding (§1.1) -------------------------------------------------------------------------


def variance_error(spread, **hyperparams):
    """Median relative error of σθ² over 400 coordinates that wander about 1 in float32."""
    generator = np.random.default_rng(0)
    x, path = np.zeros(400), []
    for noise in generator.standard_normal((200, 400)):
        x = 0.9 * x + np.sqrt(1 - 0.81) * noise
        path.append(1 + spread * x)
    path = np.array(path, np.float32)
    box = Guarded(path[0].astype(np.float64), rate=None, sigma_theta=spread)
    for theta in path:
        box(theta.astype(np.float64), np.ones(400))
    optimizer = co.create("adaptive_sgd", paper=True, sigma_theta=spread, **hyperparams)
    state = optimizer.init(jnp.asarray(path[0]))

    def step(state, theta):
        return optimizer.update(jnp.ones(400), state, theta)[1], None

    state = jax.lax.scan(step, state, jnp.asarray(path))[0]
    variance = np.asarray(state.position_variance, np.float64)
    return np.median(np.abs(variance / box.v - 1))


@pytest.mark.parametrize(
    ("spread", "table"), [(1e-2, 6e-6), (1e-3, 6e-5), (1e-4, 6e-4), (1e-6, 7e-2)]
)
def test_rounding_of_the_mean(spread, table):
    """The mean's error grows as 1/spread; the displacement's does not."""
    assert table / 4 < variance_error(spread) < table * 4
    assert variance_error(spread, position="displacement") < 2e-6


def test_rounding_of_bfloat16_moments():
    """Moments in 16 bits cost 0.3 %, whatever the spread if the displacement is stored."""
    assert variance_error(1e-2, state_dtype=jnp.bfloat16) < 1e-2
    narrow = {"state_dtype": jnp.bfloat16, "position": "displacement"}
    assert 1e-4 < variance_error(1e-6, **narrow) < 1e-2


def test_raw_averages_fail():
    """What the printed form does in float32: at a spread of 1e-3, variances below 0."""
    generator = np.random.default_rng(0)
    theta = np.float32(1) + np.float32(1e-3) * generator.standard_normal((100, 400), np.float32)
    mean, square = theta[0], theta[0] ** 2
    for x in theta:
        mean = np.float32(0.9) * mean + np.float32(0.1) * x
        square = np.float32(0.9) * square + np.float32(0.1) * x**2
    assert np.mean(np.abs((square - mean**2) / 1e-6 - 1) > 0.5) > 0.1


# --- low precision, sparse gradients ---------------------------------------------------------


@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_low_precision_state(position):
    """bfloat16 statistics follow float32 ones; a mean position is never narrow."""
    problem = co.noisy_quadratic(steps=300)
    curvature = np.abs(problem[0])
    finals = []
    for dtype in (None, jnp.bfloat16):
        optimizer = co.create("adaptive_sgd", position=position, state_dtype=dtype)
        start = problem[1].astype(np.float32)
        path, state = co.run(optimizer, curvature.astype(np.float32), start, *problem[2:])
        finals.append(np.mean(curvature * path[-50:] ** 2))
        if dtype is not None:
            narrow = {"mean_gradient", "position_variance", "gradient_variance"}
            assert all(getattr(state, name).dtype == jnp.bfloat16 for name in narrow)
            wide = position == "mean"
            assert state.position.stored.dtype == (jnp.float32 if wide else jnp.bfloat16)
    assert finals[1] == pytest.approx(finals[0], rel=0.3)


@pytest.mark.parametrize("position", ["displacement", "trusted"])
def test_bfloat16_parameters(position):
    """The deviation is of the parameters as they are after their rounding."""
    theta = jnp.full((50,), 1.0, jnp.bfloat16)
    optimizer = co.create("adaptive_sgd", position=position, initial_step=0.02)
    state = optimizer.init(theta)
    mean = np.ones(50)
    generator = np.random.default_rng(0)
    step = jax.jit(optimizer.update)
    for _ in range(30):
        mean = 0.9 * mean + 0.1 * np.asarray(theta, np.float64)
        gradient = theta + jnp.asarray(0.1 * generator.standard_normal(50), jnp.bfloat16)
        updates, state = step(gradient, state, theta)
        moved = optax.apply_updates(theta, updates)
        reference = moved if position == "trusted" else theta
        expected = np.asarray(reference, np.float64) - mean
        np.testing.assert_allclose(state.position.stored, expected, atol=1e-5)
        theta = moved
    assert float(jnp.max(jnp.abs(theta))) < 0.6


def test_embedding_rows():
    """Rows that a batch does not have keep their position and their statistics, bit by bit."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    optimizer = co.create("adaptive_sgd")
    state = optimizer.init(table)
    for rows in ([0, 2], [2, 5], [0, 1]):
        absent = np.setdiff1d(np.arange(6), rows)
        gradient = jnp.zeros_like(table).at[jnp.array(rows)].set(table[jnp.array(rows)])
        updates, new = jax.jit(optimizer.update)(gradient, state, table)
        assert np.all(np.asarray(updates)[absent] == 0)
        assert np.all(np.asarray(updates)[rows] != 0)
        for x, y in zip(jax.tree.leaves(new)[1:], jax.tree.leaves(state)[1:], strict=True):
            np.testing.assert_array_equal(x[absent], y[absent])
        assert np.all(np.asarray(new.mean_gradient != state.mean_gradient)[rows])
        table, state = table + updates, new


def test_sparse_coordinates():
    """§9, 12: visible in one step of a hundred, a coordinate still reaches its minimum."""

    def median(**hyperparams):
        optimizer = co.create("adaptive_sgd", **hyperparams)
        _, path = co.chains(optimizer, 4000, noise=0.1, seen=0.01, every=4000)
        return np.median(np.abs(path[-1]))

    assert median() < 0.3
    assert median(skip_zero_gradients=False) > 0.4
    small = {"momentum": False, "sigma_theta": 1e-3}
    assert median(**small) < 0.1
    assert median(skip_zero_gradients=False, **small) > 0.5


@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_parameters_edited_between_steps(position):
    """Two forms take an edit for a long step, one does not see it; all go on."""
    problem = co.noisy_quadratic()
    optimizer = co.create("adaptive_sgd", position=position)
    path, state = co.run(optimizer, np.abs(problem[0]).astype(np.float32), *problem[1:])
    theta, gradient = jnp.asarray(path[-1]), jnp.asarray(problem[2][-1], jnp.float32)
    plain = optimizer.update(gradient, state, theta)[1].position_variance
    updates, edited = optimizer.update(gradient, state, theta + 100)
    ratio = np.asarray(edited.position_variance / plain)
    assert np.all(ratio == 1 if position == "trusted" else ratio > 100)
    assert np.all(np.abs(updates) <= 0.7 * 10 * np.abs(edited.mean_gradient) * 1.01)


# --- the rest --------------------------------------------------------------------------------


def test_derivative_through_updates():
    """Of a whole run, with respect to α: finite, also where a gradient is 0 or steady."""
    slope = co.derivative_through_run("adaptive_sgd")
    assert np.isfinite(slope)
    assert slope != 0


def test_diagnostics(x64):
    """Geometric mean, smallest and largest σθ/σg, within a scan."""
    curvature, start, noises, visible = co.noisy_quadratic()
    _, state = co.run(co.create("adaptive_sgd"), curvature, start, noises, visible)
    found = optgrad.diagnostics(state)
    sizes = co.step_size(state)
    expected = {"geomean": np.exp(np.mean(np.log(sizes))), "min": sizes.min(), "max": sizes.max()}
    assert found.keys() == {f"step_size_{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(found[f"step_size_{name}"], value, rtol=1e-10)
    fresh = optgrad.diagnostics(co.create("adaptive_sgd").init({"a": jnp.ones(3), "b": None}))
    assert all(float(x) == 0 for x in fresh.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, r"alpha = 0.0 is outside its range \(0, inf\)"),
        ({"beta": 1.0}, r"beta = 1.0 .* \(0, 1\)"),
        ({"beta_variance": 0.0}, r"beta_variance = 0.0"),
        ({"epsilon": float("nan")}, "epsilon = nan"),
        ({"epsilon": -0.1, "paper": True}, "epsilon = -0.1 and lr_max = inf"),
        ({"lr_min": 20.0}, r"lr_min = 20.0 is outside its range \[0, 10\]"),
        ({"lr_max": -1.0}, "lr_max = -1.0"),
        ({"sigma_theta": 0.0}, "sigma_theta = 0.0"),
        ({"sigma_theta": 1.0, "initial_step": 1.0}, "one of the two"),
        ({"initial_step": -1.0}, "initial_step = -1.0"),
        ({"sigma_gradient": -1.0}, "sigma_gradient = -1.0"),
        ({"position": "men"}, "did you mean 'mean'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.adaptive_sgd(**arguments)


def test_infinite_cap():
    assert optgrad.adaptive_sgd(lr_max=float("inf")).init(jnp.ones(2)).count == 0

"""Adaptive SGD with confidence: Algorithm 9, Eq. (13), and its guards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import coordinates as co


class Printed:
    """Algorithm 9 line by line: raw averages, in extended precision where the machine has it."""

    def __init__(self, theta, alpha=0.5, beta=0.9, gamma=0.1, sigma_theta=1.0, sigma=None):
        self.alpha, self.beta, self.gamma, self.sigma = alpha, beta, gamma, sigma
        self.theta = np.array(theta, np.longdouble)
        self.g = np.zeros_like(self.theta)
        self.theta2 = self.theta**2 + sigma_theta**2
        # c = 0 at the start, as "gθ = 0" for ḡ = 0 says
        self.g_theta = np.zeros_like(self.theta)
        self.nu = np.zeros_like(self.theta)

    def __call__(self, theta, g):
        b = self.beta
        self.theta = b * self.theta + (1 - b) * theta
        self.theta2 = b * self.theta2 + (1 - b) * np.square(theta, dtype=np.longdouble)
        self.g = b * self.g + (1 - b) * g
        self.g_theta = b * self.g_theta + (1 - b) * np.multiply(g, theta, dtype=np.longdouble)
        variance = self.theta2 - self.theta**2
        slope = (self.g_theta - self.g * self.theta) / variance
        self.nu = b * self.nu + (1 - b) * (g - self.g - slope * (theta - self.theta)) ** 2
        sigma = np.sqrt(self.nu) if self.sigma is None else self.sigma
        rate = self.alpha / (np.abs(slope) + self.gamma * sigma / np.sqrt(variance))
        return np.asarray(-rate * g, np.float64)


class Guarded:
    """The specification's recursion, from deviations of the old means."""

    def __init__(
        self, theta, alpha=0.25, beta=0.9, gamma=0.3, floor=0.0, cap=10.0, momentum=True,
        skip=True, sigma_theta=1e-2, sigma=0.0, noise="coordinate",
    ):  # fmt: skip
        self.alpha, self.beta, self.gamma, self.noise = alpha, beta, gamma, noise
        self.floor, self.cap, self.momentum, self.skip = floor, cap, momentum, skip
        self.m, self.n = np.array(theta, np.float64), np.zeros_like(theta, np.float64)
        self.v, self.c = np.full_like(self.m, sigma_theta**2), np.zeros_like(self.m)
        self.nu = np.full_like(self.m, sigma**2)
        self.t = 0

    def __call__(self, theta, g):
        kappa = 1 - self.beta
        hidden = (g == 0) if self.skip else np.zeros_like(g, bool)
        self.t += 1
        d, e = theta - self.m, g - self.n
        after = [self.m + kappa * d, self.n + kappa * e]
        after.append((1 - kappa) * (self.v + kappa * d * d))
        after.append((1 - kappa) * (self.c + kappa * d * e))
        before = [self.m, self.n, self.v, self.c]
        self.m, self.n, self.v, self.c = (
            np.where(hidden, x, y) for x, y in zip(before, after, strict=True)
        )
        slope = self.c / self.v
        residual = (1 - kappa) * (e - slope * d)
        if self.noise == "tensor":
            if not np.all(hidden):
                self.nu = (1 - kappa) * self.nu + kappa * np.mean(residual[~hidden] ** 2)
        elif self.noise == "coordinate":
            nu = (1 - kappa) * self.nu + kappa * residual**2
            self.nu = np.where(hidden, self.nu, nu)
        doubt = self.gamma * np.sqrt(self.nu / self.v)
        rate = np.clip(self.alpha / np.maximum(np.abs(slope) + doubt, 1e-300), self.floor, self.cap)
        step = -rate * (self.n / (1 - self.beta**self.t) if self.momentum else g)
        return np.where(hidden, 0.0, step)


def small_problem(**options):
    return co.noisy_quadratic(noise=0.05, **options)


@pytest.mark.parametrize("beta", [0.9, 0.8])
@pytest.mark.parametrize("noise", ["coordinate", "fixed"])
def test_printed_algorithm(x64, beta, noise):
    """The box with raw averages, ν adapted or σ fixed (Eq. 13), while its digits last."""
    problem = small_problem(steps=15)
    sigma = {"sigma": 0.5} if noise == "fixed" else {}
    optimizer = co.create("adaptive_sgd_c", paper=True, beta=beta, noise=noise, **sigma)
    actual, _ = co.run(optimizer, *problem)
    expected = co.run_box(Printed(problem[1], beta=beta, **sigma), *problem)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


GUARDED = {
    "default": ({}, {}),
    "values": ({"alpha": 0.4, "beta": 0.8, "gamma": 0.5},) * 2,
    "gradient": ({"momentum": False},) * 2,
    "limits": ({"lr_min": 0.2, "lr_max": 0.5}, {"floor": 0.2, "cap": 0.5}),
    "no_skip": ({"skip_zero_gradients": False}, {"skip": False}),
    "priors": ({"sigma_theta": 0.1, "sigma": 0.5},) * 2,
    "tensor": ({"noise": "tensor", "sigma": 0.2},) * 2,
    "fixed": ({"noise": "fixed", "sigma": 0.3},) * 2,
}


@pytest.mark.parametrize("options", list(GUARDED))
@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_guarded_algorithm(x64, options, position):
    """Every option, in the three forms of the position, which are the same numbers."""
    arguments, of_box = GUARDED[options]
    problem = co.noisy_quadratic(steps=60, seen=0.8)
    optimizer = co.create("adaptive_sgd_c", position=position, **arguments)
    actual, state = co.run(optimizer, *problem)
    expected = co.run_box(Guarded(problem[1], **of_box), *problem)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)
    vectors = sum(x.ndim for x in jax.tree.leaves(state))
    shared = options in {"tensor", "fixed"}
    assert vectors == 5 - shared + (position == "displacement")


def test_options_are_told_apart():
    """The comparison above is worth something: every option changes the path."""
    problem = co.noisy_quadratic(steps=60, seen=0.8)
    paths = [co.run_box(Guarded(problem[1], **of_box), *problem) for _, of_box in GUARDED.values()]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            assert np.max(np.abs(path - other)) > 1e-3


def test_residual_of_the_regression():
    """r = (1−κ)(e − λd) is the printed (g − ḡ) − λ(θ − θ̄)."""
    generator = np.random.default_rng(0)
    theta, g, m, n, slope = generator.standard_normal((5, 20))
    kappa = 0.1
    d, e = theta - m, g - n
    printed = (g - (n + kappa * e)) - slope * (theta - (m + kappa * d))
    np.testing.assert_allclose((1 - kappa) * (e - slope * d), printed, atol=1e-14)


@pytest.mark.parametrize("beta", [0.9, 0.99])
def test_first_step_is_a_sign_step(beta):
    """α·σθ0/(γ·√(β(1−β))), whatever the gradient."""
    gradient = jnp.array([1e-4, 1e-2, 1.0, -1e2, -1e4])
    optimizer = co.create("adaptive_sgd_c", beta=beta, lr_max=1e6)
    theta = jnp.zeros_like(gradient)
    updates, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    length = 0.25 * 1e-2 / (0.3 * np.sqrt(beta * (1 - beta)))
    np.testing.assert_allclose(updates, -np.sign(gradient) * length, rtol=1e-4)


@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("hyperparams", [{"paper": True}, {}])
def test_parabola_without_noise(x64, curvature, hyperparams):
    """§9, 5: (θ−50)² < 1e-13 in 300 steps, and finite for 2500."""
    optimizer = co.create("adaptive_sgd_c", **{"lr_max": 1e4, **hyperparams})
    squares = co.parabola_run(optimizer, curvature, 2500)
    assert squares[:300].min() < 1e-13
    assert np.all(np.isfinite(squares))
    assert squares[-1] < 1e-13


def log_growth(steps, **hyperparams):
    """Growth of the rate per step on a flat coordinate with noise, median over 200, as a log."""
    optimizer = co.create("adaptive_sgd_c", momentum=False, lr_max=1e30, **hyperparams)
    state, _ = co.chains(optimizer, steps, curvature=0.0)
    spread = np.log(np.asarray(state.position_variance)) / 2
    return (np.median(spread) - np.log(1e-2)) / steps


def test_flat_coordinates_under_noise():
    """The printed α, γ explode on pure noise; the defaults do not."""
    assert log_growth(200, alpha=0.5, gamma=0.1) > 0.05
    assert log_growth(200) < 0.02


def relative_step(steps, alpha=0.25, gamma=0.3, **hyperparams):
    """Median of ηλ over 200 chains on θ²/2 with unit noise."""
    optimizer = co.create("adaptive_sgd_c", alpha=alpha, gamma=gamma, **hyperparams)
    state, _ = co.chains(optimizer, steps)
    v, c, nu = (
        np.asarray(x) for x in (state.position_variance, state.covariance, state.noise_variance)
    )
    return np.median(alpha / (np.abs(c / v) + gamma * np.sqrt(nu / v)))


def test_step_size_under_noise():
    """Where there is curvature the printed values settle (§4), the default ones die slowly."""
    for beta in (0.9, 0.99):
        assert 0.25 < relative_step(3000, 0.5, 0.1, beta=beta, paper=True) < 0.45
    assert 1e-5 < relative_step(500) < 1e-2
    assert relative_step(3000) < 1e-5
    assert 0.05 < relative_step(3000, beta=0.99, momentum=False) < 0.2


def test_saddle_repels():
    """|λ|: a coordinate of negative curvature is left, not approached."""
    optimizer = co.create("adaptive_sgd_c")
    _, path = co.chains(optimizer, 200, curvature=-1.0, noise=0.01, start=1e-3)
    assert np.median(np.abs(path[-1])) > 1.0


def test_noise_of_a_tensor_where_nothing_is_seen():
    """A tensor without any gradient keeps its ν, and a zero-size one has one."""
    optimizer = co.create("adaptive_sgd_c", noise="tensor", sigma=0.5)
    theta = {"a": jnp.ones(3), "b": jnp.ones((0, 2)), "c": jnp.ones(())}
    state = optimizer.init(theta)
    gradient = {**jax.tree.map(jnp.zeros_like, theta), "c": jnp.ones(())}
    updates, new = optimizer.update(gradient, state, theta)
    assert {k: float(x) for k, x in new.noise_variance.items() if k != "c"} == {
        "a": 0.25,
        "b": 0.25,
    }
    assert new.noise_variance["c"] != 0.25
    assert np.all(np.asarray(updates["a"]) == 0)


@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_low_precision_state(position):
    """bfloat16 statistics still train; a mean position is never narrow."""
    curvature, start, noises, visible = small_problem(steps=300)
    curvature = np.abs(curvature).astype(np.float32)
    optimizer = co.create("adaptive_sgd_c", position=position, state_dtype=jnp.bfloat16)
    path, state = co.run(optimizer, curvature, start.astype(np.float32), noises, visible)
    assert np.mean(curvature * path[-50:] ** 2) < 0.05 * np.mean(curvature * start**2)
    for name in ("mean_gradient", "position_variance", "covariance", "noise_variance"):
        assert getattr(state, name).dtype == jnp.bfloat16
    wide = position == "mean"
    assert state.position.stored.dtype == (jnp.float32 if wide else jnp.bfloat16)


def test_derivative_through_updates():
    """Of a whole run, with respect to α: finite, also where a gradient is 0 or steady."""
    slope = co.derivative_through_run("adaptive_sgd_c")
    assert np.isfinite(slope)
    assert slope != 0


def test_diagnostics(x64):
    """Curvatures, step sizes and correlation, from the state alone."""
    problem = co.noisy_quadratic()
    _, state = co.run(co.create("adaptive_sgd_c"), *problem)
    found = optgrad.diagnostics(state)
    v, c, nu = (
        np.asarray(x) for x in (state.position_variance, state.covariance, state.noise_variance)
    )
    size = np.abs(c / v)
    expected = {
        "curvature_geomean": np.exp(np.mean(np.log(size))),
        "curvature_min": size.min(),
        "curvature_max": size.max(),
        "curvature_negative": np.mean(c < 0),
        "step_size_geomean": np.exp(-np.mean(np.log(size))),
        "step_size_min": 1 / size.max(),
        "step_size_max": 1 / size.min(),
        "correlation_mean": np.mean(np.abs(c) / np.sqrt(c**2 + v * nu)),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)
    fresh = optgrad.diagnostics(co.create("adaptive_sgd_c").init({"a": jnp.ones(3), "b": None}))
    assert all(float(x) == 0 for x in fresh.values())
    fixed = co.create("adaptive_sgd_c", noise="fixed", sigma=1.0).init(jnp.ones(3))
    assert "correlation_mean" not in optgrad.diagnostics(fixed)


def test_scheduled_sigma(x64):
    """A fixed σ may be a schedule, and a changed σ changes the step."""
    problem = small_problem()
    schedule = optax.piecewise_constant_schedule(0.3, {30: 2.0})
    paths = [
        co.run(co.create("adaptive_sgd_c", noise="fixed", sigma=sigma), *problem)[0]
        for sigma in (0.3, schedule)
    ]
    np.testing.assert_array_equal(paths[0][:30], paths[1][:30])
    assert np.max(np.abs(paths[0] - paths[1])) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -0.1}, "gamma = -0.1 is outside its range"),
        ({"noise": "tensr"}, "did you mean 'tensor'"),
        ({"noise": "fixed"}, "sigma = None; noise = 'fixed' needs"),
        ({"sigma": -1.0}, "sigma = -1.0"),
        ({"lr_min": 11.0}, "lr_min = 11.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.adaptive_sgd_c(**arguments)

"""Diagonal online gradient regression, the author's later dOGR."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import coordinates as co


class Author:
    """The author's settings: b is the weight of the *new* sample, means start at 0."""

    def __init__(self, theta, b=0.5, momentum_weight=0.6, div=1.5, cut=10.0, spread=1.0):
        self.b, self.w, self.div, self.cut = b, momentum_weight, div, cut
        zeros = np.zeros_like(theta, np.float64)
        self.m, self.n, self.momentum, self.c = zeros, zeros, zeros, zeros
        self.v = np.full_like(zeros, spread**2)

    def __call__(self, theta, g):
        b = self.b
        self.m, self.n = self.m + b * (theta - self.m), self.n + b * (g - self.n)
        self.v = self.v + b * ((theta - self.m) ** 2 - self.v)
        self.c = self.c + b * ((theta - self.m) * (g - self.n) - self.c)
        self.momentum = self.momentum + self.w * (g - self.momentum)
        return -self.momentum / np.maximum(self.div * np.abs(self.c / self.v), self.cut)


class Robust:
    """The same with a prior curvature, a corrected momentum and what is skipped."""

    def __init__(
        self, theta, alpha=0.5, beta=0.8, gamma=None, floor=0.0, cap=1.0, skip=True,
        sigma_theta=1e-2,
    ):  # fmt: skip
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.floor, self.cap, self.skip = floor, cap, skip
        self.m, self.n = np.array(theta, np.float64), np.zeros_like(theta, np.float64)
        self.v, self.c = np.full_like(self.m, sigma_theta**2), np.zeros_like(self.m)
        self.momentum = np.zeros_like(self.m)
        self.fresh = np.ones_like(self.m, bool)
        self.t = 0

    def __call__(self, theta, g):
        b, kappa = self.beta, 1 - self.beta
        gamma = b if self.gamma is None else self.gamma
        hidden = (g == 0) if self.skip else np.zeros_like(g, bool)
        self.t += 1
        d, e = theta - self.m, g - self.n
        v = b * (self.v + kappa * d * d)
        c = np.where(self.fresh, np.sqrt(v) * np.abs(g), b * (self.c + kappa * d * e))
        new = (self.m + kappa * d, self.n + kappa * e, v, c)
        new += (self.momentum + (1 - gamma) * (g - self.momentum), self.fresh & (g == 0))
        old = (self.m, self.n, self.v, self.c, self.momentum, self.fresh)
        self.m, self.n, self.v, self.c, self.momentum, self.fresh = (
            np.where(hidden, x, y) for x, y in zip(old, new, strict=True)
        )
        with np.errstate(divide="ignore"):
            rate = np.clip(self.alpha / np.abs(self.c / self.v), self.floor, self.cap)
        return np.where(hidden, 0.0, -rate * self.momentum / (1 - gamma**self.t))


@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_author_settings(x64, position):
    """``paper=True`` in the author's own notation, from means that start at 0."""
    problem = co.noisy_quadratic(steps=50)
    actual, state = co.run(co.create("ogr_diagonal", paper=True, position=position), *problem)
    np.testing.assert_allclose(actual, co.run_box(Author(problem[1]), *problem), rtol=1e-10)
    assert sum(x.ndim for x in jax.tree.leaves(state)) == 5 + (position == "displacement")


ROBUST = {
    "default": {},
    "values": {"alpha": 0.3, "beta": 0.9},
    "momentum": {"gamma": 0.6},
    "limits": {"lr_min": 0.2, "lr_max": 0.5},
    "no_skip": {"skip_zero_gradients": False},
    "prior": {"sigma_theta": 0.1},
}
OF_BOX = {"lr_min": "floor", "lr_max": "cap", "skip_zero_gradients": "skip"}


def box_run(options, problem):
    of_box = {OF_BOX.get(name, name): value for name, value in ROBUST[options].items()}
    return co.run_box(Robust(problem[1], **of_box), *problem)


@pytest.mark.parametrize("options", list(ROBUST))
@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_robust_settings(x64, options, position):
    """Every option, in the three forms of the position, which are the same numbers."""
    problem = co.noisy_quadratic(steps=60, seen=0.8)
    optimizer = co.create("ogr_diagonal", position=position, **ROBUST[options])
    actual, state = co.run(optimizer, *problem)
    np.testing.assert_allclose(actual, box_run(options, problem), rtol=1e-9, atol=1e-10)
    more = (position == "displacement") + (options == "momentum")
    assert sum(x.ndim for x in jax.tree.leaves(state)) == 4 + more


def test_options_are_told_apart():
    """The comparison above is worth something: every option changes the path."""
    problem = co.noisy_quadratic(steps=60, seen=0.8)
    paths = [box_run(options, problem) for options in ROBUST]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            assert np.max(np.abs(path - other)) > 1e-3


def test_first_step():
    """α·√β·σθ0 in every coordinate, whatever the gradient; with ``paper`` at the cap."""
    gradient = jnp.array([1e-4, 1e-2, 1.0, -1e2, -1e4])
    theta = jnp.zeros_like(gradient)
    optimizer = co.create("ogr_diagonal", lr_max=1e6)
    updates, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    np.testing.assert_allclose(updates, -np.sign(gradient) * 0.5 * 0.8**0.5 * 1e-2, rtol=1e-4)
    optimizer = co.create("ogr_diagonal", paper=True)
    updates, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    np.testing.assert_allclose(updates, -0.1 * 0.6 * gradient, rtol=1e-4)


@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
def test_parabola_without_noise(x64, curvature):
    """(θ−50)² < 1e-13 in 300 steps, and finite for 2500."""
    squares = co.parabola_run(co.create("ogr_diagonal", lr_max=1e4), curvature, 2500)
    assert squares[:300].min() < 1e-13
    assert np.all(np.isfinite(squares))
    assert squares[-1] < 1e-13


def beale(x):
    """Beale's function, minimum 0 at (3, ½)."""
    a, b = x
    return sum((t - a * (1 - b**n)) ** 2 for n, t in ((1, 1.5), (2, 2.25), (3, 2.625)))


def beale_lattice(optimizer, steps=300):
    """Geometric mean of the final values from the 7×7 lattice on [−3, 3]², noise 0.1."""
    starts = jnp.array(list(itertools.product(np.linspace(-3, 3, 7), repeat=2)))

    def run(start, key):
        def step(carry, key):
            x, state = carry
            gradient = jax.grad(beale)(x) + 0.1 * jax.random.normal(key, x.shape)
            updates, state = optimizer.update(gradient, state, x)
            return (optax.apply_updates(x, updates), state), None

        keys = jax.random.split(key, steps)
        return beale(jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0])

    values = jax.jit(jax.vmap(run))(starts, jax.random.split(jax.random.key(0), len(starts)))
    return float(jnp.exp(jnp.mean(jnp.log(values))))


@pytest.mark.slow
def test_beale_lattice():
    """Far above the rates that gradient descent survives, and best with the author's settings."""
    assert beale_lattice(co.create("ogr_diagonal")) < 0.1
    assert beale_lattice(co.create("ogr_diagonal", paper=True)) < 5e-3
    assert not beale_lattice(optax.sgd(0.1)) < 1.0  # it diverges from some starts


def test_saddle_repels():
    """|λ|: a coordinate of negative curvature is left, not approached."""
    _, path = co.chains(co.create("ogr_diagonal"), 100, curvature=-1.0, noise=0.01, start=1e-3)
    assert np.median(np.abs(path[-1])) > 1.0


@pytest.mark.parametrize("position", ["mean", "displacement", "trusted"])
def test_low_precision_state(position):
    """bfloat16 statistics still train; a mean position is never narrow."""
    curvature, start, noises, visible = co.noisy_quadratic(steps=300, noise=0.05)
    curvature = np.abs(curvature).astype(np.float32)
    optimizer = co.create("ogr_diagonal", position=position, state_dtype=jnp.bfloat16, gamma=0.7)
    path, state = co.run(optimizer, curvature, start.astype(np.float32), noises, visible)
    assert np.mean(curvature * path[-50:] ** 2) < 0.05 * np.mean(curvature * start**2)
    for name in ("mean_gradient", "position_variance", "covariance", "momentum"):
        assert getattr(state, name).dtype == jnp.bfloat16
    wide = position == "mean"
    assert state.position.stored.dtype == (jnp.float32 if wide else jnp.bfloat16)


def test_coordinate_seen_late():
    """A coordinate whose gradient was 0 for long starts as if it were new, plain and skipped."""
    for skip in (True, False):
        optimizer = co.create("ogr_diagonal", skip_zero_gradients=skip)
        theta = jnp.ones(2)
        state = optimizer.init(theta)
        for _ in range(50):
            updates, state = optimizer.update(jnp.array([0.1, 0.0]), state, theta)
            assert updates[1] == 0
        updates, state = optimizer.update(jnp.array([0.1, 1e3]), state, theta)
        assert 0 < -updates[1] < 0.01


def test_derivative_through_updates():
    """Of a whole run, with respect to α: finite, also where a gradient is 0 or steady."""
    slope = co.derivative_through_run("ogr_diagonal")
    assert np.isfinite(slope)
    assert slope != 0


def test_diagnostics(x64):
    """Curvatures and step sizes, from the state alone, within a scan."""
    problem = co.noisy_quadratic()
    _, state = co.run(co.create("ogr_diagonal"), *problem)
    found = optgrad.diagnostics(state)
    curvature = np.asarray(state.covariance / state.position_variance)
    size = np.abs(curvature)
    expected = {
        "curvature_geomean": np.exp(np.mean(np.log(size))),
        "curvature_min": size.min(),
        "curvature_max": size.max(),
        "curvature_negative": np.mean(curvature < 0),
        "step_size_geomean": np.exp(-np.mean(np.log(size))),
        "step_size_min": 1 / size.max(),
        "step_size_max": 1 / size.min(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0}, r"gamma = 1.0 is outside its range \[0, 1\)"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"lr_max": 0.0}, "lr_max = 0.0"),
        ({"position": "trust"}, "did you mean 'trusted'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.ogr_diagonal(**arguments)

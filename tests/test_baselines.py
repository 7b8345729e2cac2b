"""The first-order rows of the survey slides, each against a recursion written from its slide.

The misprints of the slides are corrected as section 1 of the specification says: the missing
division in Nadam. Gradients are given, 40 random vectors, except where a method's parameters are
not the slides' (Nesterov's), which is also run on a function.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

STEPS, SIZE = 40, 6
ETA, GAMMA, B1, B2, EPS = 0.07, 0.8, 0.85, 0.97, 1e-8


def gradients(seed=0):
    """Of several sizes, one entry 0 throughout and one 0 at first."""
    generator = np.random.default_rng(seed)
    found = generator.standard_normal((STEPS, SIZE)) * np.logspace(-3, 2, SIZE)
    found[:, 2] = 0.0
    found[:3, 3] = 0.0
    return found


def followed(optimizer, gs, start=None):
    """The parameters before the first and after each step."""
    theta = jnp.zeros(SIZE) if start is None else jnp.asarray(start)

    def body(carry, g):
        theta, state = carry
        updates, state = optimizer.update(g, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    every = jax.lax.scan(body, (theta, optimizer.init(theta)), jnp.asarray(gs))[1]
    return np.concatenate([np.asarray(theta)[None], every])


def recursion(gs, step):
    """θ ← θ − step(g, t) with t = 1, 2, …"""
    theta = [np.zeros(SIZE)]
    for t, g in enumerate(gs, 1):
        theta.append(theta[-1] - step(g, t))
    return np.array(theta)


def assert_equal(found, expected, scale=1.0):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * scale)
    assert np.max(np.abs(expected[-1])) > 1e-3  # something has happened


# --- the slides ------------------------------------------------------------------------------


class Slides:
    """One method for each row: the step that is subtracted from θ."""

    def __init__(self):
        self.m = self.v = self.G = self.delta = self.u = self.largest = np.zeros(SIZE)

    def sgd(self, g, t):
        return ETA * g

    def momentum_average(self, g, t):
        self.v = GAMMA * self.v + (1 - GAMMA) * g
        return ETA * self.v

    def momentum(self, g, t):
        """Not the slides': the sum, which everybody else calls momentum."""
        self.v = GAMMA * self.v + g
        return ETA * self.v

    def adagrad(self, g, t):
        self.G = self.G + g**2
        return ETA / np.sqrt(self.G + EPS) * g

    def rmsprop(self, g, t):
        self.G = GAMMA * self.G + (1 - GAMMA) * g**2
        return ETA / np.sqrt(self.G + EPS) * g

    def adadelta(self, g, t):
        """Δ of the step contains the steps up to the last one."""
        self.G = GAMMA * self.G + (1 - GAMMA) * g**2
        step = np.sqrt(self.delta + EPS) / np.sqrt(self.G + EPS) * g
        self.delta = GAMMA * self.delta + (1 - GAMMA) * step**2
        return step

    def averages(self, g):
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * g**2

    def adam(self, g, t):
        self.averages(g)
        return ETA / (np.sqrt(self.v / (1 - B2**t)) + EPS) * self.m / (1 - B1**t)

    def adamax(self, g, t):
        """With optax's ε, without which a gradient of 0 gives NaN."""
        self.m = B1 * self.m + (1 - B1) * g
        self.u = np.maximum(B2 * self.u, np.abs(g) + EPS)
        return ETA / self.u * self.m / (1 - B1**t)

    def nadam(self, g, t):
        """Dozat's: both terms with a correction of their own, and v divided by its."""
        self.averages(g)
        ahead = B1 * self.m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)
        return ETA / (np.sqrt(self.v / (1 - B2**t)) + EPS) * ahead

    def amsgrad(self, g, t):
        self.averages(g)
        self.largest = np.maximum(self.largest, self.v)
        return ETA / (np.sqrt(self.largest) + EPS) * self.m


MOMENTS = {"learning_rate": ETA, "b1": B1, "b2": B2, "eps": EPS}
ARGUMENTS = {
    "sgd": {"learning_rate": ETA},
    "momentum_average": {"learning_rate": ETA, "momentum": GAMMA},
    "momentum": {"learning_rate": ETA, "momentum": GAMMA},
    "adagrad": {"learning_rate": ETA},  # the slides' ε and start are the defaults
    "rmsprop": {"learning_rate": ETA, "decay": GAMMA},
    "adadelta": {"rho": GAMMA, "eps": EPS},  # and the slides' rate is 1
    "adam": MOMENTS,
    "adamax": MOMENTS,
    "nadam": MOMENTS,
    "amsgrad": MOMENTS,
}


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_row(x64, name):
    gs = gradients()
    expected = recursion(gs, getattr(Slides(), name))
    found = followed(optgrad.create(name, **ARGUMENTS[name]), gs)
    assert_equal(found, expected)
    assert np.all(found[:, 2] == 0.0)


def test_defaults_are_the_slides():
    """γ ≈ 0.9, ε ≈ 10⁻⁸, β₁ = 0.9, β₂ = 0.999."""
    for name in ("adam", "adamax", "nadam", "amsgrad"):
        found = optgrad.get_method(name).hyperparameters
        assert [found[key].default for key in ("b1", "b2", "eps")] == [0.9, 0.999, 1e-8]
    for name, key in (("rmsprop", "decay"), ("momentum_average", "momentum"), ("adadelta", "rho")):
        assert optgrad.get_method(name).hyperparameters[key].default == 0.9
    for name in ("adagrad", "rmsprop"):
        assert optgrad.get_method(name).hyperparameters["eps"].default == 1e-8


# --- momentum --------------------------------------------------------------------------------


def test_momentum_as_an_average_and_as_a_sum(x64):
    """The average is the sum with the rate η(1 − γ); plain sgd(η, γ) is 1/(1 − γ) larger."""
    gs = gradients()
    average = followed(optgrad.create("momentum_average", learning_rate=ETA, momentum=GAMMA), gs)
    assert_equal(followed(optax.sgd(ETA * (1 - GAMMA), GAMMA), gs), average)
    total = followed(optgrad.create("momentum", learning_rate=ETA, momentum=GAMMA), gs)
    assert_equal(total * (1 - GAMMA), average)
    debiased = followed(optax.chain(optax.ema(GAMMA), optax.scale(-ETA)), gs)  # optax's default
    np.testing.assert_allclose(debiased[1], average[1] / (1 - GAMMA), rtol=1e-12)


def slides_nesterov(grad, steps, start):
    """θ and the point θ − γv where the next gradient is taken."""
    theta, v, every = start, np.zeros_like(start), []
    for t in range(steps):
        every.append((theta, theta - GAMMA * v))
        v = GAMMA * v + ETA * grad(theta - GAMMA * v, t)
        theta = theta - v
    every.append((theta, theta - GAMMA * v))
    return (np.array(column) for column in zip(*every, strict=True))


def test_nesterov(x64):
    """optax's parameters are the look-ahead points; the slides' θ is params + ηγ·trace."""
    gs = gradients()
    optimizer = optgrad.create("nesterov", learning_rate=ETA, momentum=GAMMA)
    theta, ahead = slides_nesterov(lambda _, t: gs[t], STEPS, np.zeros(SIZE))
    assert_equal(followed(optimizer, gs), ahead)

    params = jnp.zeros(SIZE)
    state = optimizer.init(params)
    for t in range(STEPS):
        updates, state = optimizer.update(jnp.asarray(gs[t]), state, params)
        params = params + updates
        trace = optax.tree.get(state, "trace")
        np.testing.assert_allclose(params + ETA * GAMMA * trace, theta[t + 1], rtol=1e-12)


def test_nesterov_on_a_function(x64):
    """With gradients from where each of the two has its parameters."""
    curvatures, start = np.linspace(0.1, 5.0, SIZE), np.linspace(1.0, 2.0, SIZE)

    def grad(x, t=None):
        return curvatures * x + 0.3 * x**3

    _, ahead = slides_nesterov(grad, STEPS, start)
    optimizer = optgrad.create("nesterov", learning_rate=ETA, momentum=GAMMA)
    params, every = jnp.asarray(start), [start]
    state = optimizer.init(params)
    for _ in range(STEPS):
        updates, state = optimizer.update(grad(params), state, params)
        params = params + updates
        every.append(np.asarray(params))
    np.testing.assert_allclose(every, ahead, rtol=1e-11, atol=1e-12)


# --- what is not the slides' -----------------------------------------------------------------


def test_nadam_as_printed_is_1900_times_too_long(x64):
    """√(v(1 − β₂ᵗ)) instead of √(v/(1 − β₂ᵗ)): the first step is 1900 η, with the usual decays."""
    g, b1, b2 = 0.37, 0.9, 0.999
    m, v = (1 - b1) * g, (1 - b2) * g**2
    printed = (b1 * m + (1 - b1) * g) / (1 - b1) / (np.sqrt(v * (1 - b2)) + EPS)
    np.testing.assert_allclose(printed, 1900.0, rtol=1e-4)
    optimizer = optgrad.create("nadam", learning_rate=1.0)
    updates, _ = optimizer.update(jnp.array(g), optimizer.init(jnp.array(0.0)))
    np.testing.assert_allclose(-updates, b1 * 0.1 / (1 - b1**2) + 1.0, rtol=1e-6)  # 1.47 η


def test_adamax_without_epsilon(x64):
    """The slide's u has no ε."""
    gs = gradients() + 1e-3
    m, u = np.zeros(SIZE), np.zeros(SIZE)

    def step(g, t):
        nonlocal m, u
        m, u = B1 * m + (1 - B1) * g, np.maximum(B2 * u, np.abs(g))
        return ETA / u * m / (1 - B1**t)

    assert_equal(followed(optax.adamax(ETA, B1, B2, eps=0.0), gs), recursion(gs, step))


@pytest.mark.parametrize(
    ("name", "upstream"),
    [
        ("adagrad", lambda: optax.adagrad(ETA)),  # starts with G = 0.1, ε = 1e-7
        ("adadelta", lambda: optax.adadelta(None, GAMMA, EPS)),  # its default ascends
        ("amsgrad", lambda: optax.amsgrad(**MOMENTS)),  # corrects biases
        ("momentum_average", lambda: optax.sgd(ETA, GAMMA)),
    ],
)
def test_defaults_of_optax_are_not_the_slides(x64, name, upstream):
    """Why these records have arguments of their own."""
    gs = gradients()
    expected = recursion(gs, getattr(Slides(), name))
    found = followed(upstream(), gs)
    assert np.max(np.abs(found - expected)) > 0.1 * np.max(np.abs(expected))
    if name == "adadelta":
        np.testing.assert_allclose(found, -expected, rtol=1e-12, atol=1e-12)

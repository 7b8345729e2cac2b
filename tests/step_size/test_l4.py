"""L4 along the mean gradient, Adam's and any other direction, against a transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import loss_runs as runs

CALM = 35  # steps; then some of these runs explode, and roundings with them

METHODS = (optgrad.l4_momentum, optgrad.l4_adam)
NAMES = ("l4_momentum", "l4_adam")


class Box:
    """Transcription of section 4.1 of the specification, in that order."""

    def __init__(self, direction, fraction=0.15, gamma=0.9, gamma0=0.75, tau=1000.0, eps=1e-12):
        self.direction, self.fraction, self.eps = direction, fraction, eps
        self.gamma, self.gamma0, self.tau = gamma, gamma0, tau
        self.beta, self.beta2, self.eps_root = 0.9, 0.999, 1e-4
        self.t, self.m, self.v, self.low = 0, 0.0, 0.0, None

    def __call__(self, f, g, w, loss):
        del w, loss
        self.t += 1
        self.low = self.gamma0 * f if self.t == 1 else min(self.low, f)
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m = self.m / (1 - self.beta**self.t)
        v = self.v / (1 - self.beta2**self.t)
        d = self.direction(g, m, np.sqrt(v) + self.eps_root)
        eta = self.fraction * (f - self.gamma * self.low) / (m @ d + self.eps)
        self.low *= 1 + 1 / self.tau
        return -eta * d


def momentum(g, m, root):
    del g, root
    return m


def adam(g, m, root):
    del g
    return m / root


DIRECTIONS = {optgrad.l4_momentum: momentum, optgrad.l4_adam: adam}
SETTINGS = [
    ({}, {}),
    (
        {"fraction": 0.4, "min_loss_factor": 0.8, "initial_factor": 0.5, "forget_time": 50.0},
        {"fraction": 0.4, "gamma": 0.8, "gamma0": 0.5, "tau": 50.0},
    ),
    ({"epsilon": 0.1}, {"eps": 0.1}),
]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("ours", "theirs"), SETTINGS)
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_follows_the_specification(x64, method, ours, theirs, noise):
    box = Box(DIRECTIONS[method], **theirs)
    state = runs.assert_follows(method(**ours), box, noise=noise, steps=CALM)
    np.testing.assert_allclose(state.min_loss, box.low, rtol=1e-9)
    np.testing.assert_allclose(runs.flat(state.mean_gradient), box.m / (1 - 0.9**box.t), rtol=1e-7)


def test_decays(x64):
    """Other decays, and a root's ϵ, of the three averages."""
    box = Box(adam)
    box.beta, box.beta2, box.eps_root = 0.8, 0.95, 0.02
    optimizer = optgrad.l4_adam(beta=0.8, beta_variance=0.95, epsilon_root=0.02)
    runs.assert_follows(optimizer, box, steps=CALM)


@pytest.mark.parametrize(
    ("direction", "box"),
    [
        (optax.ema(0.9), momentum),
        (optax.scale_by_adam(eps=1e-4), adam),
    ],
    ids=["ema", "adam"],
)
def test_any_direction(x64, direction, box):
    """`l4` around optax' own directions is the same as the two methods."""
    runs.assert_follows(optgrad.l4(direction), Box(box), steps=CALM)


def test_size_of_the_direction_does_not_matter(x64):
    single = runs.quadratic()
    plain = optgrad.l4(optax.scale_by_adam(), epsilon=0.0)
    scaled = optgrad.l4(optax.chain(optax.scale_by_adam(), optax.scale(1e6)), epsilon=0.0)
    expected = runs.run(plain, single, CALM)[0]
    np.testing.assert_allclose(runs.run(scaled, single, CALM)[0], expected, rtol=1e-8)


def test_first_steps_by_hand(x64):
    """L_min is used before it is relaxed, and relaxed by the first step already."""
    optimizer = optgrad.l4_momentum()
    updates, state = runs.one_step(optimizer, [2.0], 8.0)
    np.testing.assert_allclose(updates, [-0.15 * (8 - 0.9 * 6) / 4 * 2], rtol=1e-10)
    np.testing.assert_allclose(state.min_loss, 6 * 1.001)
    updates, state = runs.one_step(optimizer, [1.0], 7.0, state=state)
    mean = (0.9 * 0.2 + 0.1) / 0.19
    np.testing.assert_allclose(updates, [-0.15 * (7 - 0.9 * 6.006) / mean], rtol=1e-10)
    np.testing.assert_allclose(state.min_loss, 6.006 * 1.001)
    _, state = runs.one_step(optimizer, [1.0], 5.0, state=state)
    np.testing.assert_allclose(state.min_loss, 5 * 1.001)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_target_of_the_linearised_loss(x64, method):
    """g·(step) is the fraction of the way to the target at the first step, where m̂ = g."""
    gradient = np.array([3.0, -1.0, 0.5])
    updates, _ = runs.one_step(method(0.3, min_loss_factor=0.5), gradient, 2.0)
    np.testing.assert_allclose(gradient @ updates, -0.3 * (2 - 0.5 * 1.5), rtol=1e-10)


def test_upward_directions_are_not_taken():
    """An inner product that is not positive: no step, where the formula goes the wrong way."""
    for direction in (optax.scale(-1.0), optax.sgd(0.1), optax.set_to_zero()):
        optimizer = optgrad.l4(direction)
        updates, state = runs.one_step(optimizer, [1.0, 2.0], 1.0)
        assert not np.any(updates)
        assert (state.count, state.skipped, state.step_size) == (1, 0, 0.0)
    raw = optgrad.l4(optax.identity())
    _, state = runs.one_step(raw, [1.0], 1.0)
    updates, _ = runs.one_step(raw, [-0.1], 1.0, state=state)  # the mean is still positive
    assert updates[0] == 0
    # Orthogonal to the mean gradient: 1/ϵ would be the step size.
    updates, _ = runs.one_step(optgrad.l4(shifted()), [1.0, 0.0], 1.0)
    assert not np.any(updates)


def shifted():
    """The gradient's entries in another order."""
    return optax.stateless(lambda updates, _: jnp.roll(updates, 1))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_negative_losses(method):
    """A negative loss counts as 0: no step, and L_min does not run away."""
    optimizer = method()
    _, state = runs.one_step(optimizer, [1.0], 1.0)
    for _ in range(5):
        updates, state = runs.one_step(optimizer, [1.0], -3.0, state=state)
        assert not np.any(updates)
        assert state.min_loss == 0
    updates, state = runs.one_step(optimizer, [1.0], 1.0, state=state)
    assert updates[0] < 0


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_lower_bound_of_the_loss(x64, method):
    """A loss and its f_min may be shifted together."""
    single = runs.quadratic()
    expected = runs.run(method(), single, CALM)[0]
    shift = 7.0

    def moved(updates, state, params=None, *, value, **extra):
        return inner.update(updates, state, params, value=value - shift, **extra)

    inner = method(f_min=-shift)
    optimizer = optax.GradientTransformationExtraArgs(inner.init, moved)
    np.testing.assert_allclose(runs.run(optimizer, single, CALM)[0], expected, rtol=1e-8)


@pytest.mark.parametrize("method", [*METHODS, lambda: optgrad.l4(optax.scale_by_adam())])
@pytest.mark.parametrize(
    ("gradient", "value"),
    [([1.0, 2.0], np.nan), ([1.0, 2.0], np.inf), ([np.nan, 2.0], 1.0), ([1.0, -np.inf], 1.0)],
)
def test_what_is_not_finite(method, gradient, value):
    """No step, and nothing is remembered but that; before the first step and after it."""
    optimizer = method()
    state = optimizer.init(jnp.zeros(2))
    for t in range(2):
        updates, after = runs.one_step(optimizer, gradient, value, state=state)
        assert not np.any(updates)
        expected = state._replace(skipped=jnp.int32(1 + t))
        jax.tree.map(np.testing.assert_array_equal, after, expected)
        updates, state = runs.one_step(optimizer, [1.0, 2.0], 1.0, state=after)
        assert state.count == 1 + t
        assert np.all(updates < 0)
        if t == 0:
            np.testing.assert_allclose(state.min_loss, 0.75 * 1.001, rtol=1e-6)


def test_overflowing_inner_product():
    """Squares that are float32 numbers, but whose product with the direction is not."""
    optimizer = optgrad.l4(optax.scale(1e30))
    updates, state = runs.one_step(optimizer, [1e10, 0.0], 1.0)
    assert not np.any(updates)
    assert state.count == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_cap(method):
    """η grows as the mean gradient vanishes; the cap is a learning rate."""
    optimizer, capped = method(), method(max_learning_rate=0.5)
    gradient = [1e-3, -1e-3]
    assert runs.one_step(optimizer, gradient, 1.0)[1].step_size > 1
    updates, state = runs.one_step(capped, gradient, 1.0)
    assert state.step_size == 0.5
    size = 1e-3 if method is optgrad.l4_momentum else 1e-3 / (1e-3 + 1e-4)
    np.testing.assert_allclose(updates, [-0.5 * size, 0.5 * size], rtol=1e-5)


def test_directions_receive_the_extra_arguments():
    """The loss among them, and the parameters."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, params=params)
        return updates, state

    direction = optax.GradientTransformationExtraArgs(lambda _: (), update)
    runs.one_step(optgrad.l4(direction), [1.0], 2.0, params=jnp.ones(1), other="thing")
    assert (float(seen["value"]), float(seen["params"][0]), seen["other"]) == (2.0, 1.0, "thing")


def test_state_dtype():
    params = jnp.zeros(3, jnp.bfloat16)
    for method in METHODS:
        assert method().init(params).mean_gradient.dtype == jnp.float32
        assert method(state_dtype=jnp.bfloat16).init(params).mean_gradient.dtype == jnp.bfloat16
    assert optgrad.l4_adam(state_dtype="bfloat16").init(params).direction.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": -0.1}, "fraction = -0.1"),
        ({"beta": 1.0}, "beta = 1.0"),
        ({"f_min": np.nan}, "f_min = nan"),
        ({"min_loss_factor": 1.1}, "min_loss_factor = 1.1"),
        ({"initial_factor": -1.0}, "initial_factor = -1.0"),
        ({"forget_time": 0.0}, "forget_time = 0.0"),
        ({"epsilon": -1.0}, "epsilon = -1.0"),
        ({"max_learning_rate": 0.0}, "max_learning_rate = 0.0"),
        ({"state_dtype": "int8"}, "state_dtype = 'int8'"),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, lambda **a: optgrad.l4(optax.identity(), **a)])
def test_wrong_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


def test_wrong_arguments_of_some():
    for arguments in ({"beta_variance": 1.0}, {"epsilon_root": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            optgrad.l4_adam(**arguments)
    with pytest.raises(TypeError, match=r"direction = 0\.1 is not a transformation; accepted"):
        optgrad.l4(0.1)


def test_missing_value():
    with pytest.raises(ValueError, match="value = None; accepted: the loss at params"):
        runs.one_step(optgrad.l4(optax.identity()), [1.0], None)


def test_diagnostics():
    _, state = runs.one_step(optgrad.l4_momentum(), [2.0], 8.0)
    found = optgrad.diagnostics(state)
    assert sorted(found) == ["min_loss", "skipped_steps", "step_size"]
    np.testing.assert_allclose(found["step_size"], 0.15 * 2.6 / 4, rtol=1e-6)
    np.testing.assert_allclose(found["min_loss"], 6.006, rtol=1e-6)


@pytest.mark.parametrize(("method", "least"), list(zip(METHODS, (4.8e-15, 1.1e-16), strict=True)))
def test_rosenbrock(x64, method, least):
    """The specification's 5e-15 and 1e-16 after 20,000 steps."""
    assert runs.on_rosenbrock(method())[0] == pytest.approx(least, rel=0.1)

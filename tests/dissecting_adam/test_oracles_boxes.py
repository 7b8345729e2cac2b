"""Every method follows its algorithm box, step by step, in 64 and in 32 bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import boxes, trajectories

BETAS = (0.0, 0.5, 0.9, 0.99)
MINIBATCH = ("m_svag_mb", "adam_star_mb")
VARIANCES = dict.fromkeys(
    ("svag", "m_svag", "adam_star", "adam_sign"), ("moving_average", "unbiased")
)
FACTORS = dict.fromkeys(("adam_star", "adam_star_mb", "adam_sign"), ("adam", "optimal"))

# Updates may differ by this share of themselves, and of the coordinate's largest update.
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 1e-4, "atol": 2e-4}


def options_of(name):
    """All combinations of a method's options; the paper's first."""
    axes = {"variance": VARIANCES.get(name), "factor": FACTORS.get(name)}
    axes = {key: values for key, values in axes.items() if values}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cases():
    found = []
    for name in boxes.BOXES:
        for options in options_of(name):
            found.append(pytest.param(name, options, id="-".join([name, *options.values()])))
    return found


def cases_and_betas():
    """Every β with the paper's options; the 32-bit test has every β with all of them."""
    found = []
    for name in boxes.BOXES:
        for i, options in enumerate(options_of(name)):
            for beta in (0.9,) if i or name == "ssd" else BETAS:
                label = "-".join([name, *options.values(), str(beta)])
                found.append(pytest.param(name, options, beta, id=label))
    return found


def create(name, beta, learning_rate=trajectories.LEARNING_RATE, **options):
    options = options if name == "ssd" else {"beta": beta, **options}
    return getattr(optgrad, name)(learning_rate, **options)


@pytest.mark.parametrize(("name", "options", "beta"), cases_and_betas())
def test_follows_the_box_in_64_bits(x64, name, options, beta):
    data = trajectories.problem()
    box = trajectories.of_box(boxes.BOXES[name](beta, **options), data)
    ours = trajectories.of_optimizer(
        create(name, beta, **options), data, np.float64, minibatch=name in MINIBATCH
    )
    trajectories.assert_follows(ours, box, **DOUBLE)


@pytest.mark.parametrize(("name", "options"), cases())
def test_follows_the_box_in_32_bits(name, options):
    """β traced, and the box run with exactly that float32 number."""
    data = trajectories.problem()
    betas = np.float32(BETAS)
    runs = trajectories.of_optimizers(
        lambda beta: create(name, beta, **options),
        betas,
        data,
        np.float32,
        minibatch=name in MINIBATCH,
    )
    for beta, ours in zip(betas, runs, strict=True):
        box = trajectories.of_box(boxes.BOXES[name](beta, **options), data)
        trajectories.assert_follows(ours, box, **SINGLE)


@pytest.mark.parametrize("name", sorted(boxes.BOXES))
def test_learning_rate_schedule(x64, name):
    """The rate at the step's count from 0, as in optax, times the box's direction."""

    def schedule(count):
        return 0.1 / (1 + 0.05 * count)

    data = trajectories.problem(seed=1)
    box = trajectories.of_box(boxes.BOXES[name](0.9), data, schedule)
    ours = trajectories.of_optimizer(
        create(name, 0.9, schedule), data, np.float64, minibatch=name in MINIBATCH
    )
    trajectories.assert_follows(ours, box, **DOUBLE)


def test_scale_by_is_the_direction():
    """θ ← θ − α·direction, after a few steps of every method."""

    @jax.jit
    def run(gradients):
        found = {}
        for name in boxes.BOXES:
            optimizer, direction = create(name, 0.9, 0.25), getattr(optgrad, f"scale_by_{name}")()
            state, twin = optimizer.init(gradients[0]), direction.init(gradients[0])
            for gradient in gradients:
                extra = {"gradient_variance": gradient**2} if name in MINIBATCH else {}
                updates, state = optimizer.update(gradient, state, **extra)
                directions, twin = direction.update(gradient, twin, **extra)
            found[name] = updates, directions
        return found

    for name, (updates, directions) in run(
        jnp.array([[1.0, -2.0, 0.0], [-0.5, -1.0, 3.0]])
    ).items():
        np.testing.assert_array_equal(updates, -0.25 * directions, err_msg=name)
        assert directions[1] < 0 < directions[2], name


# --- the comparison can fail -----------------------------------------------------------------


@pytest.fixture(scope="module")
def m_svag_run():
    """Updates of M-SVAG in 32 bits: the weaker of the two comparisons has to see the difference."""
    return trajectories.of_optimizer(create("m_svag", 0.9), trajectories.problem(), np.float32)


def test_right_box_passes(m_svag_run):
    right = trajectories.of_box(boxes.m_svag(0.9), trajectories.problem())
    trajectories.assert_follows(m_svag_run, right, **SINGLE)


@pytest.mark.parametrize("error", sorted(boxes.WRONG_PORTS))
def test_wrong_port_is_caught(m_svag_run, error):
    with np.errstate(all="ignore"):
        wrong = trajectories.of_box(boxes.WRONG_PORTS[error](0.9), trajectories.problem())
    with pytest.raises(AssertionError, match="the box has"):
        trajectories.assert_follows(m_svag_run, wrong, **SINGLE)


def test_wrong_port_diverges_as_reported():
    """Dividing by μᵗ: 1e33 after 100 steps of a noisy quadratic. "The loss falls" is no test."""
    rng = np.random.default_rng(0)
    data = trajectories.Problem(
        np.eye(2), rng.normal(size=(100, 2)), np.ones((100, 2)), np.full(2, 3.0)
    )
    with np.errstate(all="ignore"):
        wrong = trajectories.of_box(boxes.WRONG_PORTS["divides by μᵗ"](0.9), data)
        right = trajectories.of_box(boxes.m_svag(0.9), data)
    assert not np.max(np.abs(wrong)) < 1e3
    assert np.max(np.abs(right)) < 1


# --- the same as optax -----------------------------------------------------------------------


def optax_pairs():
    rate = trajectories.LEARNING_RATE
    yield "ssd", optgrad.ssd(rate), optax.sign_sgd(rate)
    for beta in BETAS:
        yield f"m_ssd-{beta}", optgrad.m_ssd(rate, beta), optax.signum(rate, beta)
        adam = optax.adam(rate, b1=beta, b2=beta, eps=0.0)
        yield f"adam_sign-{beta}", optgrad.adam_sign(rate, beta), adam


@pytest.mark.parametrize(("ours", "theirs"), [pytest.param(*p, id=i) for i, *p in optax_pairs()])
def test_same_as_optax(x64, ours, theirs):
    """Where Adam without ε has no 0/0: its NaN of one coordinate would spread through Aθ."""
    data = trajectories.problem()
    data = trajectories.keep_coordinates(data, np.all(data.offsets != 0, axis=0))
    assert data.offsets.shape[1] == trajectories.CLOSED + 9
    np.testing.assert_allclose(
        trajectories.of_optimizer(ours, data, np.float64),
        trajectories.of_optimizer(theirs, data, np.float64),
        rtol=1e-9,
        atol=1e-12,
    )


def test_adam_sign_is_free_of_adams_zero_over_zero():
    gradient = jnp.array([0.0, 1.0])
    updates = {}
    for optimizer in (create("adam_sign", 0.9, 1.0), optax.adam(1.0, b1=0.9, b2=0.9, eps=0.0)):
        updates[len(updates)], _ = jax.jit(optimizer.update)(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(updates[0], [0.0, -1.0])
    np.testing.assert_allclose(updates[1], [np.nan, -1.0], rtol=1e-6)


def test_not_the_same_as_adam_with_two_decays(x64):
    data = trajectories.problem()
    data = trajectories.keep_coordinates(data, np.all(data.offsets != 0, axis=0))
    ours = trajectories.of_optimizer(create("adam_sign", 0.9), data, np.float64)
    adam = optax.adam(trajectories.LEARNING_RATE, b1=0.9, b2=0.999, eps=0.0)
    assert np.max(np.abs(ours - trajectories.of_optimizer(adam, data, np.float64))) > 0.01


# --- single steps, by hand -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svag", "m_svag", "adam_star", "adam_sign"])
def test_first_step_has_no_variance(name):
    """One gradient tells nothing about noise: γ = 1 at t = 1, exactly."""
    gradient = jnp.array([3.0, -1e-3, 0.0, 1e-25])
    optimizers = [
        create(name, beta, 1.0, **options) for options in options_of(name) for beta in BETAS
    ]

    @jax.jit
    def first_steps(gradient):
        return [o.update(gradient, o.init(gradient))[0] for o in optimizers]

    expected = jnp.sign(gradient) if name.startswith("adam") else gradient
    for updates in first_steps(gradient):
        np.testing.assert_array_equal(updates, -expected)


@pytest.mark.parametrize("name", ["svag", "m_svag", "adam_star", "adam_sign"])
def test_zero_mean_means_no_step(x64, name):
    """g₂ = −μ·g₁ makes m₂ = 0 for μ = ½, where all of it is exact in binary."""
    optimizer = create(name, 0.5, 1.0)
    state = optimizer.init(jnp.zeros(1))
    for gradient in (3.0, -1.5):
        updates, state = jax.jit(optimizer.update)(jnp.array([gradient]), state)
    assert np.all(np.abs(updates) < 1e-15)  # m₂ itself is rounded, at worst to 1e-16


@pytest.mark.parametrize("name", MINIBATCH)
def test_zero_momentum_means_no_step(name):
    optimizer = create(name, 0.5, 1.0)
    state = optimizer.init(jnp.zeros(1))
    for gradient in (3.0, -1.5):
        updates, state = optimizer.update(
            jnp.array([gradient]), state, gradient_variance=jnp.zeros(1)
        )
    np.testing.assert_array_equal(updates, [0.0])  # r₂ = 0 exactly, s̄ = 0 too


def test_two_steps_of_m_svag_by_hand():
    """μ = ½, g = 1 then 3: m = 7/3, v = 19/3, κ = 5/9, γ = 441/(441 + 40)."""
    optimizer = optgrad.m_svag(1.0, beta=0.5)
    state = optimizer.init(jnp.zeros(1))
    for gradient in (1.0, 3.0):
        updates, state = optimizer.update(jnp.array([gradient]), state)
    np.testing.assert_allclose(updates, [-7 / 3 * 441 / (441 + 40)], rtol=1e-6)

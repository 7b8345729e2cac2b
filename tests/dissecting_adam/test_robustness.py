"""Where float32 ends, where time ends, and derivatives through an update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

MOVING = ("svag", "m_svag", "adam_star", "adam_sign")
MINIBATCH = ("m_svag_mb", "adam_star_mb")
ALL = ("m_ssd", *MOVING, *MINIBATCH)
OPTIONS = (
    *[(name, {}) for name in ALL],
    *[(name, {"variance": "unbiased"}) for name in MOVING],
    *[(name, {"factor": "optimal"}) for name in ALL if name.startswith("adam")],
)


def extras(name, gradient):
    return {"gradient_variance": 0.5 * gradient * gradient} if name in MINIBATCH else {}


def run(optimizer, name, gradients, state=None):
    """Updates of a stream of gradients (T, D), and the last state."""
    zero = jnp.zeros(gradients.shape[1:])

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, zero, **extras(name, gradient))
        return state, updates

    state = optimizer.init(zero) if state is None else state
    state, updates = jax.lax.scan(step, state, gradients)
    return updates, state


# --- magnitudes ------------------------------------------------------------------------------


def awkward_streams():
    """(T, D): tiny, subnormal, huge, vanishing, exploding, and everything at once."""
    rng = np.random.default_rng(0)
    steps, noise = np.arange(60), rng.normal(size=60)
    with np.errstate(under="ignore"):
        columns = [
            np.full(60, scale) for scale in (1e-45, 1e-40, 1e-38, 1e-30, 1e-19, 1e-12, 1e18, 1e37)
        ]
        columns += [noise * scale for scale in (1e-40, 1e-30, 1e-20, 1e-10, 1e15, 1e30)]
        columns += [noise * 10.0 ** (-steps), noise * 10.0 ** (steps / 2), (steps == 5) * 1e37]
        columns += [np.where(steps < 5, noise, 0.0), np.where(steps < 5, 0.0, noise)]
        columns += [noise * 10.0 ** rng.uniform(-44, 37, size=60), -0.0 * noise]
        return jnp.asarray(np.stack(columns, 1), jnp.float32)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_no_nan_from_any_magnitude(name, options):
    """Squares overflow and underflow; the update is finite and no longer than it may be."""
    gradients = awkward_streams()
    largest = np.maximum.accumulate(np.abs(np.asarray(gradients)))
    sweep = jax.jit(
        jax.vmap(lambda b, g: run(getattr(optgrad, name)(1.0, b, **options), name, g)[0], (0, None))
    )
    betas = (0.0, 0.5, 0.9)
    for beta, updates in zip(betas, np.abs(sweep(jnp.asarray(betas), gradients)), strict=True):
        momentum = 1 / (1 - beta) if name == "m_svag_mb" else 1
        bound = largest * momentum if "svag" in name else np.ones_like(largest)
        assert np.all(updates <= bound * (1 + 1e-5))


@pytest.mark.parametrize("name", MOVING)
def test_step_compiled_and_not(name):
    """XLA's rewriting of a division by m twice into one by m² once gave 0/0 for |m| < 1e-19."""
    optimizer = getattr(optgrad, name)(1.0)
    gradients = jnp.array([[1e-15, 1e-20, 1e-30, 1e-32], [-5e-16, -5e-21, -5e-31, -5e-33]])
    state = optimizer.init(gradients[0])
    for gradient in gradients:
        compiled, _ = jax.jit(optimizer.update)(gradient, state)
        updates, state = optimizer.update(gradient, state)
        np.testing.assert_allclose(compiled, updates, rtol=1e-5)
    assert np.all(updates != 0)


@pytest.mark.parametrize("name", [*MOVING, *MINIBATCH])
def test_recovers_after_a_dead_phase(name):
    """2000 steps without gradient: no step meanwhile, and none is wrong afterwards."""
    rng = np.random.default_rng(0)
    alive = rng.normal(size=(20, 8)) * np.array([1, 1, 1e6, 1e6, 1e-6, 1e-6, 1, 1]) + 0.5
    optimizer = getattr(optgrad, name)(1.0)
    stages = [jnp.asarray(alive, jnp.float32), jnp.zeros((2000, 8)), jnp.full((200, 8), 0.25)]
    updates, _ = jax.jit(lambda g: run(optimizer, name, g))(jnp.concatenate(stages))
    assert np.all(np.isfinite(updates))
    np.testing.assert_array_equal(updates[2000:2020], 0.0)
    full = {"m_svag_mb": 2.5, "adam_star": 1.0, "adam_star_mb": 1.0, "adam_sign": 1.0}
    if name in MOVING:  # no noise in what the averages still remember
        np.testing.assert_allclose(updates[-1], -full.get(name, 0.25), rtol=1e-4)


@pytest.mark.parametrize("name", MOVING)
def test_at_the_end_of_the_counter(name):
    """t = 2³¹ − 1 is the last count there is; bias correction is then none at all."""
    optimizer = getattr(optgrad, f"scale_by_{name}")(0.9)
    _, state = run(optimizer, name, jnp.asarray([[1.0, -1.0], [0.5, 2.0]]))
    last = jnp.iinfo(jnp.int32).max
    for count in (10**6, last - 1, last):
        old = state._replace(count=jnp.asarray(count, jnp.int32))
        updates, new = jax.jit(optimizer.update)(jnp.array([0.5, 1.0]), old)
        mean = 0.9 * np.asarray(state.mean) + 0.1 * np.array([0.5, 1.0])
        if name == "m_svag":
            deviation = np.array([0.5, 1.0]) - np.asarray(state.mean)
            variance = 0.9 * (np.asarray(state.variance) + 0.1 * deviation**2)
            expected = mean / (1 + 0.1 / 1.9 * variance / mean**2)
            np.testing.assert_allclose(updates, expected, rtol=1e-5)
        assert np.all(np.isfinite(updates))
        assert new.count == min(count + 1, last)
        np.testing.assert_allclose(new.mean, mean, rtol=1e-6)


@pytest.mark.parametrize("name", MOVING)
def test_beta_close_to_one_in_32_bits(name):
    """Averages over 10⁶ steps in float32: the first steps are those of the plain mean."""
    gradients = np.random.default_rng(0).normal(size=(8, 5)) + 0.5
    for beta in (0.9999, 0.999999, 1 - 1e-8):
        optimizer = getattr(optgrad, f"scale_by_{name}")(beta)
        _, state = run(optimizer, name, jnp.asarray(gradients, jnp.float32))
        np.testing.assert_allclose(state.mean, gradients.mean(0), rtol=1e-3)
        np.testing.assert_allclose(state.variance, gradients.var(0), rtol=1e-3)


# --- derivatives through an update (meta-learning) -------------------------------------------


def unrolled(name, options, state=None):
    """Σ of the parameters after a few steps, as a function of (learning rate, β) and gradients."""

    def total(hyperparameters, gradients):
        rate, beta = hyperparameters
        optimizer = getattr(optgrad, name)(rate, beta=beta, **options)
        return jnp.sum(run(optimizer, name, gradients, state)[0])

    return total


# Every method and every option once.
OPTIONS_OF_DERIVATIVES = [
    ("m_ssd", {}),
    ("svag", {"variance": "unbiased"}),
    ("m_svag", {}),
    ("m_svag", {"variance": "unbiased"}),
    ("m_svag_mb", {}),
    ("adam_star", {"variance": "unbiased"}),
    ("adam_star_mb", {"factor": "optimal"}),
    ("adam_sign", {}),
    ("adam_sign", {"factor": "optimal"}),
]
STREAMS = {
    "zero": [[0.0] * 3] * 3,
    "constant": [[1.0, -2.0, 3.0]] * 3,
    "noisy": [[1.0, -2.0, 3.0], [2.0, 1.0, -1.0], [0.5, 0.7, 1.0]],
    "zero at first": [[0.0] * 3, [0.0] * 3, [1.0, -2.0, 3.0]],
    "then zero": [[1.0, -2.0, 3.0], [0.0] * 3, [0.0] * 3],
    "cancelling": [[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0], [1.0, -2.0, 3.0]],
    "tiny": [[1e-15, -1e-15, 1e-12], [2e-15, 1e-15, 1e-12], [2e-15, 1e-15, -1e-12]],
}


@pytest.mark.parametrize(("name", "options"), OPTIONS_OF_DERIVATIVES)
def test_derivatives_are_finite(name, options):
    """With respect to learning rate, β and gradients, wherever β is and whatever the gradient."""
    derivative = jax.jit(jax.grad(unrolled(name, options), argnums=(0, 1)))
    for label, stream in STREAMS.items():
        for beta in (0.0, 1e-6, 0.5, 0.9, 0.9999):
            found = derivative((jnp.float32(0.1), jnp.float32(beta)), jnp.asarray(stream))
            leaves = [np.asarray(x) for x in jax.tree.leaves(found)]
            assert all(np.all(np.isfinite(x)) for x in leaves), f"{label}, β = {beta}: {found}"


@pytest.mark.parametrize(("name", "options"), OPTIONS_OF_DERIVATIVES)
def test_derivatives_are_right(x64, name, options):
    """Against central differences."""
    gradients = jnp.asarray(STREAMS["noisy"], jnp.float64)
    of_hyperparameters = jax.jit(
        jax.value_and_grad(lambda h: unrolled(name, options)(h, gradients))
    )
    at, step = np.array([0.1, 0.6]), 1e-6
    _, derivative = of_hyperparameters(jnp.asarray(at))
    for found, change in zip(derivative, step * np.eye(2), strict=True):
        ahead, behind = (of_hyperparameters(jnp.asarray(x))[0] for x in (at + change, at - change))
        np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("m_svag", {}), ("adam_star", {"factor": "optimal"}), ("adam_sign", {}), ("m_svag_mb", {})],
)
def test_derivatives_are_finite_after_a_dead_phase(name, options):
    """The averages of a unit that has had no gradient for 200, 450, 800 steps: m² underflows."""
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)), jnp.float32)
    optimizer = getattr(optgrad, name)(0.1, **options)
    silent = jax.jit(lambda s, n: jax.lax.fori_loop(0, n, lambda _, s: quiet(s), s))

    def quiet(state):
        zero = jnp.zeros(4)
        return optimizer.update(zero, state, zero, **extras(name, zero))[1]

    _, state = run(optimizer, name, gradients)
    derivative = jax.jit(
        lambda state: jax.grad(unrolled(name, options, state), argnums=(0, 1))(
            (jnp.float32(0.1), jnp.float32(0.9)), jnp.zeros((2, 4))
        )
    )
    for steps in (200, 450, 800):
        found = derivative(silent(state, steps))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found)), (steps, found)


@pytest.mark.parametrize("name", ["adam_star_mb", "m_svag_mb"])
@pytest.mark.parametrize("eta", [1e-18, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e18])
def test_derivatives_by_gradient_and_variance(name, eta):
    """η from 1e-18 to 1e18, where γ is 1 or 0 in float32 and its derivative 0."""
    for options in [{}, {"factor": "optimal"}] if name == "adam_star_mb" else [{}]:
        optimizer = getattr(optgrad, name)(1.0, beta=0.0, **options)

        def update(gradient, variance, optimizer=optimizer):
            state = optimizer.init(gradient)
            return optimizer.update(gradient, state, gradient_variance=variance)[0]

        derivatives = jax.jit(jax.grad(update, argnums=(0, 1)))
        for scale in (1e-15, 1.0, 1e15):
            variance = (eta * scale) ** 2
            if not 1e-37 < variance < 1e37:
                continue
            found = derivatives(jnp.float32(scale), jnp.float32(variance))
            assert all(np.isfinite(x) for x in found), (options, scale, found)

"""ogr1d, ogr1ds and ogr1dc in closed loops: parabolas, saddles, chains, what the guards are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import boxes
from .trajectories import (
    NAMES,
    RULES,
    STEPS,
    WARMUP,
    closed_loop,
    error,
    updates_of,
)

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

CURVATURES = np.array([0.3, 1.0, 4.0])


def test_closed_loop_follows_the_box(x64):
    """Measured and trusted positions, stages of 1 and 3: what is emitted is what is applied."""
    noises = 0.1 * np.random.default_rng(0).normal(size=(60, 3))
    start = np.array([1.0, 2.0, 3.0])
    for stage in (1, 3):
        options = {"eta": 0.1, "gamma": 0.9, "warmup_steps": WARMUP, "stage_steps": stage}
        box, theta, expected = boxes.Ogr1dc(boxes.Options(**options)), start, []
        for noise in noises:
            expected.append(theta)
            theta = theta + box(theta, CURVATURES * theta + noise)
        for position in ("measured", "trusted"):
            optimizer = optgrad.ogr1dc(position=position, **options)
            run = jax.jit(lambda n, o=optimizer: closed_loop(o, lambda x: CURVATURES * x, start, n))
            assert error(run(noises), np.stack(expected)) < 1e-10, (stage, position)


def test_trusted_positions_of_every_tensor(x64):
    """Measured is trusted, to rounding, also with one direction per tensor."""
    noises = 0.1 * np.random.default_rng(1).normal(size=(60, 3))
    start = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    paths = []
    for position in ("measured", "trusted"):
        optimizer = optgrad.ogr1dc(
            *(0.1, 0.5, 0.9, 0.9), per_tensor=True, stage_steps=2, position=position
        )
        stream = {"a": noises[:, :2], "b": noises[:, 2]}
        run = jax.jit(lambda n, o=optimizer: closed_loop(o, quadratic_gradient, start, n))
        paths.append(run(stream))
    for key, scale in (("a", 2.0), ("b", 3.0)):
        np.testing.assert_allclose(paths[0][key], paths[1][key], rtol=0, atol=1e-10 * scale)


def quadratic_gradient(params):
    return {"a": CURVATURES[:2] * params["a"], "b": CURVATURES[2] * params["b"]}


PARABOLAS = np.array([0.01, 1.0, 100.0])


def parabola_cases():
    plain = [(step, "reverse") for step in STEPS]
    return [(n, *rule) for n in NAMES for rule in (RULES if n == "ogr1dc" else plain)]


@pytest.mark.parametrize(("name", "step", "sign"), parabola_cases())
def test_parabola_to_machine_precision(x64, name, step, sign):
    """Without noise, minimum at 50, from 51: exact after 300 steps and finite ever after."""

    def run(curvature):
        eta = jnp.minimum(0.1, 0.5 / curvature)
        optimizer = getattr(optgrad, name)(eta, lr_max=1e4, step=step, negative_curvature=sign)
        start, none = jnp.array([51.0]), jnp.zeros((2500, 1))
        return closed_loop(optimizer, lambda x: curvature * (x - 50), start, none)[:, 0]

    found = np.asarray(jax.jit(jax.vmap(run))(PARABOLAS))
    assert np.all((found[:, 300:] - 50) ** 2 < 1e-13)


def test_guards_unlock_what_is_printed(x64):
    """Where θ has stopped along the direction, λ = 0/0. The robust preset keeps data coming."""

    def run(paper):
        optimizer = optgrad.ogr1ds(0.1, paper=paper)
        return closed_loop(optimizer, lambda x: x - 50, jnp.array([51.0]), jnp.zeros((2500, 1)))

    assert np.isnan(run(True)[-1])
    assert abs(run(False)[-1] - 50) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_positions_without_spread(name):
    """No parabola: plain gradient descent, also along the direction; 0/0 as printed."""
    gradients = np.float32(np.random.default_rng(0).normal(size=(12, 3)))
    positions = np.zeros_like(gradients)
    make = functools.partial(getattr(optgrad, name), 0.1, warmup_steps=2)
    robust, _ = updates_of(make(), positions, gradients)
    np.testing.assert_allclose(robust[4:], -0.1 * gradients[4:], rtol=1e-5, atol=1e-7)
    printed, _ = updates_of(make(paper=True), positions, gradients)
    assert np.all(np.isfinite(printed[:4]))
    assert np.all(np.isnan(printed[4:]))


# --- saddle --------------------------------------------------------------------------------------


def saddle(params):
    """x² − y² + y⁴/4 + 1, minima f = 0 at y = ±√2."""
    x, y = params
    return x**2 - y**2 + y**4 / 4 + 1


def saddle_values(sign, eta, epsilons=(0.3, 0.5, 1.0), seeds=64):
    """Final f from (1, 1e-3) under gradient noise of 0.05, (ε, seeds)."""
    noises = 0.05 * np.random.default_rng(0).normal(size=(seeds, 150, 2))

    def run(epsilon, noise):
        optimizer = optgrad.ogr1dc(
            *(eta, 0.5, 0.9, 0.9), epsilon=epsilon, warmup_steps=5, negative_curvature=sign
        )
        path = closed_loop(optimizer, jax.grad(saddle), jnp.array([1.0, 1e-3]), noise)
        return saddle(path[-1])

    over_seeds = jax.vmap(run, (None, 0))
    return np.asarray(jax.jit(jax.vmap(over_seeds, (0, None)))(jnp.array(epsilons), noises))


@pytest.mark.parametrize(("eta", "bound"), [(1e-3, 5e-3), (1e-2, 1e-3)])
@pytest.mark.parametrize("sign", ["reverse", "tanh"])
def test_saddle_repels_where_the_sign_is_controlled(sign, eta, bound):
    """Nearly every seed; a few of a hundred are still on their way after 150 steps."""
    values = saddle_values(sign, eta)
    assert np.all(np.median(values, axis=1) < bound / 2)
    assert np.all(np.mean(values < bound, axis=1) > 0.85)


@pytest.mark.slow
def test_saddle_holds_gradient_descent_and_too_short_steps():
    held = saddle_values("gradient_descent", 1e-3)
    assert np.mean(held > 0.9) > 0.9
    assert np.min(held) > 0.5
    too_short = saddle_values("reverse", 1e-3, epsilons=(0.03, 0.05))
    assert np.all(np.median(too_short, axis=1) > 5e-3)


# --- what else moves the parameters ---


@pytest.mark.parametrize("position", ["measured", "trusted"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_what_follows_in_a_chain_may_scale_the_updates(position, factor):
    """Finite and converging, by measurement or by trust."""
    optimizer = optax.chain(optgrad.ogr1dc(0.1, gamma=0.9, position=position), optax.scale(factor))
    start, none = jnp.array([1.0, 2.0, 3.0]) + 10, jnp.zeros((400, 3))
    path = closed_loop(optimizer, lambda x: CURVATURES * (x - 10), start, none)
    assert np.all(np.isfinite(path))
    assert np.max(np.abs(path[-1] - 10)) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_converges_after_parameters_were_set_from_outside(name):
    optimizer = getattr(optgrad, name)(0.1, gamma=0.9)

    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(CURVATURES * params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=600)[0]

    run = jax.jit(run)
    params, state = run(jnp.ones(3), optimizer.init(jnp.ones(3)))
    assert np.max(np.abs(params)) < 1e-3
    params, _ = run(params + 5.0, state)
    assert np.max(np.abs(params)) < 1e-2

"""Runs of ogr1d, ogr1ds and ogr1dc: on a given sequence, and in a closed loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optgrad

from . import boxes

NAMES = ("ogr1d", "ogr1ds", "ogr1dc")
STEPS = ("regression", "last_point", "sigma_ratio")
SIGNS = ("reverse", "gradient_descent", "tanh")
# σθ/σg has no sign.
RULES = [*itertools.product(STEPS[:2], SIGNS), ("sigma_ratio", "reverse")]
WARMUP, LENGTH, SIZE = 4, 70, 5

# One row per run; what is None in the paper's preset is left out there.
SETTINGS = {
    "eta": [0.1, 0.01, 0.3, 0.02, 0.1, 0.1],
    "alpha": [0.5, 1.0, 0.25, 0.5, 0.5, 0.7],
    "beta": [0.9, 0.5, 0.99, 0.8, 0.9, 0.97],
    "gamma": [0.99, 0.5, 0.9, 0.0, 0.8, 0.9],
    "epsilon": [0.3, 1.0, 10.0, 100.0, 0.5, 3.0],
}
GUARDS = {
    "clip_sigmas": [10.0, 1.0, 0.5, 10.0, 3.0, 2.0],
    "lr_max": [100.0, 0.5, 1.0, 10.0, 1.0, 0.3],
}
RUNS = len(SETTINGS["eta"])


def settings_of(paper):
    return SETTINGS if paper else {**SETTINGS, **GUARDS}


def row(settings, i):
    return {name: values[i] for name, values in settings.items()}


def sequence(seed=0, length=LENGTH, size=SIZE):
    """Positions and gradients that are given: no loop is closed, so that nothing is chaotic.

    A smooth path about (1, …, 1), and noisy gradients of a quadratic with curvatures of both signs.
    """
    rng = np.random.default_rng(seed)
    velocity = np.zeros(size)
    position = 1 + 0.5 * rng.normal(size=size)
    path = []
    for _ in range(length):
        velocity = 0.7 * velocity + 0.2 * rng.normal(size=size)
        position = 1 + 0.95 * (position - 1) + velocity
        path.append(position)
    path = np.stack(path)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    hessian = rotation * np.linspace(-1.5, 2.0, size) @ rotation.T
    gradients = (path - 0.7) @ hessian + 0.3 * rng.normal(size=path.shape)
    return path, gradients


def updates_of(optimizer, positions, gradients):
    """Updates at given positions and gradients, and the states after them."""

    def step(state, sample):
        position, gradient = sample
        updates, state = optimizer.update(gradient, state, position)
        return state, (updates, state)

    start = optimizer.init(jax.tree.map(lambda x: x[0], positions))
    return jax.lax.scan(step, start, (positions, gradients))[1]


def updates_of_runs(name, positions, gradients, settings, **static):
    """The same for every row of settings, (runs, T, D)."""

    def run(reals):
        return updates_of(getattr(optgrad, name)(**reals, **static), positions, gradients)[0]

    reals = {key: jnp.asarray(values) for key, values in settings.items()}
    return np.asarray(jax.jit(jax.vmap(run))(reals))


def of_box(box, positions, gradients, **options):
    run = box(boxes.Options(**options))
    return np.stack([run(*sample) for sample in zip(positions, gradients, strict=True)])


def error(found, expected):
    """Largest difference, relative to the largest update of the run."""
    found, expected = np.asarray(found, boxes.LONG), np.asarray(expected)
    assert np.all(np.isfinite(expected))
    difference = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    return float(difference) if np.isfinite(difference) else np.inf


def static_of(name):
    return {"warmup_steps": WARMUP, **({"stage_steps": 3} if name == "ogr1ds" else {})}


def closed_loop(optimizer, gradient_fn, start, noises):
    """Positions before each step, (T, D)."""

    def step(carry, noise):
        params, state = carry
        gradient = jax.tree.map(jnp.add, gradient_fn(params), noise)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), params

    return jax.lax.scan(step, (start, optimizer.init(start)), noises)[1]


# Updates at given positions and gradients, compiled once per optimizer.
run_given = jax.jit(lambda o, x, g: updates_of(o, x, g)[0], static_argnums=0)

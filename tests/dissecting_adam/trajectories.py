"""One problem that holds every kind of coordinate, run through a box and through a transformation.

The gradient at step t is Aθ + b_t. The first coordinates are a noisy quadratic, where the loop is
closed: an error in one step changes the next gradient. The others have zero rows in A: gradient
streams of fixed, awkward kinds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import boxes

STEPS = 250
CLOSED = 8
LEARNING_RATE = 0.05


class Problem(NamedTuple):
    matrix: np.ndarray  # A, (D, D)
    offsets: np.ndarray  # b, (T, D)
    variances: np.ndarray  # ŝ, (T, D), for the minibatch methods
    start: np.ndarray  # θ₀, (D,)


def problem(seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    steps = np.arange(STEPS)

    def normal(mean, spread):
        return mean + spread * rng.normal(size=STEPS)

    rotation, _ = np.linalg.qr(rng.normal(size=(CLOSED, CLOSED)))
    hessian = rotation * np.geomspace(0.05, 5.0, CLOSED) @ rotation.T
    spread = np.geomspace(0.3, 3.0, CLOSED)
    streams = [
        normal(0.0, 1.0),
        normal(1.0, 0.01),
        normal(-100.0, 1.0),
        normal(0.3, 1.0) * 1e-9,
        normal(0.3, 1.0) * 1e9,
        np.full(STEPS, 0.7),  # no noise: v = m²
        np.zeros(STEPS),  # m = 0 throughout
        np.where(steps < 20, 0.0, normal(1.0, 0.5)),  # m = 0 at first
        np.where((steps < 20) | (steps >= 60), normal(1.0, 0.5), 0.0),  # 40 steps without gradient
        np.where(rng.random(STEPS) < 0.1, normal(0.5, 1.0), 0.0),  # sparse
        (-1.0) ** steps,
        np.geomspace(1.0, 1e-6, STEPS) * normal(1.0, 0.3),
        np.where(steps == 100, 1e4, normal(0.0, 1.0)),  # an outlier
    ]
    streams = np.stack(streams, 1)
    offsets = np.concatenate([rng.normal(size=(STEPS, CLOSED)) * spread, streams], 1)
    size = offsets.shape[1]
    matrix = np.zeros((size, size))
    matrix[:CLOSED, :CLOSED] = (hessian + hessian.T) / 2
    variances = np.concatenate([np.broadcast_to(spread**2, (STEPS, CLOSED)), streams**2], 1)
    variances = variances * rng.gamma(4.0, 0.25, size=offsets.shape)
    variances[:, CLOSED + 5] = 0  # the constant stream is certain
    start = np.concatenate([3 * rng.normal(size=CLOSED), np.zeros(size - CLOSED)])
    return Problem(matrix, offsets, variances, start)


def keep_coordinates(data, keep):
    matrix, offsets, variances, start = data
    return Problem(matrix[np.ix_(keep, keep)], offsets[:, keep], variances[:, keep], start[keep])


def of_box(box, data, learning_rate=LEARNING_RATE):
    """Updates −α·direction of an algorithm box, (T, D)."""
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate
    matrix, offsets, variances, theta = (np.asarray(x, boxes.LONG) for x in data)
    updates = []
    for t, (offset, variance) in enumerate(zip(offsets, variances, strict=True)):
        updates.append(-boxes.LONG(rate(t)) * box(matrix @ theta + offset, variance))
        theta = theta + updates[-1]
    return np.stack(updates).astype(np.float64)


def of_optimizer(optimizer, data, dtype, *, minibatch=False):
    """Updates of a transformation, (T, D); parameters and gradients of type ``dtype``."""
    run = jax.jit(lambda data: scan(optimizer, data, dtype, minibatch=minibatch))
    return np.asarray(run(data), np.float64)


def of_optimizers(factory, betas, data, dtype, *, minibatch=False):
    """The same for several traced β at once, (number of β, T, D); compiled once."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def run(beta, data):
        return scan(factory(beta), data, dtype, minibatch=minibatch)

    return np.asarray(run(jnp.asarray(betas, dtype), data), np.float64)


def scan(optimizer, data, dtype, *, minibatch=False):
    matrix, offsets, variances, theta = (jnp.asarray(x, dtype) for x in data)

    def step(carry, inputs):
        theta, state = carry
        offset, variance = inputs
        gradient = jnp.matmul(matrix, theta, precision="highest") + offset
        extra = {"gradient_variance": variance} if minibatch else {}
        updates, state = optimizer.update(gradient, state, theta, **extra)
        return (optax.apply_updates(theta, updates), state), updates

    return jax.lax.scan(step, (theta, optimizer.init(theta)), (offsets, variances))[1]


def assert_follows(ours, box, rtol, atol):
    """Element-wise; ``atol`` is in units of the coordinate's largest update."""
    assert np.all(np.isfinite(ours))
    scale = np.max(np.abs(box), axis=0, keepdims=True)
    error = np.abs(ours - box) - rtol * np.abs(box) - atol * scale
    worst = np.unravel_index(np.argmax(error / np.where(scale > 0, scale, 1)), error.shape)
    assert np.all(error <= 0), (
        f"step {worst[0] + 1}, coordinate {worst[1]}: {ours[worst]!r}, the box has {box[worst]!r}"
    )

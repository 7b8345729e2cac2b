"""Noisy quadratics, Rosenbrock's function, least squares: for the rules that read the loss.

The same problem in NumPy, for the transcriptions of the updates, and in jax.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STEPS, SIZE = 200, 5
OFFSET = 0.2  # the least value of each step's loss


class Quadratic(NamedTuple):
    """½(w − t)ᵀA(w − t) + offset, with a target t for each step."""

    matrix: np.ndarray
    targets: np.ndarray  # (steps, size)
    start: np.ndarray

    def value(self, w, t):
        difference = w - self.targets[t]
        return 0.5 * difference @ self.matrix @ difference + OFFSET

    def gradient(self, w, t):
        return self.matrix @ (w - self.targets[t])


@functools.cache
def quadratic(noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    matrix = rotation * np.linspace(0.05, 1.0, SIZE) @ rotation.T
    targets = noise * rng.normal(size=(STEPS, SIZE))
    return Quadratic(matrix, targets, rng.normal(size=SIZE))


def follow(box, single, steps=STEPS):
    """Parameters after each step of a transcription in NumPy.

    The box is called with (f, g, w, loss of this step) and returns the update.
    """
    w, path = single.start, []
    for t in range(steps):
        value, gradient = single.value(w, t), single.gradient(w, t)
        w = w + box(value, gradient, w, lambda x, t=t: single.value(x, t))
        path.append(w)
    return np.array(path)


def split(w):
    """A tree of two leaves, so that norms and inner products run over several."""
    return {"a": w[:2], "b": w[2:].reshape(-1, 1)}


def flat(tree):
    return jnp.concatenate([tree["a"], tree["b"].ravel()])


def run(optimizer, single, steps=STEPS):
    """Parameters after each step of the transformation, and its last state."""
    matrix, targets = jnp.asarray(single.matrix), jnp.asarray(single.targets)

    def body(carry, target):
        params, state = carry

        def loss(tree):
            difference = flat(tree) - target
            return 0.5 * difference @ matrix @ difference + OFFSET

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value=value, value_fn=loss)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), flat(params)

    params = split(jnp.asarray(single.start))
    start = (params, optimizer.init(params))
    (_, state), path = jax.jit(lambda c: jax.lax.scan(body, c, targets[:steps]))(start)
    return np.asarray(path), state


def assert_follows(optimizer, box, *, noise=0.3, steps=STEPS):
    """The transformation takes the steps of the transcription, to 1e-10 in float64."""
    single = quadratic(noise)
    expected = follow(box, single, steps)
    assert np.all(np.isfinite(expected))
    actual, state = run(optimizer, single, steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
    return state


def rosenbrock(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def trace_rosenbrock(optimizer, steps):
    """Its value after some steps from (−1, 0), and the last state; to be compiled."""

    def body(carry, _):
        w, state = carry
        value, gradient = jax.value_and_grad(rosenbrock)(w)
        updates, state = optimizer.update(gradient, state, w, value=value, value_fn=rosenbrock)
        return (w + updates, state), None

    w = jnp.array([-1.0, 0.0])
    (w, state), _ = jax.lax.scan(body, (w, optimizer.init(w)), None, length=steps)
    return rosenbrock(w), state


def on_rosenbrock(optimizer, steps=20_000):
    """The same, compiled."""
    value, state = jax.jit(lambda: trace_rosenbrock(optimizer, steps))()
    return float(value), state


def one_step(optimizer, gradient, value, params=None, state=None, **extra):
    """One update, and the state after it."""
    gradient = jnp.asarray(gradient)
    state = optimizer.init(jnp.zeros_like(gradient)) if state is None else state
    return optimizer.update(gradient, state, params, value=value, **extra)


# --- noisy least squares ---------------------------------------------------------------------

DIMENSIONS, EXAMPLES, RUNS = 20, 500, 4


@functools.cache
def least_squares():
    """Four data sets: Hessian eigenvalues 1 to 0.01, label noise 0.5, start 1.03 above the minimum.

    Inputs (runs, N, d), labels (runs, N), minima (runs, d), Hessians (runs, d, d), least losses.
    """
    return tuple(np.stack(column) for column in zip(*map(_data, range(RUNS)), strict=True))


def _data(seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(EXAMPLES, DIMENSIONS))
    z = np.linalg.solve(np.linalg.cholesky(z.T @ z / EXAMPLES), z.T).T  # covariance exactly 1
    rotation, _ = np.linalg.qr(rng.normal(size=(DIMENSIONS, DIMENSIONS)))
    x = z * np.logspace(0, -1, DIMENSIONS) @ rotation.T
    hessian = x.T @ x / EXAMPLES
    w = rng.normal(size=DIMENSIONS)
    w *= np.sqrt(1.03 / (0.5 * w @ hessian @ w))
    y = x @ w + 0.5 * rng.normal(size=EXAMPLES)
    minimum = np.linalg.solve(hessian, x.T @ y / EXAMPLES)
    least = 0.5 * np.mean((x @ minimum - y) ** 2)
    return x, y, minimum, hessian, least


def excess(make, batch, steps):
    """Loss of all data above its minimum, (runs, last tenth of the steps).

    Args:
      make: least loss -> optimizer.
      batch: size of the batches, drawn with replacement; None is all data.
      steps: how many.
    """

    def one(key, x, y, minimum, hessian, least):
        optimizer = make(least)

        def body(carry, rows):
            w, state = carry
            xs, ys = (x, y) if batch is None else (x[rows], y[rows])

            def loss(w):
                return 0.5 * jnp.mean((xs @ w - ys) ** 2)

            value, gradient = jax.value_and_grad(loss)(w)
            updates, state = optimizer.update(gradient, state, w, value=value, value_fn=loss)
            w = w + updates
            return (w, state), 0.5 * (w - minimum) @ hessian @ (w - minimum)

        w = jnp.zeros(DIMENSIONS)
        rows = jax.random.randint(key, (steps, batch or 1), 0, EXAMPLES)
        return jax.lax.scan(body, (w, optimizer.init(w)), rows)[1][-steps // 10 :]

    keys = jax.random.split(jax.random.key(0), RUNS)
    data = map(jnp.asarray, least_squares())
    return np.asarray(jax.jit(jax.vmap(one))(keys, *data))

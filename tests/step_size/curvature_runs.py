"""Linear regression for the rules with a rate per coordinate: one stream, and one noisy problem."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STEPS, EXAMPLES, SIZE = 150, 4, 5


class Stream(NamedTuple):
    """Batches of a linear model with the loss ½(w·x − y)², its mean over the batch."""

    inputs: np.ndarray  # (steps, examples, size)
    labels: np.ndarray  # (steps, examples)
    start: np.ndarray  # (size,)

    def per_example(self, w, t):
        return (self.inputs[t] @ w - self.labels[t])[:, None] * self.inputs[t]

    def gradient(self, w, t):
        return self.per_example(w, t).mean(0)

    def curvature(self, t):
        return np.mean(self.inputs[t] ** 2, axis=0)


@functools.cache
def stream(examples=EXAMPLES, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(STEPS, examples, SIZE)) * np.linspace(0.4, 1.2, SIZE)
    inputs[..., 1] += 0.5 * inputs[..., 0]  # neighbours that are not independent
    labels = inputs @ rng.normal(size=SIZE) + 0.3 * rng.normal(size=(STEPS, examples))
    return Stream(inputs, labels, rng.normal(size=SIZE))


def follow(box, single):
    """Parameters after each step of a transcription in NumPy, (w, t) -> update."""
    w, path = single.start, []
    for t in range(STEPS):
        w = w + box(w, t)
        path.append(w)
    return np.array(path)


def split(w):
    """A tree of two leaves; a batch axis in front may stay."""
    return {"a": w[..., :2], "b": w[..., 2:, None]}


def flat(tree):
    return jnp.concatenate([tree["a"], tree["b"].ravel()])


def run(optimizer, single, names):
    """Parameters after each step of the transformation with these extras, and its last state."""

    def body(carry, batch):
        params, state = carry
        x, y = batch
        residuals = x @ flat(params) - y
        extras = {
            "features": split(x[0]),
            "curvature_diagonal": split(jnp.mean(x**2, axis=0)),
            "per_example_grads": split(residuals[:, None] * x),
            "value_fn": lambda p: 0.5 * jnp.mean((x @ flat(p) - y) ** 2),
        }
        gradient = jax.tree.map(lambda g: g.mean(0), extras["per_example_grads"])
        extras = {name: extras[name] for name in names}
        updates, state = optimizer.update(gradient, state, params, **extras)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), flat(params)

    params = split(jnp.asarray(single.start))
    batches = (jnp.asarray(single.inputs), jnp.asarray(single.labels))
    start = (params, optimizer.init(params))
    (_, state), path = jax.jit(lambda c: jax.lax.scan(body, c, batches))(start)
    return np.asarray(path), state


def assert_follows(optimizer, box, names, single=None):
    """The transformation takes the steps of the transcription; its last state."""
    single = single or stream()
    expected = follow(box, single)
    assert np.all(np.isfinite(expected))
    assert np.linalg.norm(expected[-1] - expected[0]) > 0.1
    actual, state = run(optimizer, single, names)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
    return state


# --- a noisy problem -------------------------------------------------------------------------

DIMENSIONS, DATA, RUNS = 20, 500, 5


@functools.cache
def least_squares(rotated):
    """Five data sets: Hessian eigenvalues near 1 … 0.01, label noise ½, start 1.03 above the best.

    Inputs (runs, data, d), labels (runs, data), minima (runs, d), Hessians (runs, d, d).
    """
    data = [_data(seed, rotated) for seed in range(RUNS)]
    return tuple(np.stack(column) for column in zip(*data, strict=True))


def _data(seed, rotated):
    rng = np.random.default_rng(seed)
    curvatures = np.logspace(-2, 0, DIMENSIONS)
    w = rng.normal(size=DIMENSIONS)
    w *= np.sqrt(1.03 / (0.5 * w @ (curvatures * w)))
    rotation = np.linalg.qr(rng.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
    x = rng.normal(size=(DATA, DIMENSIONS)) * np.sqrt(curvatures)
    y = x @ w + 0.5 * rng.normal(size=DATA)
    if rotated:
        x = x @ rotation.T
    hessian = x.T @ x / DATA
    return x, y, np.linalg.solve(hessian, x.T @ y / DATA), hessian


def excess(optimizer, batch, steps, names=(), *, rotated=False):
    """Loss above the least one after some steps, of every run; ``batch`` None for all data.

    And the last states.
    """

    def one(x, y, minimum, hessian, key):
        def body(carry, key):
            w, state = carry
            rows = slice(None) if batch is None else jax.random.randint(key, (batch,), 0, DATA)
            inputs, labels = x[rows], y[rows]

            def value_fn(w):
                return 0.5 * jnp.mean((inputs @ w - labels) ** 2)

            extras = {"curvature_diagonal": jnp.mean(inputs**2, axis=0), "value_fn": value_fn}
            extras = {name: extras[name] for name in names}
            updates, state = optimizer.update(jax.grad(value_fn)(w), state, w, **extras)
            return (w + updates, state), None

        w = jnp.zeros(DIMENSIONS)
        keys = jax.random.split(key, steps)
        (w, state), _ = jax.lax.scan(body, (w, optimizer.init(w)), keys)
        return 0.5 * (w - minimum) @ hessian @ (w - minimum), state

    keys = jax.random.split(jax.random.key(0), RUNS)
    found, states = jax.jit(jax.vmap(one))(*map(jnp.asarray, least_squares(rotated)), keys)
    return np.asarray(found), states


def is_within(found, expected):
    """Whether a number measured on one unknown draw is in the range of ours, and a factor two."""
    return found.min() / 2 < expected < 2 * found.max()


def on_rosenbrock(optimizer, steps=20_000):
    """Rosenbrock's function after that many steps from (−1, 0), with its Gauss–Newton diagonal."""

    def value_fn(w):
        return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2

    def body(carry, _):
        w, state = carry
        curvature = jnp.array([2 + 800 * w[0] ** 2, 200.0])
        updates, state = optimizer.update(
            jax.grad(value_fn)(w), state, w, curvature_diagonal=curvature, value_fn=value_fn
        )
        return (w + updates, state), None

    w = jnp.array([-1.0, 0.0])
    carry = (w, optimizer.init(w))
    return float(value_fn(jax.jit(lambda c: jax.lax.scan(body, c, None, steps)[0])(carry)[0]))


def noisy_parabola(optimizer, names, runs=200, steps=3000):
    """½·3·(w − t)² with t ~ N(0, 1): w² over the last thousand steps of every run, last states."""

    def one(key):
        def body(carry, target):
            w, state = carry

            def value_fn(w):
                return 1.5 * (w - target) ** 2

            extras = {"curvature_diagonal": jnp.array(3.0), "value_fn": value_fn}
            extras = {name: extras[name] for name in names}
            updates, state = optimizer.update(jax.grad(value_fn)(w), state, w, **extras)
            return (w + updates, state), w

        w = jnp.array(1.0)
        targets = jax.random.normal(key, (steps,))
        (_, state), path = jax.lax.scan(body, (w, optimizer.init(w)), targets)
        return jnp.mean(path[-1000:] ** 2), state

    squares, states = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), runs))
    return np.asarray(squares), states

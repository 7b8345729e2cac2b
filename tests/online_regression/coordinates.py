"""Noisy problems for methods with one parabola per coordinate, and ways to run them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optgrad


def noisy_quadratic(steps=60, dimensions=7, noise=0.3, seed=0, seen=1.0):
    """Curvatures, start, gradient noise of every step, and which gradients are not exactly 0."""
    generator = np.random.default_rng(seed)
    curvature = np.geomspace(0.1, 3.0, dimensions) * np.where(np.arange(dimensions) == 3, -1, 1)
    start = generator.uniform(-1.5, 1.5, dimensions)
    noises = noise * generator.standard_normal((steps, dimensions))
    visible = generator.uniform(size=(steps, dimensions)) < seen
    return curvature, start, noises, visible


def run(optimizer, curvature, start, noises, visible):
    """Parameters after every step, shape (steps, dimensions), and the last state."""

    def step(carry, sample):
        theta, state = carry
        noise, seen = sample
        gradient = jnp.where(seen, curvature * theta + noise, 0.0)
        updates, state = optimizer.update(gradient, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    theta = jnp.asarray(start)
    samples = (jnp.asarray(noises, theta.dtype), jnp.asarray(visible))
    (_, state), path = jax.lax.scan(step, (theta, optimizer.init(theta)), samples)
    return np.asarray(path), state


def run_box(box, curvature, start, noises, visible):
    """The same with a box, ``box(theta, gradient) -> update``."""
    theta, path = np.array(start, np.float64), []
    for noise, seen in zip(noises, visible, strict=True):
        theta = theta + box(theta, np.where(seen, curvature * theta + noise, 0.0))
        path.append(theta)
    return np.array(path)


def chains(optimizer, steps, number=200, curvature=1.0, noise=1.0, start=1.0, every=1, seen=None):
    """Independent runs on a parabola, as the coordinates of one vector.

    Returns:
      What ``optgrad.diagnostics`` cannot give: the whole state at the end, and parameters at every
      ``every``-th step.
    """

    def step(carry, key):
        theta, state = carry
        noise_key, seen_key = jax.random.split(key)
        gradient = curvature * theta + noise * jax.random.normal(noise_key, theta.shape)
        if seen is not None:
            gradient = jnp.where(jax.random.bernoulli(seen_key, seen, theta.shape), gradient, 0.0)
        updates, state = optimizer.update(gradient, state, theta)
        return (optax.apply_updates(theta, updates), state), None

    def some(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, carry[0]

    @jax.jit
    def whole():
        theta = jnp.full((number,), start)
        keys = jax.random.split(jax.random.key(0), steps).reshape(steps // every, every)
        return jax.lax.scan(some, (theta, optimizer.init(theta)), keys)

    (_, state), path = whole()
    return state, np.asarray(path)


def parabola_run(optimizer, curvature, steps, offset=50.0):
    """Squared distances to the minimum of a noise-free parabola, started at distance 1."""

    def step(carry, _):
        theta, state = carry
        updates, state = optimizer.update(curvature * (theta - offset), state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), (theta - offset) ** 2

    theta = jnp.asarray(offset + 1.0)
    carry = (theta, optimizer.init(theta))
    return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, None, steps)[1])(carry))


def step_size(state):
    """σθ/σg of every coordinate."""
    v, u = np.asarray(state.position_variance), np.asarray(state.gradient_variance)
    return np.sqrt(v / u)


def create(name, **hyperparams):
    return optgrad.create(name, **hyperparams)


def derivative_through_run(name):
    """d loss / d α of eight steps, in which one coordinate's gradient is 0 and one is constant."""

    def loss(alpha):
        optimizer = create(name, alpha=alpha)
        theta = jnp.array([1.0, 2.0, 3.0])
        state = optimizer.init(theta)
        for _ in range(8):
            gradient = jnp.array([theta[0], 0.0, 0.5])
            updates, state = optimizer.update(gradient, state, theta)
            theta = optax.apply_updates(theta, updates)
        return jnp.sum(theta**2)

    return float(jax.jit(jax.grad(loss))(0.3))

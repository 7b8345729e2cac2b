"""Runs of the planning methods on functions of few variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def descend(optimizer, function, start, steps, *, dtype=None, record=lambda state: None):
    """Points after every call (steps, n), the final state, and what is recorded of every state."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(function)(params)
        updates, state = optimizer.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, record(state))

    start = jnp.asarray(start, dtype)
    (_, state), (points, records) = jax.jit(
        lambda w: jax.lax.scan(step, (w, optimizer.init(w)), None, length=steps)
    )(start)
    return np.asarray(points), state, jax.tree.map(np.asarray, records)


def step_by_step(optimizer, gradient, start, steps):
    """The same without jit, operation by operation, so that nothing is fused; no value is given."""
    params = jnp.asarray(start)
    state = optimizer.init(params)
    points = []
    for _ in range(steps):
        updates, state = optimizer.update(jnp.asarray(gradient(np.asarray(params))), state, params)
        params = params + updates
        points.append(np.asarray(params))
    return np.array(points), state


def plans_of(records):
    """The step sizes of every plan, from records (is_planned, step_sizes) of every call."""
    planned, sizes = records
    starts = np.flatnonzero(planned & ~np.concatenate([[False], planned[:-1]]))
    return sizes[starts]


def planned(state):
    return state.is_planned, state.step_sizes


def rosenbrock(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def convex(w):
    return 0.5 * (1000 * w[0] ** 2 + w[1] ** 2)


def rotated_quadratic(seed, dimension, condition=100.0):
    """A function with eigenvalues 1/condition … 1 in random directions, and a start."""
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.standard_normal((dimension, dimension)))
    eigenvalues = np.geomspace(1 / condition, 1.0, dimension)
    matrix = jnp.asarray(rotation * eigenvalues @ rotation.T)
    return (lambda w: 0.5 * w @ matrix @ w), generator.standard_normal(dimension)


def error(points, minimum=1.0):
    return np.linalg.norm(points - minimum, axis=-1)

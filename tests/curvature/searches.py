"""Runs of methods with a line search, and what all of them have to stand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.experiments.reproduce import survey_toys


def step(optimizer, value_fn, params, state, /, **changes):
    value, grad = jax.value_and_grad(value_fn)(params)
    given = {"value": value, "grad": grad, "value_fn": value_fn} | changes
    updates, state = optimizer.update(given["grad"], state, params, **given)
    return optax.apply_updates(params, updates), state


def compiled(optimizer, value_fn, steps, diagnose=False):
    """params -> values before each step, parameters after each, the last state (or diagnostics)."""

    def body(carry, _):
        params, state = step(optimizer, value_fn, *carry)
        found = optgrad.diagnostics(state) if diagnose else None
        return (params, state), (value_fn(carry[0]), params, found)

    def run(params):
        (_, state), (values, after, found) = jax.lax.scan(
            body, (params, optimizer.init(params)), None, steps
        )
        return values, after, found if diagnose else state

    return jax.jit(run)


def rosenbrock(x):
    """Valleys in a chain."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def assert_solves(optimizer, toy, steps, cost, dtype):
    """Within those numbers and half as many again, without one increase."""
    found = survey_toys.solve(survey_toys.TOYS[toy], optimizer, 2 * steps + 10, dtype=dtype)
    assert found.increases == 0
    assert found.steps is not None
    assert found.steps <= 1.5 * steps
    assert found.cost <= 1.5 * cost


def assert_stays_on_the_saddle(optimizer):
    """Exactly on the stable manifold nothing deterministic escapes."""
    found = survey_toys.solve(survey_toys.TOYS["S0"], optimizer, 20)
    assert found.steps is None
    assert abs(found.value) < 1e-8
    assert found.increases == 0


def assert_like_scipy(optimizer, method, steps):
    """Where scipy's method ends: logistic regression with one minimum, and a chain of valleys."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    features = generator.standard_normal((40, 6)) * np.logspace(0, 1, 6)
    labels = np.where(generator.random(40) < 0.5, -1.0, 1.0)

    def logistic(w):
        margins = labels * jnp.dot(features, w, precision="highest")
        return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.01 * jnp.sum(w * w)

    problems = ((logistic, np.ones(6), 1e-7), (rosenbrock, np.full(8, -0.5), 1e-5))
    for value_fn, start, tolerance in problems:
        value_and_grad = jax.jit(jax.value_and_grad(value_fn))
        theirs = scipy_optimize.minimize(
            lambda x, f=value_and_grad: [np.asarray(part, float) for part in f(x)],
            start,
            jac=True,
            method=method,
            options={"gtol": 1e-9, "maxiter": 2000},
        )
        values, params, _ = compiled(optimizer, value_fn, steps)(jnp.asarray(start))
        np.testing.assert_allclose(params[-1], theirs.x, atol=tolerance)
        np.testing.assert_allclose(values[-1], theirs.fun, atol=tolerance**2 * 100)


def assert_stands_non_finite_numbers(optimizer):
    """A zero step, counted, and the run begins anew from where it is."""
    params = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}

    def value_fn(p):
        return jnp.sum(p["a"] ** 2) * (1.0 + p["b"] ** 2) + p["b"] ** 2

    run = jax.jit(functools.partial(step, optimizer, value_fn))
    fresh = optimizer.init(params)
    onward = run(params, fresh)
    nan = jax.tree.map(lambda x: x.at[...].set(jnp.nan), params)
    for changes in ({"value": jnp.nan}, {"grad": nan}, {"value_fn": lambda p: p["b"] * jnp.nan}):
        spoilt = functools.partial(step, optimizer, value_fn, **changes)
        after, state = jax.jit(spoilt)(*onward)
        jax.tree.map(np.testing.assert_array_equal, after, onward[0])
        assert state.rejected == 1
        jax.tree.map(np.testing.assert_array_equal, state.direction, fresh.direction)
    again, state = run(after, state)
    assert value_fn(again) < value_fn(after)
    assert state.rejected == 1


def assert_stands_zero_gradients(optimizer):
    """At a minimum and on a plateau nothing moves, and nothing is NaN."""
    for value_fn in (lambda x: jnp.sum(x**2), lambda x: 0.0 * jnp.sum(x) + 3.0):
        _, params, state = compiled(optimizer, value_fn, 3)(jnp.zeros(3))
        np.testing.assert_array_equal(params, 0.0)
        assert state.rejected == 0
        for x in jax.tree.leaves((state.direction, state.cost)):
            assert np.all(np.isfinite(x))


def assert_descends_negative_curvature(optimizer):
    """From the top of a double well to the bottom, by decreases only."""
    values, params, _ = compiled(
        optimizer, lambda x: jnp.sum(0.25 * x**4 - 0.5 * jnp.array([1.0, 3.0]) * x**2), 25
    )(jnp.array([1e-2, -1e-3]))
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(np.abs(params[-1]), np.sqrt([1.0, 3.0]), rtol=1e-2)


def assert_narrow_parameters(optimizer):
    """bfloat16 in, bfloat16 out, state and search in float32, the loss never up."""
    params = {"a": jnp.array([1.5, -2.0], jnp.bfloat16), "b": jnp.array([[0.5]], jnp.bfloat16)}

    def value_fn(p):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
        return jnp.sum((wide["a"] - 1.0) ** 2) + 5.0 * (wide["b"][0, 0] - wide["a"][0]) ** 2

    values, after, state = compiled(optimizer, value_fn, 12)(params)
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 1e-2 * values[0]
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def assert_mapped_is_the_loop(optimizer, rtol):
    starts = jnp.array([[-1.2, 1.0, 0.5], [0.3, -0.4, 1.0], [2.0, 0.1, -1.0]])
    run = compiled(optimizer, rosenbrock, 12)
    mapped = jax.jit(jax.vmap(run))(starts)
    for i, start in enumerate(starts):
        values, params, _ = run(start)
        np.testing.assert_allclose(mapped[0][i], values, rtol=rtol)
        np.testing.assert_allclose(mapped[1][i], params, rtol=rtol)


def random_gradients(steps=40, seed=0):
    """Some nearly orthogonal to the one before, some not; a tree of 12 numbers."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((steps, 12)) * generator.uniform(0.1, 3.0, (steps, 1))


def split(vector):
    return {"a": vector[:5], "b": (vector[5], None, vector[6:].reshape(2, 3))}


def joined(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def directions(transformation, gradients, points=None):
    """What a direction makes of gradients, as vectors; and its last state."""
    points = np.zeros_like(gradients) if points is None else points
    state = transformation.init(split(jnp.asarray(points[0])))
    update, found = jax.jit(transformation.update), []
    for gradient, point in zip(gradients, points, strict=True):
        tree, state = update(split(jnp.asarray(gradient)), state, split(jnp.asarray(point)))
        found.append(joined(tree))
    return np.array(found), state

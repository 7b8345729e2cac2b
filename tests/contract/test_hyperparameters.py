"""Hyperparameters are traced, scheduled, injected, read and set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import problem

pytestmark = pytest.mark.methods_where(predicate=lambda method: problem.tuned(method) is not None)


def injected(method, **changes):
    return optgrad.inject(method.name, **problem.hyperparams(method, **changes))


@functools.cache
def injected_update(name):
    """The compiled update of an injected method; its hyperparameters are in the state."""
    method = optgrad.get_method(name)
    return jax.jit(problem.make_update(method, injected(method)))


def run_by_hand(method, values):
    """A run whose tuned hyperparameter is set in ``state.hyperparams`` before each step."""
    name = problem.tuned(method)[0]
    remaining = iter(values)

    def update(grad, state, *rest):
        value = jnp.asarray(next(remaining), state.hyperparams[name].dtype)
        state = state._replace(hyperparams={**state.hyperparams, name: value})
        return injected_update(method.name)(grad, state, *rest)

    standard = problem.standard()
    return problem.run(method, update, injected(method).init(standard.params), standard)


def test_inject_equals_create(method):
    """`optgrad.inject` and `optgrad.create` take the same steps; the value can be read."""
    name, value = problem.tuned(method)
    standard = problem.standard()
    state = injected(method).init(standard.params)
    np.testing.assert_allclose(state.hyperparams[name], value, rtol=1e-6)
    actual = problem.run(method, injected_update(method.name), state, standard)
    np.testing.assert_allclose(actual.state.hyperparams[name], value, rtol=1e-6)
    problem.assert_close(actual.updates, problem.standard_run(method).updates, rtol=1e-4)


def test_injected_hyperparameter_is_set(method):
    """Setting ``state.hyperparams[name]`` is the same as creating the method with that value."""
    actual = run_by_hand(method, [problem.tuned(method)[1] / 2] * problem.STEPS)
    expected = problem.standard_run(method, factor=0.5)
    problem.assert_close(actual.updates, expected.updates, rtol=1e-4)


def decreasing(value):
    """A schedule, and its values."""
    schedule = optax.linear_schedule(value, value / 4, problem.STEPS - 1)
    return schedule, [value * (1 - 0.75 * t / (problem.STEPS - 1)) for t in range(problem.STEPS)]


def test_inject_schedule(method):
    """A schedule of the tuned hyperparameter, injected, equals setting it before each step."""
    name, value = problem.tuned(method)
    schedule, values = decreasing(value)
    actual = problem.run_of(method, injected(method, **{name: schedule}))
    problem.assert_close(actual.updates, run_by_hand(method, values).updates, rtol=1e-4)
    np.testing.assert_allclose(actual.state.hyperparams[name], values[-1], rtol=1e-5)


def tunes_learning_rate(method):
    return problem.tuned(method) is not None and problem.tuned(method)[0] == "learning_rate"


@pytest.mark.methods_where(predicate=tunes_learning_rate)
def test_learning_rate_schedule(method):
    """A schedule as ``learning_rate`` equals setting the rate before each step."""
    schedule, values = decreasing(problem.tuned(method)[1])
    actual = problem.run_of(method, problem.create(method, learning_rate=schedule))
    problem.assert_close(actual.updates, run_by_hand(method, values).updates, rtol=1e-4)


@problem.OWN
def test_every_real_hyperparameter_is_scheduled(method):
    """Each one may be a schedule; constant ones change no number."""
    values = {**problem.real_hyperparameters(method), problem.tuned(method)[0]: None}
    values = {name: problem.hyperparams(method).get(name, value) for name, value in values.items()}
    schedules = {name: lambda count, v=v: v + 0.0 * count for name, v in values.items()}
    actual = problem.run_of(method, problem.create(method, **schedules))
    problem.assert_close(actual.updates, problem.standard_run(method).updates, rtol=1e-4)


def test_inject_integers(method):
    """Integers given for real hyperparameters are taken as real numbers."""
    integers = {problem.tuned(method)[0]: 1}
    for name, default in problem.real_hyperparameters(method).items():
        try:  # a range may exclude the integer
            problem.create(method, **{name: int(default)})
        except ValueError:
            continue
        integers.setdefault(name, int(default))
    optimizer = injected(method, **integers)
    state = optimizer.init(problem.standard().params)
    for name, value in integers.items():
        assert jnp.issubdtype(state.hyperparams[name].dtype, jnp.floating), name
        assert state.hyperparams[name] == value, name
    floats = {name: float(value) for name, value in integers.items()}
    actual = problem.run_of(method, optimizer, steps=2)
    expected = problem.run_of(method, problem.create(method, **floats), steps=2)
    problem.assert_close(actual.updates, expected.updates, rtol=1e-4)


def narrow_problem():
    params = problem.standard().params
    return problem.quadratic(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))


def test_injected_values_are_accurate(method):
    """With bfloat16 parameters the injected values are kept in float32."""
    given = {**problem.real_hyperparameters(method), **problem.hyperparams(method)}
    values = injected(method).init(narrow_problem().params).hyperparams
    assert problem.tuned(method)[0] in values
    for key in given.keys() & values.keys():
        assert values[key].dtype == jnp.float32, key
        np.testing.assert_allclose(values[key], given[key], rtol=1e-6, err_msg=key)


def test_inject_low_precision(method):
    """With bfloat16 parameters, `optgrad.inject` changes neither types nor averages."""
    single = narrow_problem()

    def run(optimizer):
        """Steps at fixed parameters, so that roundings of these do not add up."""
        update = problem.make_update(method, optimizer)
        run_update = problem.cheap(method, update)
        state, every = optimizer.init(single.params), []
        types = [x.dtype for x in jax.tree.leaves(state)]
        for t in range(3):
            batch = single.batch(t)
            grad, extras = problem.arrays(method, single.loss_fn, single.params, batch)
            arguments = (grad, state, single.params, extras, batch)
            if t == 0:
                updates, later = jax.eval_shape(update, *arguments)
                assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
                assert [x.dtype for x in jax.tree.leaves(later)] == types
            updates, state = run_update(*arguments)
            every.append(updates)
        return state, every

    state, updates = run(injected(method))
    expected_state, expected_updates = run(problem.create(method))
    problem.assert_close(state.inner_state, expected_state, rtol=1e-4)
    problem.assert_close(updates, expected_updates)


def test_optax_inject_hyperparams(method):
    """Plain `optax.inject_hyperparams` needs nothing but the record's ``static_args``."""
    name, value = problem.tuned(method)
    wrapped = optax.inject_hyperparams(method.factory, static_args=method.static_args)
    actual = problem.run_of(method, wrapped(**problem.hyperparams(method)))
    problem.assert_close(actual.updates, problem.standard_run(method).updates, rtol=1e-4)
    np.testing.assert_allclose(actual.state.hyperparams[name], value, rtol=1e-6)

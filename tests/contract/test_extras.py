"""Extra arguments: unknown ones are ignored, missing ones are refused by name."""

import jax
import jax.numpy as jnp
import pytest

from . import problem


def inputs(method):
    """Gradient, initial state, parameters and extra arguments."""
    standard = problem.standard()
    optimizer = problem.create(method)
    point = (method, standard.loss_fn, standard.params, standard.batch(0))
    grad, arrays = problem.arrays(*point)
    extras = {**arrays, **problem.functions(*point)}
    return optimizer, grad, optimizer.init(standard.params), standard.params, extras


def check_message(method, error, names):
    """Own families name what is missing, and refuse it themselves."""
    if method.family != "baselines":
        assert isinstance(error.value, ValueError | TypeError)
        assert all(name in str(error.value) for name in names)


def test_unknown_extras_are_ignored(method):
    """Arguments meant for others in the chain change nothing, whatever they are."""
    optimizer, grad, state, params, extras = inputs(method)
    unknown = {"for_another": jnp.ones(3), "not_an_array": object(), "tree": {"a": None}}
    actual = optimizer.update(grad, state, params, **extras, **unknown)
    problem.assert_identical(actual, optimizer.update(grad, state, params, **extras))


@pytest.mark.methods_where(predicate=lambda method: "params" not in method.needs)
def test_params_are_optional(method):
    """Without "params" among its needs, a method takes None for them, twice in a row."""
    optimizer, grad, state, params, extras = inputs(method)

    @jax.jit
    def both(params):
        first, second = state, state
        for _ in range(2):
            actual, first = optimizer.update(grad, first, None, **extras)
            expected, second = optimizer.update(grad, second, params, **extras)
        return (actual, first), (expected, second)

    problem.assert_identical(*both(params))


@pytest.mark.methods_where(predicate=lambda method: "params" in method.needs)
def test_missing_params_are_refused(method):
    """With "params" among its needs, a method refuses None for them."""
    optimizer, grad, state, _, extras = inputs(method)
    with pytest.raises(Exception) as error:  # noqa: PT011  baselines raise what they like
        optimizer.update(grad, state, None, **extras)
    check_message(method, error, ["params"])


@pytest.mark.methods_where(predicate=lambda method: method.needs - {"params"})
def test_missing_extras_are_refused(method):
    """An extra argument that is needed and missing is refused by a message that names it."""
    optimizer, grad, state, params, extras = inputs(method)
    for missing in problem.names_of_extras(method):
        given = {name: extra for name, extra in extras.items() if name != missing}
        with pytest.raises(Exception) as error:  # noqa: PT011  baselines raise what they like
            optimizer.update(grad, state, params, **given)
        check_message(method, error, problem.accepted_for(method, missing))

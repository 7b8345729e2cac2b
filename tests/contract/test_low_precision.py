"""Every method with its state in 16 bits: what is narrow, and that the run stays near."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

from . import problem

HAS_VECTORS = pytest.mark.methods_where(predicate=lambda method: method.state_vectors(10) > 0)
NARROWS = pytest.mark.methods_where(predicate=lambda method: bool(narrow_fields(method)))


def shapes():
    params = problem.standard().params
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def fields(optimizer, dtype):
    """Paths of the state's arrays of that type."""
    state = jax.eval_shape(optimizer.init, shapes())
    state = state.inner if isinstance(state, optgrad.LowPrecisionState) else state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, x in leaves if x.dtype == dtype]


def narrow_fields(method):
    """Of the method's state under `low_precision_state`."""
    return fields(optgrad.low_precision_state(problem.create(method)), jnp.bfloat16)


@HAS_VECTORS
def test_low_precision_is_documented(method):
    """A record with vectors says which of them may be narrow, and what its ``state_dtype`` does."""
    assert method.low_precision == method.low_precision.strip() != ""
    if "state_dtype" in method.hyperparameters:
        assert "state_dtype" in method.low_precision
    assert method.low_precision.startswith("nothing") == (not narrow_fields(method))


@pytest.mark.methods_where(predicate=lambda method: "state_dtype" in method.hyperparameters)
def test_state_dtype_and_the_wrapper_agree(method):
    """What ``state_dtype`` narrows is what `low_precision_state` narrows by default."""
    optimizer = problem.create(method, state_dtype=jnp.bfloat16)
    assert fields(optimizer, jnp.bfloat16) == narrow_fields(method)


@NARROWS
def test_low_precision_state(method):
    """Its types are fixed from the start, and four steps lead nearly to where they lead in float32.

    Fixed types are also what keeps the second step from being compiled again.
    """
    optimizer = optgrad.low_precision_state(problem.create(method))
    start = optimizer.init(problem.standard().params)
    narrow = problem.run_of(method, optimizer)
    assert problem.avals(narrow.state) == problem.avals(start)
    expected = problem.standard_run(method)
    problem.assert_finite(narrow.params)

    def flat(tree):
        return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])

    moved = flat(expected.params) - flat(problem.standard().params)
    error = flat(narrow.params) - flat(expected.params)
    assert np.linalg.norm(error) <= 0.02 * np.linalg.norm(moved)

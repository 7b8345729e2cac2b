"""Any tree, any floating-point type."""

import functools

import jax
import jax.numpy as jnp
import pytest

import optgrad

from . import problem

PARAMS = {"b": jnp.array([0.5, -1.0, 1.5]), "s": jnp.array(0.7), "w": jnp.array([[1.0, -0.6]])}
DTYPES = {
    "float8_e4m3fn": ("float8_e4m3fn",) * 3,
    "float8_e5m2": ("float8_e5m2",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "float16": ("float16",) * 3,
    "float32": ("float32",) * 3,
    "float64": ("float64",) * 3,
    "float32_in_x64": ("float32",) * 3,
    "mixed": ("bfloat16", "float32", "float16"),
    "mixed_in_x64": ("float64", "bfloat16", "float32"),
}


@pytest.fixture
def dtypes(request):
    """Types of the three leaves, with 64-bit floats enabled where they are wanted."""
    if "64" in request.param:
        request.getfixturevalue("x64")
    return DTYPES[request.param]


def abstract_steps(method, single):
    """Abstract updates of one step, and the abstract states around two."""
    optimizer = problem.create(method)
    update = problem.make_update(method, optimizer, single.loss_fn)
    batch = single.batch(0)
    grad, extras = problem.arrays(method, single.loss_fn, single.params, batch)
    state, states = jax.eval_shape(optimizer.init, single.params), []
    for _ in range(2):
        states.append(state)
        updates, state = jax.eval_shape(update, grad, state, single.params, extras, batch)
    return updates, [*states, state]


def typed_problem(dtypes):
    leaves = [x.astype(d) for x, d in zip(jax.tree.leaves(PARAMS), dtypes, strict=True)]
    assert [x.dtype for x in leaves] == [jnp.dtype(d) for d in dtypes]
    return problem.quadratic(jax.tree.unflatten(jax.tree.structure(PARAMS), leaves), steps=2)


@pytest.mark.parametrize("dtypes", list(DTYPES), indirect=True)
def test_dtypes(method, dtypes):
    """Updates have their parameter's type, the state's are fixed by ``init``; all is finite."""
    single = typed_problem(dtypes)
    updates, states = abstract_steps(method, single)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.dtype(d) for d in dtypes]
    initial, *later = [[x[:3] for x in problem.avals(state)] for state in states]
    assert later == [initial, initial]

    optimizer = problem.create(method)
    update = problem.cheap(method, problem.make_update(method, optimizer))
    run = problem.run(method, update, optimizer.init(single.params), single, steps=2)
    problem.assert_finite(run.updates)


@pytest.mark.parametrize("dtypes", ["float32", "mixed_in_x64"], indirect=True)
def test_weak_types(method, dtypes):
    """The state of ``init`` has the weak types that ``update`` returns: nothing is retraced."""
    initial, *later = map(problem.avals, abstract_steps(method, typed_problem(dtypes))[1])
    assert later == [initial, initial]


@problem.OWN
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "float8_e5m2"], indirect=True)
def test_averages_are_wide(method, dtypes):
    """For parameters of 8 or 16 bits the state has at least 32, by default."""
    states = abstract_steps(method, typed_problem(dtypes))[1]
    for path, dtype, *_ in problem.avals(states):
        assert not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize >= 4, path


@problem.OWN
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_numbers_that_are_not_real_are_refused(method, dtype):
    """By ``init``, which names the leaf, its type and what to do about it."""
    params = {"first": jnp.ones(2), "second": [jnp.ones(3, dtype)]}
    advice = "split_real_and_imaginary" if dtype == "complex64" else "optax.masked"
    with pytest.raises(TypeError, match=rf"params\['second'\]\[0\] .*{dtype}.*{advice}"):
        problem.create(method).init(params)


@functools.cache
def run_on_leaves(name):
    """Parameters after two steps on a list of two leaves."""
    method = optgrad.get_method(name)
    optimizer = problem.create(method)
    single = problem.quadratic(problem.plain_leaves(), steps=2)
    update = problem.cheap(method, problem.make_update(method, optimizer))
    return problem.run(method, update, optimizer.init(single.params), single, steps=2).params


@pytest.mark.parametrize("tree", list(problem.odd_trees()))
def test_odd_trees(method, tree):
    """Any tree; two leaves have the same numbers in whatever tree they are."""
    single = problem.quadratic(problem.odd_trees()[tree], steps=2)
    updates, states = abstract_steps(method, single)
    assert jax.tree.structure(updates) == jax.tree.structure(single.params)
    initial, *later = [[x[:3] for x in problem.avals(state)] for state in states]
    assert later == [initial, initial]

    optimizer = problem.create(method)
    update = problem.cheap(method, problem.make_update(method, optimizer))
    run = problem.run(method, update, optimizer.init(single.params), single, steps=2)
    problem.assert_finite(run.updates)
    assert jax.tree.structure(run.params) == jax.tree.structure(single.params)
    leaves = [x for x in jax.tree.leaves(run.params) if x.size]
    if len(leaves) == len(problem.plain_leaves()):
        problem.assert_close(leaves, run_on_leaves(method.name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m_svag", "adaptive_sgd"])
def test_ten_thousand_leaves(name):
    """Traced in seconds, in proportion to the leaves; a million of them nobody would compile."""
    params = [jnp.ones(())] * 10_000
    optimizer = problem.create(optgrad.get_method(name))
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert len(updates) == len(params)
    assert problem.avals(after) == problem.avals(state)

"""jit, scan and vmap change nothing but the speed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import problem


def test_jit_equals_eager(method):
    """Two steps under jit and without it."""
    standard = problem.standard()
    optimizer = problem.create(method)
    eager = problem.make_update(method, optimizer)
    state = optimizer.init(standard.params)
    actual = problem.run(method, eager, state, standard, steps=2)
    problem.assert_close(actual, problem.standard_run(method, steps=2), rtol=1e-4)


def test_init_jit_equals_eager(method):
    """The initial state, values and abstract values, under jit and without it."""
    init = problem.create(method).init
    params = problem.standard().params
    eager, jitted = init(params), jax.jit(init)(params)
    problem.assert_identical(jitted, eager)
    concrete = jax.tree.map(jax.typeof, eager)
    assert problem.avals(jax.eval_shape(init, params)) == problem.avals(concrete)


def test_scan_equals_loop(method):
    """A whole run in `lax.scan`: the state is a loop carry of fixed type."""
    standard = problem.standard()
    optimizer = problem.create(method)
    step = problem.make_step(method, optimizer)

    @jax.jit
    def run(params, batches):
        return problem.scan(step, params, optimizer.init(params), batches)

    actual = run(standard.params, standard.batches)
    problem.assert_close(actual, problem.standard_run(method)[:2], rtol=1e-4)


@pytest.mark.methods_where(predicate=lambda method: problem.tuned(method) is not None)
def test_vmap_over_hyperparameter(method):
    """A sweep of the tuned hyperparameter is one compilation, and equals separate runs."""
    standard = problem.standard()
    name, value = problem.tuned(method)
    traces = []

    def run(value):
        traces.append(value)
        optimizer = problem.create(method, **{name: value})
        step = problem.make_step(method, optimizer)
        state = optimizer.init(standard.params)
        return problem.scan(step, standard.params, state, standard.batches)[0]

    factors = (1.0, 0.75, 0.5)
    sweep = jax.jit(jax.vmap(run))(value * np.array(factors, np.float32))
    assert len(traces) == 1
    for i in (0, 2):
        separate = problem.standard_run(method, factor=factors[i]).params
        together = jax.tree.map(lambda x, i=i: x[i], sweep)
        problem.assert_close(together, separate, rtol=1e-4)


def test_vmap_over_runs(method):
    """Several starting points and batch streams at once equal separate runs."""
    first = problem.standard()
    params = jax.tree.map(lambda p: -0.5 * p, first.params)
    second = problem.quadratic(params, seed=1)
    optimizer = problem.create(method)
    step = problem.make_step(method, optimizer)

    @jax.jit
    @jax.vmap
    def run(params, batches):
        return problem.scan(step, params, optimizer.init(params), batches)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    together = run(stack(first.params, second.params), stack(first.batches, second.batches))
    for i, single in enumerate((first, second)):
        update, state = problem.standard_update(method.name), optimizer.init(single.params)
        separate = problem.run(method, update, state, single)[:2]
        actual = jax.tree.map(lambda x, i=i: x[i], together)
        problem.assert_close(actual, separate, rtol=1e-4)


def comparable(method):
    """The pairs that can be compared here: the problems have no layers to take statistics of."""
    return [pair for pair in problem.alternatives(method) if "kfac_stats" not in pair]


@pytest.mark.methods_where(predicate=comparable)
@pytest.mark.parametrize("tree", ["standard", "none", "empty", "zero_size", "scalar"])
def test_either_extra_argument(method, tree):
    """The gradient's variance, or the per-example gradients it is computed from; and the like."""
    if tree == "standard":
        single = problem.standard()
    else:
        single = problem.quadratic(problem.odd_trees()[tree])
    optimizer = problem.create(method)

    @jax.jit
    def run(params, batches):
        runs = []
        for name in itertools.chain(*comparable(method)):
            step = problem.make_step(method, optimizer, prefer=name)
            runs.append(problem.scan(step, params, optimizer.init(params), batches))
        return runs

    first, *others = run(single.params, single.batches)
    for other in others:
        problem.assert_close(other, first)

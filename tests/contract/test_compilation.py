"""One compilation, donated buffers, and a step that costs its memory traffic and no more."""

import re
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import problem

LEAF_SIZE = 1000


def donated_run(method, copy_state):
    standard = problem.standard()
    params = jax.tree.map(jnp.copy, standard.params)
    state = problem.create(method).init(params)
    state = jax.tree.map(jnp.copy, state) if copy_state else state
    for t in range(problem.STEPS):
        params, state = problem.donated_step(method.name)[0](params, state, standard.batch(t))
    return params, state


def test_no_recompilation(method):
    """The second step finds the first one's compilation: shapes, types and weak types are fixed."""
    donated_run(method, copy_state=True)  # whether it can be donated as it is, is the next test
    step, traces = problem.donated_step(method.name)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_donated_buffers(method):
    """Donating parameters and state changes no number and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = donated_run(method, copy_state=False)
    problem.assert_close(actual, problem.standard_run(method)[:2])


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_state_size(method):
    """The state holds the record's number of vectors, and beyond them no more than scalars."""
    required = {
        name: value
        for name, value in method.test_hyperparams.items()
        if method.hyperparameters[name].default is method.hyperparameters[name].empty
    }
    optimizer = optgrad.create(method.name, **required)

    def sizes(width):
        shapes = {"b": (width,), "w": (3, width)}
        params = {key: jax.ShapeDtypeStruct(s, jnp.float32) for key, s in shapes.items()}
        return nbytes(params), nbytes(jax.eval_shape(optimizer.init, params))

    (small, small_state), (large, large_state) = sizes(100), sizes(300)
    assert large_state - small_state == pytest.approx(method.state_size * (large - small))
    assert 0 <= small_state - method.state_size * small <= 256


def efficiency(method):
    """What XLA makes of a donated step on many leaves; extra trees are built outside of it."""
    optimizer = problem.create(method)
    leaves = 10 if "value_fn" in method.needs else 100  # line searches compile for too long
    leaf = np.linspace(-1.0, 1.0, LEAF_SIZE, dtype=np.float32)
    params = {f"leaf_{i:03d}": jnp.asarray(leaf) for i in range(leaves)}
    single = problem.quadratic(params, steps=1)
    batch = single.batch(0)
    grad, extras = problem.arrays(method, single.loss_fn, params, batch)

    def step(params, state, grad, extras):
        functions = problem.functions(method, single.loss_fn, params, batch)
        updates, state = optimizer.update(grad, state, params, **extras, **functions)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grad, extras).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "method": method.name,
        "leaves": leaves,
        "copies": len(re.findall(r"= \S+ copy\(", compiled.as_text())),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "param_bytes": nbytes(params),
        "state_bytes": nbytes(state),
        "fusions": len(re.findall(r"= \S+ fusion\(", compiled.as_text())),
        "compile_s": round(seconds, 2),
    }


def test_efficiency(method, record_property):
    """No copies, no temporaries, all memory reused; recorded and not required of baselines."""
    row = efficiency(method)
    record_property("efficiency", row)
    if method.family == "baselines" or "value_fn" in method.needs:
        return
    assert row["copies"] == 0
    assert row["temp_bytes"] < 0.01 * row["param_bytes"]
    assert row["alias_bytes"] == row["param_bytes"] + row["state_bytes"]

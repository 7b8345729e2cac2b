"""One compilation, donated buffers, and a step that costs its memory traffic and no more."""

import math
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

LEAF_SIZE = 20_000
# The step of the coordinates is stored while it is projected on the subspace.
# The natural gradient has no state, and two leaves of 100 at a time: the mean and the direction.
TEMPORARY_VECTORS = {"ogr_diagonal_subspace": 1.02, "natural_gradient": 0.02}
SMALL_STATE = 4096  # bytes of scalars, and of matrices over a fixed number of directions


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

    def vectors(params_bytes):
        """Bytes of the state's vectors, for float32 parameters."""
        return params_bytes * method.state_vectors(params_bytes // 4)

    widths = (5, 15) if method.is_dense else (100, 300)
    (small, small_state), (large, large_state) = map(sizes, widths)
    assert large_state - small_state == pytest.approx(vectors(large) - vectors(small))
    assert 0 <= small_state - vectors(small) <= SMALL_STATE


def copies(hlo, size):
    """How many arrays of at least that size are copied; scalars cost nothing."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", hlo)
    return sum(math.prod(int(n) for n in shape.split(",") if n) >= size for shape in shapes)


def compiled_for_memory(lowered):
    """The program scheduled for little memory, as on accelerators.

    XLA's default on CPU is to start whatever can be started, with as many temporaries alive. The
    code generator is the default one, which is faster for many fusions (see tests/conftest.py).
    """
    scheduler = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    emitters = {"xla_cpu_use_fusion_emitters": True}
    older = {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # the same, before jax 0.8
    for options in ({**scheduler, **emitters}, scheduler, {**older, **emitters}, older):
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:  # versions of XLA that have no such option
            continue
    return lowered.compile()


def efficiency(method, leaves=100):
    """What XLA makes of a donated step on many leaves; extra trees are built outside of it."""
    optimizer = problem.create(method)
    has_loops = any(map(problem.is_function, method.needs))
    leaves = 10 if has_loops else leaves  # line searches compile for too long
    leaves, size = (4, 20) if method.is_dense else (leaves, LEAF_SIZE)
    leaf = np.linspace(-1.0, 1.0, size, dtype=np.float32)
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
    compiled = compiled_for_memory(
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grad, extras)
    )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "method": method.name,
        "leaves": leaves,
        "copies": copies(compiled.as_text(), size),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "param_bytes": nbytes(params),
        "state_bytes": nbytes(state),
        "fusions": len(re.findall(r"= \S+ fusion\(", compiled.as_text())),
        "compile_s": round(seconds, 2),
    }


def test_efficiency(method, record_property):
    """No copies, no temporaries, all memory reused; recorded and not required of baselines.

    A copy of less than one leaf (of a scalar, of a matrix over a few directions) counts as none,
    and temporaries are measured against parameters and state. A dense method factorises matrices
    over all parameters, which takes copies and workspace of their size: only the reuse of its
    memory is required.
    """
    row = efficiency(method)
    record_property("efficiency", row)
    if method.family == "baselines" or any(map(problem.is_function, method.needs)):
        return
    if not method.is_dense:
        assert row["copies"] == 0
        allowed = TEMPORARY_VECTORS.get(method.name, 0) * row["param_bytes"]
        # 1 %, which is one leaf of a hundred, and scalars.
        assert row["temp_bytes"] < allowed + 0.012 * (row["param_bytes"] + row["state_bytes"])
    # All that grows with the parameters; what is small and only written has no buffer to reuse.
    assert row["alias_bytes"] >= row["param_bytes"] + row["state_bytes"] - 1024

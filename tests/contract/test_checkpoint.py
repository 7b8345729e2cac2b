"""A run that is saved and restored half-way continues bit by bit."""

import io
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import optgrad

from . import problem

HALF = problem.STEPS // 2


def halfway(method):
    run = problem.standard_run(method, steps=HALF)
    return {"params": run.params, "state": run.state}


def check_continues(method, restored):
    """The second half of a run from what was restored, against the uninterrupted run."""
    standard = problem.standard()
    rest = jax.tree.map(lambda x: x[HALF:], standard.batches)
    second = problem.Problem(standard.loss_fn, restored["params"], rest)
    update = problem.standard_update(method.name)
    steps = problem.STEPS - HALF
    actual = problem.run(method, update, restored["state"], second, steps)
    problem.assert_identical(actual[:2], problem.standard_run(method)[:2])


def fresh(method):
    """A checkpoint's structure, as a new process has it: from ``init``."""
    params = problem.standard().params
    return {"params": params, "state": problem.create(method).init(params)}


def test_pickled_leaves(method):
    """NumPy leaves through pickle, the structure from a fresh ``init``."""
    saved = pickle.dumps([np.asarray(x) for x in jax.tree.leaves(halfway(method))])
    leaves = [jnp.asarray(x) for x in pickle.load(io.BytesIO(saved))]
    structure = jax.tree.structure(fresh(method))
    check_continues(method, jax.tree.unflatten(structure, leaves))


def test_orbax_standard(method, tmp_path):
    """orbax' `StandardCheckpointer`, restored into the types of a fresh ``init``."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", halfway(method))
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh(method))
        restored = checkpointer.restore(tmp_path / "run", abstract)
    check_continues(method, restored)


def test_msgpack(method):
    """flax' msgpack, restored into a fresh ``init``."""
    saved = flax.serialization.to_bytes(halfway(method))
    restored = flax.serialization.from_bytes(fresh(method), saved)
    check_continues(method, jax.tree.map(jnp.asarray, restored))


def test_state_to_dict(method):
    """`optgrad.state_to_dict` through one of NumPy's files."""
    file, half = io.BytesIO(), halfway(method)
    np.savez(file, **optgrad.state_to_dict(half["state"]))
    file.seek(0)
    with np.load(file) as saved:
        state = optgrad.state_from_dict(fresh(method)["state"], saved)
    check_continues(method, {"params": half["params"], "state": state})

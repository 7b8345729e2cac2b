"""One compilation, donated buffers, and a step that costs its memory traffic and no more."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import optgrad
from optgrad.experiments.bench import programs, trees

from . import problem

LEAF_SIZE = 20_000
# The step of the coordinates is stored while it is projected on the subspace.
# The natural gradient has no state, and two leaves of 40 at a time: the mean and the direction.
TEMPORARY_VECTORS = {"ogr_diagonal_subspace": 1.02, "natural_gradient": 0.05}
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
        return programs.nbytes(params), programs.nbytes(jax.eval_shape(optimizer.init, params))

    def vectors(params_bytes):
        """Bytes of the state's vectors, for float32 parameters."""
        return params_bytes * method.state_vectors(params_bytes // 4)

    widths = (5, 15) if method.is_dense else (100, 300)
    (small, small_state), (large, large_state) = map(sizes, widths)
    assert large_state - small_state == pytest.approx(vectors(large) - vectors(small))
    assert 0 <= small_state - vectors(small) <= SMALL_STATE


def step_program(method, leaves, size, rounding=None):
    """A donated step on so many leaves; extra trees are built outside of it."""
    params = trees.parameters(trees.equal_leaves(leaves, size))
    program = programs.StepProgram(method, params, problem.hyperparams(method), rounding)
    if "kfac_stats" in method.needs - program.extras.keys():
        program.extras["kfac_stats"] = {}  # no layers: every parameter is left to the fallback
    return program


@functools.cache
def adam_seconds(leaves, size):
    """How long Adam's step takes to compile, the second time."""
    program = step_program(optgrad.get_method("adam"), leaves, size)
    programs.compiled_with_counts(program, saving_memory=True)
    return programs.compiled_with_counts(program, saving_memory=True)[1].seconds


def efficiency(method, leaves=40, rounding=None):
    """What XLA makes of a step on many leaves, with a state rounded to 16 bits if so."""
    leaves = 10 if is_given_functions(method) else leaves  # line searches compile for too long
    leaves, size = (4, 20) if method.is_dense else (leaves, LEAF_SIZE)
    program = step_program(method, leaves, size, rounding)
    counts = programs.compiled_with_counts(program, saving_memory=True)[1]
    row = {"method": method.name, "leaves": leaves, **counts._asdict()}
    seconds = row.pop("seconds")
    ratio = seconds / adam_seconds(leaves, size)
    return row | {"compile_s": round(seconds, 2), "compile_ratio": round(ratio, 1)}


def is_given_functions(method):
    return any(map(problem.is_function, method.needs))


def test_efficiency(method, record_property):
    """No copies, no temporaries, all memory reused; recorded and not required of baselines.

    A copy of few numbers (of a scalar, of a matrix over a few directions) counts as none,
    and temporaries are measured against parameters and state. A dense method factorises matrices
    over all parameters, which takes copies and workspace of their size: only the reuse of its
    memory is required. How long it takes to compile is recorded, beside Adam's.
    """
    row = efficiency(method)
    record_property("efficiency", row)
    if method.family == "baselines" or is_given_functions(method):
        return
    if not method.is_dense:
        assert row["copies"] == 0
        allowed = TEMPORARY_VECTORS.get(method.name, 0) * row["param_bytes"]
        # Of one leaf, and scalars.
        one = 1.2 / row["leaves"] * (row["param_bytes"] + row["state_bytes"])
        assert row["temp_bytes"] < allowed + one
    # All that grows with the parameters; what is small and only written has no buffer to reuse.
    assert row["alias_bytes"] >= row["param_bytes"] + row["state_bytes"] - 1024


# Within their loops XLA computes the loss, a sum over all leaves, again for every leaf
# (24 leaves add 1.16 times what twice 12 would, with fast_natural_newton).
GROWS_FASTER = {
    *("nonlinear_cg", "truncated_newton", "hessian_free", "gauss_newton", "levenberg_marquardt"),
    *("runge_kutta", "implicit_euler", "lanczos_saddle_free", "krylov_subspace_descent"),
    "fast_natural_newton",
}


@pytest.mark.methods_where(
    predicate=lambda method: (
        method.family != "baselines" and not method.is_dense and method.name not in GROWS_FASTER
    )
)
def test_program_size(method):
    """Twice the leaves are at most twice the instructions, however many leaves there are.

    Where scalars that come from all leaves are computed again with each of them, the number of
    instructions grows with the square of the number of leaves.
    """
    few, more, many = (instructions(method, leaves) for leaves in (6, 12, 24))
    assert many - more <= 1.05 * 2 * (more - few)


def instructions(method, leaves):
    """Of the optimized program; LLVM, which does not change their number, is told not to try."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    lowered = step_program(method, leaves, 16).lower()
    return programs.instructions(lowered.compile(compiler_options=options).as_text())

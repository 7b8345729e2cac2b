"""Eight devices, simulated: the same numbers, the parameters' sharding, and no needless traffic."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optgrad
from optgrad.core import linalg

from . import problem

DEVICES = 8
STEPS = 2
SMALL = 4096  # bytes of what a step may send at a time, here
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# How many all-reduces the program of a step has, where it is not one (`sums`), nor none for what
# is elementwise. A loop's are counted once. One sum needs another's result, or it would be in the
# same all-reduce.
SEVERAL = {
    # The gradient along the basis; its residual, along the basis again and its norm; and when the
    # basis is made orthonormal, every 20th step, the inner products of its rows.
    "ogr_subspace": 3,
    "ogr_diagonal_subspace": 3,
    # The inner products of the gradients; the norm of what they leave of the update.
    "natural_gradient": 2,
    # With functions of the parameters, each loss is a sum over them, where they are divided.
    "lossgrad": 2,  # the gradient's norm; the loss where the step leads
    "runge_kutta": 1,  # whether the update is finite
    "vsgd_fd": 0,
    "truncated_newton": 9,  # conjugate gradients: ⟨p, p⟩, ⟨p, Hp⟩; ⟨r, r⟩ …; and the trial
    "hessian_free": 8,
    "gauss_newton": 8,
    "levenberg_marquardt": 9,
    "implicit_euler": 13,  # conjugate gradients and a line search within Newton's method
    "lanczos_saddle_free": 16,  # Lanczos: two passes of Gram–Schmidt for each direction
    "krylov_subspace_descent": 14,
    "fast_natural_newton": 12,
    "nonlinear_cg": 9,  # a line search
    "lbfgs": 7,
}


@pytest.fixture(scope="module")
def devices():
    found = jax.devices("cpu")
    assert len(found) >= DEVICES, "tests/conftest.py sets XLA_FLAGS before jax starts"
    return np.array(found[:DEVICES])


@pytest.fixture(scope="module")
def mesh(devices):
    return Mesh(devices, ("data",))


@pytest.fixture(scope="module")
def explicit_mesh(devices):
    return Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))


# The problem has three curvatures: more vectors than these would follow the roundings alone.
OPTIONS = {"lanczos_saddle_free": {"k": 3}, "fast_natural_newton": {"k": 3}}

# Where optax flattens leaves for its inner products, which gathers one that is not divided along
# its first axis; and which jax refuses on an explicit mesh.
INNER_PRODUCTS = {"prodigy", "dadapt_adamw", "momo", "momo_adam"}
OPTAX = {"lbfgs", "nonlinear_cg", *INNER_PRODUCTS}
_OPTAX = "jax refuses optax's inner products of what is divided on an explicit mesh"
NOT_EXPLICIT = {
    **dict.fromkeys(INNER_PRODUCTS, _OPTAX),
    "lbfgs": _OPTAX,
    "nonlinear_cg": _OPTAX,
    "bfgs": _OPTAX,
    "diagonal_gauss_newton": "outputs (here the parameters) may not be divided within a row",
}


def create(method):
    return problem.create(method, **OPTIONS.get(method.name, {}))


def use(mesh):
    """The mesh as that of the program, for a with statement."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def initial_params(method):
    """Divided along their first and their second axis, and what cannot be divided by eight."""
    params = {
        "s": jnp.float32(0.3),
        "v": jnp.linspace(0.4, -0.6, 2 * DEVICES, dtype=jnp.float32).reshape(2, -1),
    }
    if method.is_dense:  # of few parameters
        return params
    return params | {
        "b": jnp.linspace(-1.0, 1.5, DEVICES, dtype=jnp.float32),
        "w": jnp.linspace(1.2, -0.8, 2 * DEVICES * 3, dtype=jnp.float32).reshape(-1, 3),
    }


def spec_of(x):
    """Split along the first axis that the devices divide; whole if there is none."""
    axes = [i for i, n in enumerate(x.shape) if n and n % DEVICES == 0][:1]
    return PartitionSpec(*["data" if i in axes else None for i in range(x.ndim)])


def shard(tree, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), tree)


def assert_sharded_like(tree, params, stacks=True):
    """Arrays of a parameter's shape, and stacks of them, have that parameter's sharding."""
    shapes = {p.shape: p.sharding for p in jax.tree.leaves(params) if p.ndim}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path)
        if x.shape in shapes:
            expected = shapes[x.shape]
        elif x.shape[1:] in shapes and stacks:
            like = shapes[x.shape[1:]]
            expected = NamedSharding(like.mesh, PartitionSpec(None, *like.spec))
        else:
            continue
        assert x.sharding.is_equivalent_to(expected, x.ndim), (where, x.sharding)


@functools.cache
def reference(name):
    """A run on one device: what it was given at each step, and where it ended."""
    method = optgrad.get_method(name)
    params = initial_params(method)
    single = problem.quadratic(params, steps=STEPS)
    step = jax.jit(make_step(method, single))
    state = create(method).init(params)
    given = []
    for t in range(STEPS):
        batch = jax.device_get(single.batch(t))
        arrays = problem.arrays(method, single.loss_fn, jax.device_get(params), batch)
        given.append(jax.device_get((arrays, batch)))
        params, state, updates = step(params, state, arrays, batch)
    return given, jax.device_get((params, state, updates))


def make_step(method, single):
    optimizer = create(method)

    def step(params, state, arrays, batch):
        grad, extras = arrays
        functions = problem.functions(method, single.loss_fn, params, batch)
        updates, state = optimizer.update(grad, state, params, **extras, **functions)
        return optax.apply_updates(params, updates), state, updates

    return step


def run_under_jit(method, mesh):
    """The same run with everything divided, its first state, and the program's text."""
    params = shard(initial_params(method), mesh)
    single = problem.quadratic(initial_params(method), steps=STEPS)
    state = create(method).init(params)
    stacks = method.name not in OPTAX
    assert_sharded_like(state, params, stacks)
    compiled = None
    for given in reference(method.name)[0]:
        arguments = (params, state, *shard(given, mesh))
        if compiled is None:
            donated = () if method.name == "lbfgs" else (0, 1)  # it has one buffer twice
            step = jax.jit(make_step(method, single), donate_argnums=donated)
            compiled = step.lower(*arguments).compile()
        params, state, updates = compiled(*arguments)
    actual = (params, state, updates)
    problem.assert_close(jax.device_get(actual), reference(method.name)[1], rtol=1e-4, atol=1e-5)
    for tree in actual:
        assert_sharded_like(tree, shard(initial_params(method), mesh), stacks)
    return compiled.as_text()


def collectives(hlo):
    """Each collective operation of a program, and how many bytes it sends."""
    found = []
    for line in hlo.splitlines():
        operation = re.match(
            rf"\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line
        )
        if operation:
            shapes = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", operation[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in shapes]
            bits = [int(width or 8) for width, _ in shapes]  # pred has no width
            found.append((operation[2], sum(n * b for n, b in zip(sizes, bits, strict=True)) // 8))
    return found


def sums(method):
    """How many all-reduces a step of the method may have."""
    return SEVERAL.get(method.name, 0 if problem.is_elementwise(method.name) else 1)


def assert_small_sums_only(method, hlo):
    """What is elementwise sends nothing; everything else a few small sums, and no array.

    A dense method factorises a matrix over all parameters, for which it gathers them.
    """
    if method.is_dense or method.name in OPTAX:
        return
    found = collectives(hlo)
    assert {name for name, _ in found} <= {"all-reduce"}
    assert len(found) <= sums(method), found
    assert all(size <= SMALL for _, size in found)


def test_sharded_parameters(method, mesh):
    """The numbers of one device, state and updates where the parameters are, and a few small
    all-reduces for what is not elementwise."""
    assert_small_sums_only(method, run_under_jit(method, mesh))


def test_explicit_mesh(method, explicit_mesh):
    """The same where shardings are parts of the types."""
    if method.name in NOT_EXPLICIT:
        pytest.skip(NOT_EXPLICIT[method.name])
    with use(explicit_mesh):
        assert_small_sums_only(method, run_under_jit(method, explicit_mesh))


# --- shard_map -------------------------------------------------------------------------------

# Refused by `across_devices`, beside what is dense: line searches of optax, reductions of optax,
# and a random vector over all outputs, which are the divided parameters here.
REFUSED = {"nonlinear_cg", "lbfgs", "polyak_sgd", "diagonal_gauss_newton"}
REFUSED |= {"dog", "dowg", *INNER_PRODUCTS}


def is_served(method):
    return not (method.is_dense or method.name in REFUSED)


def divided_loss(params, example):
    """`problem.quadratic_loss` on every device, of shards."""
    total = 0.0 * example["number"]
    for i, (p, target) in enumerate(
        zip(jax.tree.leaves(params), jax.tree.leaves(example["target"]), strict=True)
    ):
        part = (0.25 + 0.25 * (i % 3)) * jnp.sum(jnp.square(p - target))
        total += jax.lax.psum(part, "data") if p.ndim else part
    return total


def specs_of(tree):
    """Of arrays that have been placed; a scalar that was not is whole."""
    return jax.tree.map(lambda x: getattr(x.sharding, "spec", PartitionSpec()), tree)


def run_under_shard_map(method, mesh, given):
    """The run with `across_devices`, and the program's text."""
    optimizer = optgrad.across_devices(create(method), "data")

    def step(params, state, arrays, batch):
        grad, extras = arrays
        functions = problem.functions(method, divided_loss, params, batch)
        updates, state = optimizer.update(grad, state, params, **extras, **functions)
        return optax.apply_updates(params, updates), state, updates

    params = shard(initial_params(method), mesh)
    state = optimizer.init(params)
    theta_spec, state_spec = specs_of(params), specs_of(state)
    given_spec = jax.tree.map(spec_of, given[0])
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(theta_spec, state_spec, *given_spec),
        out_specs=(theta_spec, state_spec, theta_spec),
    )
    compiled = None
    for one in given:
        arguments = (params, state, *shard(one, mesh))
        compiled = compiled or jax.jit(mapped).lower(*arguments).compile()
        params, state, updates = compiled(*arguments)
    return (params, state, updates), compiled.as_text()


def unit_without_randomness(key, like):
    """The same direction however the parameters are divided."""
    del key
    return linalg.unit(jax.tree.map(lambda x: x + 1.0, linalg.zeros_like(like)))[0]


def test_shard_map(method, mesh, monkeypatch):
    """The numbers of one device from programs of shards, or a refusal that says why not.

    Random directions are others for each division: they are replaced.
    """
    if not is_served(method):
        with pytest.raises(ValueError, match="accepted by across_devices"):
            trace_under_shard_map(method, mesh)
        return
    monkeypatch.setattr(linalg, "random_unit", unit_without_randomness)
    given, expected = reference.__wrapped__(method.name)
    actual, hlo = run_under_shard_map(method, mesh, given)
    problem.assert_close(jax.device_get(actual), expected, rtol=1e-4, atol=1e-5)
    assert_small_sums_only(method, hlo)


def trace_under_shard_map(method, mesh):
    """The first step, with the state made within it."""
    optimizer = optgrad.across_devices(create(method), "data")
    single = problem.quadratic(initial_params(method), steps=1)
    batch = jax.device_get(single.batch(0))
    arrays = problem.arrays(method, single.loss_fn, initial_params(method), batch)

    def step(params, arrays, batch):
        grad, extras = arrays
        functions = problem.functions(method, divided_loss, params, batch)
        return optimizer.update(grad, optimizer.init(params), params, **extras, **functions)[0]

    specs = jax.tree.map(spec_of, (initial_params(method), arrays, batch))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[0])
    jax.eval_shape(mapped, initial_params(method), arrays, batch)

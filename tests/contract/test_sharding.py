"""Eight devices, simulated: the same numbers, the parameters' sharding, and no needless traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import problem

DEVICES = 8
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cpu")
    assert len(devices) >= DEVICES, "tests/conftest.py sets XLA_FLAGS before jax starts"
    return Mesh(np.array(devices[:DEVICES]), ("data",))


def shard(tree, mesh):
    """Every array, split along its first axis that the devices divide; the rest replicated."""

    def put(x):
        axes = [i for i, n in enumerate(x.shape) if n and n % DEVICES == 0][:1]
        spec = PartitionSpec(*["data" if i in axes else None for i in range(x.ndim)])
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def assert_sharded_like(tree, params):
    """Arrays of a parameter's shape have that parameter's sharding."""
    shardings = {p.shape: p.sharding for p in jax.tree.leaves(params)}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if x.shape in shardings:
            expected = shardings[x.shape]
            where = jax.tree_util.keystr(path)
            assert x.sharding.is_equivalent_to(expected, x.ndim), (where, x.sharding)


def test_sharded_parameters(method, mesh):
    """The numbers of one device, state and updates where the parameters are, no collective in
    what is elementwise."""
    params = {
        "b": jnp.linspace(-1.0, 1.5, DEVICES, dtype=jnp.float32),
        "w": jnp.linspace(1.2, -0.8, 2 * DEVICES * 3, dtype=jnp.float32).reshape(-1, 3),
    }
    single = problem.quadratic(params, steps=2)
    optimizer = problem.create(method)

    def step(params, state, arrays, batch):
        grad, extras = arrays
        functions = problem.functions(method, single.loss_fn, params, batch)
        updates, state = optimizer.update(grad, state, params, **extras, **functions)
        return optax.apply_updates(params, updates), state, updates

    def run(place):
        theta = place(params)
        state = initial = optimizer.init(theta)
        compiled = None
        for t in range(2):
            batch = jax.device_get(single.batch(t))
            arrays = problem.arrays(method, single.loss_fn, jax.device_get(theta), batch)
            arguments = (theta, state, place(arrays), batch)
            compiled = compiled or jax.jit(step).lower(*arguments).compile()
            theta, state, updates = compiled(*arguments)
        return (theta, state, updates), initial, compiled.as_text()

    expected, _, _ = run(lambda tree: jax.tree.map(jnp.asarray, tree))
    actual, initial, hlo = run(lambda tree: shard(tree, mesh))
    problem.assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-4)
    placed = shard(params, mesh)
    for tree in (initial, *actual):
        assert_sharded_like(tree, placed)
    if problem.is_elementwise(method.name):
        found = [name for name in COLLECTIVES if f" {name}" in hlo]
        assert not found

"""`guard`: what is left out, what is counted, the way back, and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import problem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optgrad

PARAMS = {"a": jnp.array([1.0, -2.0, 0.5], jnp.float32), "b": jnp.ones((2, 2), jnp.float32)}


def gradient(value=0.5, **entries):
    tree = jax.tree.map(lambda x: np.full(x.shape, value, np.float32), PARAMS)
    for key, entry in entries.items():
        tree[key].flat[0] = entry
    return jax.tree.map(jnp.asarray, tree)


def run(optimizer, gradients, params=PARAMS, **extra):
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def bad(number=np.nan):
    return gradient(b=number)


# What is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_the_trajectory_is_that_without_the_bad_steps(number):
    optimizer = optgrad.guard(optax.adam(0.1))
    good = [gradient(x) for x in (0.5, -0.2, 0.3)]
    expected, clean = run(optimizer, good)
    actual, state = run(optimizer, [bad(number), *good[:2], bad(number), bad(number), good[2]])
    problem.assert_identical((actual, state.inner), (expected, clean.inner))
    assert (int(state.accepted), int(state.rejected), int(state.consecutive)) == (3, 3, 0)


def test_what_optax_lets_through():
    """`apply_if_finite` looks at the gradient alone, and gives up after some."""
    theirs = optax.apply_if_finite(optax.polyak_sgd(), 2)
    ours = optgrad.guard(optax.polyak_sgd(), max_consecutive=2)
    assert np.isnan(np.asarray(run(theirs, [gradient()], value=np.nan)[0]["a"])).all()
    problem.assert_identical(run(ours, [gradient()], value=np.nan)[0], PARAMS)
    assert np.isnan(np.asarray(run(theirs, [bad()] * 3, value=1.0)[0]["b"])).any()
    problem.assert_identical(run(ours, [bad()] * 3, value=1.0)[0], PARAMS)


def test_a_state_that_overflows():
    """The square of 1e30 has no float32: Adam's step would be 0 in that coordinate for ever."""
    optimizer = optgrad.guard(optax.adam(0.1))
    huge = gradient(b=1e30)
    unguarded = run(optax.adam(0.1), [huge])[1]
    assert np.isinf(np.asarray(unguarded[0].nu["b"])).any()
    params, state = run(optimizer, [huge])
    problem.assert_identical((params, state.inner), (PARAMS, optax.adam(0.1).init(PARAMS)))
    fast = optgrad.guard(optax.adam(0.1), check_results=False)
    assert int(run(fast, [huge])[1].rejected) == 0
    assert int(run(fast, [bad()])[1].rejected) == 1


def test_an_update_that_is_not_finite():
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g / (1.0 - state), updates), state + 1.0

    inner = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    params, state = run(optgrad.guard(inner), [gradient()] * 4)
    assert float(state.inner) == 1.0  # the step that divided by 0 is not counted by its counter
    assert int(state.rejected) == 3
    problem.assert_finite(params)


def test_infinite_state_may_stay():
    """A best loss so far begins at infinity."""

    def update(updates, state, params=None, *, value, **extra):
        best, _ = state
        return updates, (jnp.minimum(best, value), jnp.asarray(jnp.inf))

    inner = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.asarray(jnp.inf), jnp.asarray(jnp.inf)), update
    )
    _, state = run(optgrad.guard(inner), [gradient()], value=jnp.float32(2.0))
    assert float(state.inner[0]) == 2.0
    assert int(state.rejected) == 0


@pytest.mark.parametrize("value", [np.nan, float("nan"), jnp.float32(jnp.inf)])
def test_extra_arguments(value):
    """Also those that the method does not take, and plain numbers."""
    params, state = run(optgrad.guard(optax.sgd(0.1)), [gradient()], value=value)
    problem.assert_identical(params, PARAMS)
    assert int(state.rejected) == 1


def test_functions_and_other_objects_are_handed_on():
    optimizer = optgrad.guard(optax.sgd(0.1))
    _, state = run(optimizer, [gradient()], value_fn=lambda p: 0.0, note="text", count=3)
    assert int(state.accepted) == 1


def test_odd_trees():
    for tree in problem.odd_trees().values():
        optimizer = optgrad.guard(optax.adam(0.1))
        updates, state = optimizer.update(tree, optimizer.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert int(state.accepted) == 1


def test_complex_gradients():
    params = jnp.array([1.0 + 2.0j])
    optimizer = optgrad.guard(optax.sgd(0.1))
    _, state = run(optimizer, [jnp.array([complex(1.0, np.nan)])], params)
    assert int(state.rejected) == 1


# The flag and the host ------------------------------------------------------------------------


def test_the_flag_stays():
    optimizer = optgrad.guard(optax.sgd(0.1), max_consecutive=2)
    _, state = run(optimizer, [bad(), gradient(), bad()])
    assert optgrad.check_guard(state) == 2
    _, state = run(optimizer, [bad(), bad(), gradient()])
    assert int(state.consecutive) == 0
    with pytest.raises(optgrad.NonFiniteStepsError, match="2 of 3 steps were left out, the last 0"):
        optgrad.check_guard(state)


def test_the_host_finds_the_run():
    optimizer = optgrad.guard(optax.sgd(0.1), max_consecutive=2)
    gradients = jnp.ones((4, 3, 2)).at[2, :2].set(jnp.nan)  # runs, steps, entries

    def one(stream):
        state = optimizer.init(jnp.zeros(2))
        return jax.lax.scan(lambda s, g: (optimizer.update(g, s)[1], None), state, stream)[0]

    state = jax.jit(jax.vmap(one))(gradients)
    np.testing.assert_array_equal(state.rejected, [0, 0, 2, 0])
    with pytest.raises(FloatingPointError, match="in run 2 of 4, the first of 1 that fail; 2 of 3"):
        optgrad.check_guard((state, "anything else"))


def test_no_guard_in_a_state():
    with pytest.raises(ValueError, match="state has no guard in it"):
        optgrad.check_guard(optax.adam(0.1).init(PARAMS))


def test_diagnostics():
    optimizer = optgrad.guard(optgrad.adaptive_sgd())
    found = optgrad.diagnostics(run(optimizer, [gradient(), bad()])[1])
    assert int(found["rejected_steps"]) == int(found["consecutive_rejected_steps"]) == 1
    assert "step_size_geomean" in found


# The way back ---------------------------------------------------------------------------------


def test_rollback():
    """Parameters at which every gradient is NaN are left by the way back, with all averages."""
    optimizer = optgrad.guard(
        optax.sgd(1.0, momentum=0.9), rollback_after=2, snapshot_every=3, max_consecutive=5
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    seen = []
    for t in range(7):
        g = bad() if t in (4, 5) else gradient(0.1)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state.inner))
    # Snapshots: before the steps 0 and 3. After the steps 4 and 5 back to before step 3.
    problem.assert_close(seen[5], seen[2])
    problem.assert_close(seen[6], seen[3])
    assert int(state.rejected) == 2
    assert not bool(state.failed)


def test_rollback_again_and_again():
    optimizer = optgrad.guard(optax.sgd(1.0), rollback_after=1, max_consecutive=3)
    params, state = run(optimizer, [gradient(), bad(), bad(), bad()])
    problem.assert_close(params, PARAMS)
    assert bool(state.failed)


def test_rollback_needs_parameters():
    optimizer = optgrad.guard(optax.sgd(1.0), rollback_after=1)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(gradient(), optimizer.init(PARAMS))


# Under transformations ------------------------------------------------------------------------


def test_under_accumulation():
    """Within a period one micro-batch spoils all: the period is left out, and the next is whole."""
    optimizer = optgrad.MultiSteps(optgrad.guard(optax.sgd(1.0)), 2)
    stream = [gradient(), bad(), gradient(), gradient()]
    params, state = run(optimizer, stream)
    problem.assert_close(params, jax.tree.map(lambda x: x - 0.5, PARAMS))
    assert int(state.inner_opt_state.rejected) == 1


def test_types_are_fixed_and_buffers_donated():
    optimizer = optgrad.guard(optgrad.adaptive_sgd(), rollback_after=3)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = optimizer.init(params)
    avals = problem.avals(state)
    step = jax.jit(optimizer.update, donate_argnums=1)
    for g in (gradient(), bad(), gradient()):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), g)
        updates, state = step(narrow, state, params)
    assert problem.avals(state) == avals
    assert step._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("check_results", [False, True])
def test_in_place(check_results):
    """Without a look at the results nothing of a leaf's size is held in memory."""
    optimizer = optgrad.guard(optax.adam(0.1), check_results=check_results)
    params = {str(i): jnp.ones(100_000) for i in range(10)}

    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert temporary <= (1.5 * whole if check_results else 0.01 * whole)


@pytest.mark.parametrize("where", [0, 3])
def test_all_devices_decide_alike(where):
    """The one that has the NaN in its part, and the others."""
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    params = {"w": jnp.linspace(-1.0, 1.0, 8), "s": jnp.float32(0.5)}
    g = {"w": jnp.ones(8).at[2 * where].set(jnp.nan), "s": jnp.float32(1.0)}
    divided = {"w": NamedSharding(mesh, P("data")), "s": NamedSharding(mesh, P())}
    optimizer = optgrad.guard(optax.adam(0.1))

    @jax.jit
    def twice(g, params):
        state = optimizer.init(params)
        _, state = optimizer.update(g, state, params)
        return optimizer.update(params, state, params)

    updates, state = twice(jax.device_put(g, divided), jax.device_put(params, divided))
    problem.assert_close(updates, twice(g, params)[0])
    assert int(state.rejected) == 1


@pytest.mark.parametrize("where", [0, 3])
def test_within_shard_map(where):
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    specs = {"w": P("data"), "s": P()}
    params = {"w": jnp.linspace(-1.0, 1.0, 8), "s": jnp.float32(0.5)}
    g = {"w": jnp.ones(8).at[2 * where].set(jnp.nan), "s": jnp.float32(1.0)}
    optimizer = optgrad.across_devices(optgrad.guard(optax.adam(0.1)), "data")

    def twice(g, params):
        state = optimizer.init(params)
        first, state = optimizer.update(g, state, params)
        second, state = optimizer.update(params, state, params)
        return first, second, state.rejected

    mapped = jax.shard_map(twice, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, specs, P()))
    first, second, rejected = jax.jit(mapped)(g, params)
    assert int(rejected) == 1
    problem.assert_identical(first, jax.tree.map(jnp.zeros_like, params))
    problem.assert_close(second, optax.adam(0.1).update(params, optax.adam(0.1).init(params))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_consecutive": 0}, "max_consecutive = 0 is not accepted; accepted: an integer ≥ 1"),
        ({"rollback_after": 1.5}, "rollback_after = 1.5 is not an integer"),
        ({"snapshot_every": 0}, "snapshot_every = 0 is not accepted"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optgrad.guard(optax.sgd(0.1), **arguments)

"""States by name: what does not fit is refused, and layouts change on purpose only."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import problem, records

import optgrad
from optgrad.core import saved_state

PARAMS = {"w": jnp.arange(3.0), "b": jnp.array(0.5)}
RECORD = Path(__file__).with_name("state_layouts.json")
OWN = [m.name for m in optgrad.methods() if m.family != "baselines"]


def saved_after_one_step(optimizer, params=PARAMS):
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    return state, optgrad.state_to_dict(state)


def test_state_comes_back():
    """In a chain, with injected hyperparameters, under wrappers, with a random key."""
    method = optgrad.inject("adam_star", learning_rate=0.1)
    optimizer = optgrad.guard(optgrad.low_precision_state(method, rounding="stochastic"))
    state, saved = saved_after_one_step(optimizer)
    assert all(isinstance(x, np.ndarray) for x in saved.values())
    restored = optgrad.state_from_dict(optimizer.init(PARAMS), saved)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype
        bits = (jax.random.key_data(x) if saved_state._is_key(x) else x for x in (one, other))
        np.testing.assert_array_equal(*bits)


def test_placement_comes_back():
    """A state that is divided among devices comes back divided."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    optimizer, params = optgrad.m_ssd(0.1), jax.device_put(jnp.arange(4.0), place)
    state, saved = saved_after_one_step(optimizer, params)
    restored = optgrad.state_from_dict(state, saved)
    assert restored[0].momentum.sharding == place


def test_bfloat16_in_a_file_of_numpy(tmp_path):
    """Which forgets the type's name."""
    optimizer = optgrad.m_ssd(0.1, state_dtype="bfloat16")
    state, saved = saved_after_one_step(optimizer)
    np.savez(tmp_path / "state.npz", **saved)
    with np.load(tmp_path / "state.npz") as file:
        restored = optgrad.state_from_dict(optimizer.init(PARAMS), file)
    problem.assert_identical(restored, state)
    assert "[0].momentum['w']:bfloat16" in saved
    # As many bits, and another meaning.
    other = optgrad.m_ssd(0.1, state_dtype="float16")
    assert "lacks [0].momentum['b'], [0].momentum['w'] and has" in refused(other, saved)


def refused(optimizer, saved):
    with pytest.raises(optgrad.SavedStateError) as error:
        optgrad.state_from_dict(optimizer.init(PARAMS), saved)
    return str(error.value)


def test_what_does_not_fit_is_refused():
    """Another layout, method, shape or type; nothing is converted."""
    optimizer = optgrad.m_ssd(0.1)
    _, saved = saved_after_one_step(optimizer)
    name = "[0].momentum['w']"
    assert "optgrad.layout" in refused(optimizer, {name: saved[name]})
    assert "layout 0" in refused(optimizer, saved | {"optgrad.layout": np.int32(0)})
    assert "layout 99" in refused(optimizer, saved | {"optgrad.layout": np.int32(99)})
    assert "lacks nothing and has extra" in refused(optimizer, saved | {"extra": np.zeros(1)})
    assert "lacks [0]" in refused(optgrad.m_svag(0.1), saved)
    assert "float32[2]" in refused(optimizer, saved | {name: saved[name][:2]})
    assert "float64[3]" in refused(optimizer, saved | {name: saved[name].astype(np.float64)})
    assert "int32[3]" in refused(optimizer, saved | {name: saved[name].view(np.int32)})


def test_older_layouts_are_migrated(monkeypatch):
    """Step by step, where there is a way."""
    optimizer = optgrad.m_ssd(0.1)
    state, saved = saved_after_one_step(optimizer)
    older = {key.replace("momentum", "velocity"): value for key, value in saved.items()}
    older["optgrad.layout"] = np.int32(saved_state.LAYOUT)
    monkeypatch.setitem(
        saved_state.MIGRATIONS,
        saved_state.LAYOUT,
        lambda arrays: {key.replace("velocity", "momentum"): x for key, x in arrays.items()},
    )
    monkeypatch.setattr(saved_state, "LAYOUT", saved_state.LAYOUT + 1)
    problem.assert_identical(optgrad.state_from_dict(optimizer.init(PARAMS), older), state)


# --- the record ----------------------------------------------------------------------------------


def layout_of(method):
    """Name, type and shape of every array of a state, and its size after a few steps."""
    state = problem.standard_run(method).state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): [*described(x)] for path, x in leaves}


def described(x):
    size = np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))) if x.size else 0.0
    return str(x.dtype), list(x.shape), float(f"{size:.6g}")


@pytest.mark.parametrize("name", OWN)
def test_layouts_change_on_purpose(name, request):
    """Whoever changes what is in a state increases `saved_state.LAYOUT`, then records it.

    By ``pytest tests/core/test_saved_state.py -m "slow or not slow" --record-golden -n 0``.
    """
    record = records.read(RECORD)
    found, recorded = layout_of(optgrad.get_method(name)), record.get(name)
    if request.config.getoption("--record-golden"):
        is_new = recorded is None or same_layout(found, recorded["arrays"])
        assert is_new or recorded["layout"] < saved_state.LAYOUT, "increase LAYOUT first"
        record[name] = {"layout": saved_state.LAYOUT, "arrays": found}
        records.write(RECORD, record)
        return
    assert recorded is not None, f"record it first: {test_layouts_change_on_purpose.__doc__}"
    assert same_layout(found, recorded["arrays"]), test_layouts_change_on_purpose.__doc__


def same_layout(one, other):
    """Sizes tell meanings apart: an average from a sum, a variance from a second moment."""
    return one.keys() == other.keys() and all(
        one[key][:2] == other[key][:2]
        and np.allclose(one[key][2], other[key][2], 2e-3, 1e-6, equal_nan=True)
        for key in one
    )

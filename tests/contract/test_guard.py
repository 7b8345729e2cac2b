"""Every method under `optgrad.guard`: a step that is not finite leaves no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import problem

BAD = {1: np.nan, 2: np.inf, 4: -np.inf}  # before these steps of the run another one comes


def guarded_run(method, spoilt=None):
    """Four steps, and before some of them one whose batch, gradient or loss is not finite."""
    single = problem.standard()
    optimizer = optgrad.guard(problem.create(method))
    update = guarded_update(method.name)
    params, state = single.params, optimizer.init(single.params)
    for t in range(problem.STEPS):
        grad, extras = problem.arrays(method, single.loss_fn, params, single.batch(t))
        given = [(grad, extras)]
        if spoilt is not None and t + 1 in BAD:
            given.insert(0, spoil(spoilt, grad, extras, BAD[t + 1]))
        for gradient, arrays in given:
            updates, state = update(gradient, state, params, arrays, single.batch(t))
            params = optax.apply_updates(params, updates)
    return params, state


@functools.lru_cache(maxsize=1)
def guarded_update(method_name):
    """Compiled once for all runs of a method."""
    method = optgrad.get_method(method_name)
    return jax.jit(problem.make_update(method, optgrad.guard(problem.create(method))))


def spoil(what, grad, extras, number):
    """One entry of the gradient, or of the last array among the extra arguments."""
    if what == "gradient":
        return {**grad, "w": grad["w"].at[1, 2].set(number)}, extras
    leaves, structure = jax.tree.flatten(extras)
    leaves[-1] = jnp.ravel(leaves[-1]).at[0].set(number).reshape(leaves[-1].shape)
    return grad, jax.tree.unflatten(structure, leaves)


def has_arrays(method):
    """Whether its extra arguments hold any: functions do not, nor statistics of no layers."""
    single = problem.standard()
    extras = problem.arrays(method, single.loss_fn, single.params, single.batch(0))[1]
    return bool(jax.tree.leaves(extras))


@pytest.mark.parametrize("spoilt", ["gradient", "extra_argument"])
def test_guard(method, spoilt):
    """The trajectory and the state are bit by bit those without the steps that are not finite."""
    params, state = guarded_run(method)
    assert int(state.rejected) == 0
    assert int(state.accepted) == problem.STEPS
    problem.assert_close((params, state.inner), problem.standard_run(method)[:2])
    if spoilt == "extra_argument" and not has_arrays(method):
        return  # this method is handed functions alone, whose results show in the step
    spoilt_params, spoilt_state = guarded_run(method, spoilt)
    problem.assert_identical((spoilt_params, spoilt_state.inner), (params, state.inner))
    assert int(spoilt_state.rejected) == len(BAD)
    assert not bool(spoilt_state.failed)

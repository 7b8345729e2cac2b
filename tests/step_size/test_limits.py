"""What a review found at the limits of the rules that use the loss."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad


@pytest.mark.parametrize("name", ["l4_momentum", "l4_adam"])
def test_lowest_loss_that_is_never_forgotten(name):
    """A forgetting time of ∞ keeps it as it is; one that reaches 0 makes no NaN of a loss of 0."""
    params = jnp.ones(2)
    optimizer = optgrad.create(name, forget_time=math.inf)
    state = optimizer.init(params)
    for value in (2.0, 3.0):
        _, state = optimizer.update(params, state, params, value=value)
    assert float(state.min_loss) == 1.5
    optimizer = optgrad.create(name, forget_time=lambda count: 0.0 * count)
    state = optimizer.init(params)
    for value in (0.0, 0.0, 1.0):
        updates, state = optimizer.update(params, state, params, value=value)
        assert np.isfinite(updates).all()


@pytest.mark.parametrize("evaluation", ["value_fn", "next_value"])
def test_warm_up_of_lossgrad_from_zero(evaluation):
    """A step size and a cap of 0 take no step, and leave the factor alone."""
    ramp = optax.linear_schedule(0.0, 0.1, 3)
    optimizer = optgrad.lossgrad(ramp, max_step_size=ramp, evaluation=evaluation)
    params = jnp.ones(2)
    state = optimizer.init(params)
    for _ in range(20):
        updates, state = optimizer.update(
            params, state, params, value=0.5 * params @ params, value_fn=lambda p: 0.5 * p @ p
        )
        params = params + updates
    assert np.isfinite(params).all()
    assert np.abs(params).max() < 0.5

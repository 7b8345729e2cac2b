"""Zero, constant, tiny, huge and non-finite gradients; far parameters and rates."""

import jax
import numpy as np
import optax
import pytest

import optgrad

from . import problem

SLOPES = {"zero": 0.0, "constant": 0.3}


@pytest.mark.parametrize("steps", [1, 5], ids=["first_step", "five_steps"])
@pytest.mark.parametrize("gradient", list(SLOPES))
def test_zero_and_constant_gradients(method, gradient, steps):
    """No NaN at the first step nor later, in parameters or state."""
    params, state = problem.linear_run(method, [problem.slope_like(SLOPES[gradient])] * steps)
    problem.assert_finite(params)
    problem.assert_no_nan(state)


def test_zero_after_gradients(method):
    """Gradients that vanish, and return, leave no NaN."""
    slopes = [problem.slope_like(s) for s in (0.3, 0.0, 0.0, 0.0, -0.3)]
    params, state = problem.linear_run(method, slopes)
    problem.assert_finite(params)
    problem.assert_no_nan(state)


def test_vanishing_gradients(method):
    """One gradient and a thousand zeros: what decays to 0 is not divided by itself."""
    slopes = [problem.slope_like(0.3, w=-2.0), *[problem.slope_like(0.0)] * 1000]
    params, state = problem.linear_run(method, slopes)
    problem.assert_finite(params)
    problem.assert_no_nan(state)


def test_zero_in_one_coordinate(method):
    """A coordinate that never has a gradient, beside others that have one."""
    slopes = [problem.slope_like(s, w=0.0) for s in (0.3, -0.2, 0.1)]
    params, state = problem.linear_run(method, slopes)
    problem.assert_finite(params)
    problem.assert_no_nan(state)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_non_finite_entry(method, number):
    """One NaN or Inf raises nothing; elementwise methods confine it to its coordinate."""
    values = (0.3, -0.2, 0.1)
    clean = [problem.slope_like(v, w=1.0) for v in values]
    spoilt = [clean[0], problem.slope_like(values[1], w=number), clean[2]]
    params, _ = problem.linear_run(method, spoilt)
    if problem.is_elementwise(method.name):
        expected, _ = problem.linear_run(method, clean)
        actual = problem.others(params, "w")
        problem.assert_identical(actual, problem.others(expected, "w"))
        problem.assert_finite(actual)


def test_constant_loss(method):
    """A thousand gradients of 0 from the start: an own method stays where it is."""
    slope = problem.slope_like(0.0)
    params, state = problem.linear_run(method, [slope] * 1000)
    problem.assert_finite(params)
    problem.assert_no_nan(state)
    if method.family != "baselines":
        problem.assert_identical(params, problem.linear_start())


@problem.OWN
@pytest.mark.parametrize("size", [1e-30, 1e15, 1e30], ids=["1e-30", "1e15", "1e30"])
def test_tiny_and_huge_gradients(method, size):
    """Gradients of 1e-30 and of 1e15, whose squares have no float32, leave finite numbers."""
    slopes = [problem.slope_like(size * s, w=size) for s in (1.0, 0.9, -0.8, 0.0, 1.0)]
    params, state = problem.linear_run(method, slopes)
    problem.assert_finite(params)
    problem.assert_no_nan(state)


@problem.OWN
@pytest.mark.parametrize("position", [0.0, 1e8], ids=["0", "1e8"])
def test_position(method, position):
    """Parameters that are all 0, or so large that steps are lost in their rounding."""
    slopes = [problem.slope_like(s, w=0.2) for s in (0.3, -0.2, 0.1, 0.0, 0.3)]
    params, state = problem.linear_run(method, slopes, problem.slope_like(position))
    problem.assert_finite(params)
    problem.assert_no_nan(state)


@problem.OWN
@pytest.mark.methods_where(predicate=lambda method: "learning_rate" in method.hyperparameters)
def test_extreme_rates(method):
    """A rate of 1e-30 moves nothing far; one of 1e30 leaves finite numbers, if need be guarded."""
    single = problem.standard()

    def update(rate, *arguments):
        optimizer = optgrad.guard(problem.create(method, learning_rate=rate))
        return problem.make_update(method, optimizer)(*arguments)

    update = jax.jit(update)
    for rate in (1e-30, 1e30):
        state = optgrad.guard(problem.create(method, learning_rate=rate)).init(single.params)
        run = problem.run(method, lambda *given, r=rate: update(r, *given), state, single)
        problem.assert_finite(run.params)
        problem.assert_no_nan(run.state)
        if rate < 1:
            assert float(optax.tree.norm(run.updates)) < 1e-20

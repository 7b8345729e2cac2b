"""What holds for any gradients and hyperparameters: drawn at random by hypothesis."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad.online_regression import parabola

from . import problem

ENTRIES = 9  # of `problem.slope_like`


def streams(largest, steps=5):
    """Gradients of some steps, (steps, entries), with zeros and repetitions among them."""
    numbers = st.floats(-largest, largest, width=32)
    return hnp.arrays(np.float32, (steps, ENTRIES), elements=numbers, fill=st.just(0.0))


def tree_of(numbers):
    """Nine numbers in the tree of `problem.linear_run`."""
    return {"b": jnp.asarray(numbers[:3]), "w": jnp.asarray(numbers[3:]).reshape(2, 3)}


def flat(tree):
    return np.concatenate([np.ravel(tree["b"]), np.ravel(tree["w"])])


def run(method, gradients, start=None):
    return problem.linear_run(method, [tree_of(g) for g in gradients], start)


@problem.OWN
@hypothesis.settings(max_examples=25)
@hypothesis.given(gradients=streams(2.0**40))
def test_invariants(method, gradients):
    """Finite steps, non-negative variances, adaptations in [0, 1]; nothing changes its type."""
    params, state = run(method, gradients)
    problem.assert_finite(params)
    problem.assert_no_nan(state)
    before = problem.create(method).init(problem.linear_start())
    assert [x[:3] for x in problem.avals(state)] == [x[:3] for x in problem.avals(before)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        if "variance" in where and "covariance" not in where:
            assert np.all(np.asarray(leaf) >= 0), where
    modelled = optgrad.per_parameter(state)
    for name, low, high in (
        ("variance_adaptation", 0, 1), ("relative_variance", 0, np.inf),
        ("step_size", 0, np.inf), ("curvature", 0, np.inf),
    ):  # fmt: skip
        for leaf in jax.tree.leaves(modelled.get(name, ())):
            numbers = np.asarray(leaf)[~np.isnan(leaf)]  # NaN: nothing to tell
            assert np.all((numbers >= low) & (numbers <= high)), name


BY_TENSOR = {"auto"}  # a number for each tensor: there it matters what is in one


@problem.OWN
@pytest.mark.methods_where(predicate=lambda method: method.name not in BY_TENSOR)
@hypothesis.settings(max_examples=10)
@hypothesis.given(gradients=streams(10.0), order=st.permutations(range(ENTRIES)))
def test_order_of_entries(method, gradients, order):
    """Where in which leaf a parameter is does not matter."""
    start = flat(problem.linear_start())
    expected, _ = run(method, gradients)
    found, _ = run(method, gradients[:, order], tree_of(start[np.array(order)]))
    wanted = flat(expected)[np.array(order)]
    # Random directions (of Lanczos' recursion) leave the rounding of the largest entry in all.
    np.testing.assert_allclose(flat(found), wanted, 1e-4, 1e-5 * max(1.0, np.abs(wanted).max()))


@functools.cache
def update_with(name):
    """The compiled step of a method on the linear loss, whose tuned hyperparameter is traced."""
    method = optgrad.get_method(name)
    key, _ = problem.tuned(method)

    def step(value, params, state, slope):
        optimizer = problem.create(method, **{key: value})
        training_step = problem.make_step(method, optimizer, problem.linear_loss)
        return training_step(params, state, problem.linear_batch(slope))

    return jax.jit(step)


@problem.OWN
@pytest.mark.methods_where(predicate=lambda method: method.tunes is not None)
@hypothesis.settings(max_examples=10)
@hypothesis.given(gradients=streams(10.0), place=st.floats(0, 1))
def test_random_hyperparameter(method, gradients, place):
    """Anywhere in the range over which it is tuned, the run is finite."""
    name, low, high = method.tunes
    value = np.float32(low * (high / low) ** place)
    params = problem.linear_start()
    state = problem.create(method, **{name: float(value)}).init(params)
    for gradient in gradients:
        params, state = update_with(method.name)(value, params, state, tree_of(gradient))
    problem.assert_finite(params)
    problem.assert_no_nan(state)


# What a change of the loss' unit changes --------------------------------------------------------

# Of a step: the power of the unit in which it is proportional to the gradients'.
POWER = {"ssd": 0, "m_ssd": 0, "adam_sign": 0, "adam_star": 0, "adam_star_mb": 0}
POWER |= {"svag": 1, "m_svag": 1, "m_svag_mb": 1, "momentum_sgd_hybrid": 1}


@pytest.mark.methods_where(predicate=lambda method: method.name in POWER)
@hypothesis.settings(max_examples=20)
@hypothesis.given(gradients=streams(10.0), exponent=st.integers(-16, 16))
def test_unit_of_the_loss(method, gradients, exponent):
    """Signs and adaptations do not depend on the unit; a step does as its formula says."""
    gradients = np.where(np.abs(gradients) < 1e-3, 0.0, gradients).astype(np.float32)
    start = problem.slope_like(0.0)
    power = POWER[method.name]
    scale = np.float32(2.0**exponent)
    expected = flat(run(method, gradients, start)[0]) * scale**power
    found = flat(run(method, gradients * scale, start)[0])
    np.testing.assert_allclose(found, expected, 1e-5, 1e-7 * scale**power)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=100)
@hypothesis.given(
    samples=hnp.arrays(np.float64, (6, 2), elements=st.floats(-100, 100)),
    exponent=st.integers(-30, 30),
)
def test_unit_of_a_parabola(samples, exponent):
    """Its curvature has the unit, its minimum has none, its rate the inverse; |correlation| ≤ 1."""
    positions, gradients = (jnp.asarray(x) for x in samples.T)
    scale = 2.0**exponent
    one = parabola.fit_parabola(positions, gradients)
    other = parabola.fit_parabola(positions, gradients * scale)
    assert one.position_variance >= 0
    assert one.gradient_variance >= 0
    assert abs(parabola.correlation(one)) <= 1
    for found, expected in (
        (parabola.curvature(other), parabola.curvature(one) * scale),
        (parabola.minimum(other), parabola.minimum(one)),
        (parabola.sigma_ratio(other), parabola.sigma_ratio(one) / scale),
        (parabola.correlation(other), parabola.correlation(one)),
    ):
        np.testing.assert_allclose(found, expected, 1e-9, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ogr1d", "ogr1ds", "ogr1dc"])
@hypothesis.settings(max_examples=10)
@hypothesis.given(exponent=st.integers(-20, 20))
def test_unit_of_online_regression(name, exponent):
    """With η in the inverse unit the trajectory is the same, and the curvature has the unit."""
    scale = jnp.asarray(2.0**exponent)
    (expected, one), (found, other) = trajectory(name)(1.0), trajectory(name)(scale)
    np.testing.assert_allclose(found, expected, 1e-8)
    np.testing.assert_allclose(other, one * scale, 1e-8)


@functools.cache
def trajectory(name):
    """(unit) -> parameters and curvature along the way, on a quadratic with deterministic noise."""
    curvatures = jnp.array([0.5, 1.0, 3.0])

    def descend(unit):
        optimizer = getattr(optgrad, name)(0.05 / unit, paper=True)

        def step(carry, t):
            params, state = carry
            gradient = unit * (curvatures * params + 0.1 * jnp.sin(t * jnp.arange(1.0, 4.0)))
            updates, state = optimizer.update(gradient, state, params)
            params = params + updates
            return (params, state), (params, optgrad.diagnostics(state)["curvature"])

        start = jnp.array([1.0, -2.0, 0.5])
        return jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(30.0))[1]

    return jax.jit(descend)

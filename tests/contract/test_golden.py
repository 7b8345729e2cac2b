"""Trajectories in float64 that change on purpose only.

Recorded by ``pytest tests/contract/test_golden.py -m "slow or not slow" --record-golden -n 0``; who
records them again says in the change log why numbers are others.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

from . import problem, records

STEPS = 50
FILE = Path(__file__).parent / "golden.json"
# Where a step depends on comparisons, or divides by what is nearly 0, rounding grows.
RTOL, ATOL = 1e-6, 1e-9


def rosenbrock(params, example):
    """Yao's test function, scaled and shifted a little by each example."""
    x, y = params["x"] + 0.01 * example["noise"], params["y"]
    return 0.5 * ((1.0 - x) ** 2 + 10.0 * jnp.sum(jnp.square(y - x**2)))


def golden_problem(name):
    generator = np.random.default_rng(7)
    if name == "quadratic":
        params = {"b": jnp.array([0.5, -1.0], jnp.float64), "w": jnp.array([[1.5]], jnp.float64)}
        return problem.quadratic(params, noise=0.05, steps=STEPS, seed=7)
    params = {"x": jnp.array(-0.5, jnp.float64), "y": jnp.array([1.0], jnp.float64)}
    noise = generator.standard_normal((STEPS, problem.EXAMPLES))
    return problem.Problem(rosenbrock, params, {"noise": jnp.asarray(noise)})


PROBLEMS = ("quadratic", "rosenbrock")


def trajectory(method, name):
    """The parameters after every step, (steps, parameters)."""
    single = golden_problem(name)
    optimizer = problem.create(method)
    step = problem.make_step(method, optimizer, single.loss_fn)

    def body(carry, batch):
        carry = step(*carry, batch)
        return carry, jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(carry[0])])

    start = single.params, optimizer.init(single.params)
    return np.asarray(jax.jit(lambda c, b: jax.lax.scan(body, c, b)[1])(start, single.batches))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROBLEMS)
def test_golden(method, name, request):
    """Fifty steps in float64 are those on record."""
    found = trajectory(method, name)
    recorded = records.read(FILE)
    if request.config.getoption("--record-golden"):
        rows = [[float(f"{x:.12g}") for x in row] for row in found]
        recorded.setdefault(method.name, {})[name] = rows
        records.write(FILE, recorded)
        return
    assert name in recorded.get(method.name, {}), f"record it first: {__doc__}"
    np.testing.assert_allclose(found, np.asarray(recorded[method.name][name]), RTOL, ATOL)


def test_no_record_is_left_over():
    """Of methods that are no more."""
    assert {*records.read(FILE)} == {m.name for m in optgrad.methods()}

"""The suite itself: its list of failures is not stale, its tools can tell yes from no."""

import importlib
from pathlib import Path

import jax.numpy as jnp
import pytest

import optgrad

from . import problem, upstream


def properties():
    """The names of all properties of the suite."""
    names = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f".{path.stem}", __package__)
        names |= {name.removeprefix("test_") for name in vars(module) if name.startswith("test_")}
    return names


def test_failures_are_of_baselines_and_have_reasons():
    names = properties()
    for (name, tested), failure in upstream.FAILURES.items():
        assert optgrad.get_method(name).family == "baselines"
        assert tested.split("[")[0] in names
        assert failure.reason


@pytest.mark.parametrize(
    ("name", "elementwise"),
    [("sgd", True), ("adam", True), ("m_svag", True), ("polyak_sgd", False), ("lbfgs", False)],
)
def test_elementwise_methods_are_recognised(name, elementwise):
    assert problem.is_elementwise(name) == elementwise


def test_comparisons_can_fail():
    one = {"a": jnp.ones(2), "b": jnp.ones(())}
    problem.assert_close(one, {"a": jnp.ones(2) + 1e-7, "b": jnp.ones(())})
    others = (
        {"a": jnp.ones(2) + 1e-3, "b": jnp.ones(())},
        {"a": jnp.ones(2, jnp.float16), "b": jnp.ones(())},
        {"a": jnp.ones(2), "b": jnp.ones(1)},
        {"a": jnp.ones(2)},
    )
    for other in others:
        with pytest.raises(AssertionError):
            problem.assert_close(one, other)
        with pytest.raises(AssertionError):
            problem.assert_identical(one, other)


def test_unknown_extra_arguments_are_reported():
    method = optgrad.get_method("m_svag")
    single = problem.standard()
    oracle = problem.Oracle(single.loss_fn, single.params, single.batch(0))
    with pytest.raises(NotImplementedError, match=r"m_svag needs 'hessian'.*BUILDERS"):
        problem.build(method, "hessian", oracle)

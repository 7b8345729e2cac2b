"""The suite itself: its list of failures is not stale, its tools can tell yes from no."""

import importlib
import inspect
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

import optgrad

from . import problem, reliability, upstream

ROOT = Path(__file__).parents[2]


def properties():
    """The names of all tests of this suite that run for methods."""
    names = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, function in vars(module).items():
            if name.startswith("test_") and function.__module__ == module.__name__:
                drawn = getattr(function, "hypothesis", None)
                arguments = inspect.signature(drawn.inner_test if drawn else function).parameters
                if "method" in arguments:
                    names.add(name.removeprefix("test_"))
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


# The table of methods and properties ------------------------------------------------------------


def test_table_of_properties_is_complete():
    """Whoever adds a method or a property has the table written again."""
    rows, names = reliability.written(ROOT / "docs" / "reliability.md")
    assert rows == [m.name for m in optgrad.methods()], reliability.__doc__
    assert {*names} == properties(), reliability.__doc__


def report(method, outcome="passed", when="call", **others):
    recorded = [(reliability.KEY, ["numerics", "zero", method])]
    about = {"user_properties": recorded, "outcome": outcome, "when": when, **others}
    return types.SimpleNamespace(nodeid=f"{method}{len(others)}", **about)


class Cache(dict):
    """Stands in for pytest's."""

    set = dict.__setitem__


def test_table_tells_what_did_not_pass(tmp_path):
    """A failure, also of a fixture, and a method without tests leave the document as it is."""
    path = tmp_path / "reliability.md"
    path.write_text(f"before\n{reliability.BEGIN}\nold\n{reliability.END}\nafter\n")
    everyone = [report(m.name) for m in optgrad.methods()]
    for reports in (
        everyone[1:],  # the old table has no rows
        [*everyone, report("adam", "failed")],
        [*everyone, report("adam", "failed", "setup")],
    ):
        with pytest.raises(ValueError, match="test"):
            reliability.write(path, reports, Cache())
        assert "old" in path.read_text()
    cache = Cache()
    with pytest.raises(ValueError, match="test"):
        reliability.write(path, [*everyone[:-1], report("csawg", "failed")], cache)
    reliability.write(path, [*everyone[-1:], report("csawg")], cache)  # what had failed, again
    expected = [report("adam"), report("adam", "skipped", wasxfail="reason")]
    reliability.write(path, [*expected, report("sgd", "skipped", why="no reason")], Cache())
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| `adam` | 1 + 1† |" in text
    assert "| `sgd` | 1‡ |" in text
    assert "| `momentum` | 1 |" in text
    assert f"{len(everyone) - 1} tests passed. 1 (†)" in text
    assert reliability.written(path) == ([m.name for m in optgrad.methods()], ["zero"])

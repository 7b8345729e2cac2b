"""One test per method and property; upstream's failures are marked."""

from pathlib import Path

import pytest

import optgrad

from . import upstream

HERE = Path(__file__).parent
# Left to one stage of .ci/run: what takes XLA several times as long to compile as all else, and
# optax's own methods, which change with optax only. (A method is tested by being registered; it
# needs not be named here.) tests/conftest.py leaves the curvature family to it everywhere.
SLOW = {"ogr_subspace", "ogr_diagonal_subspace"}
SLOW |= {method.name for method in optgrad.methods("baselines")}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "methods_where(predicate=...): run the property for those records only"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every registered method, unless a mark restricts a property to some records."""
    if "method" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("methods_where"))
    chosen = [m for m in optgrad.methods() if all(mark.kwargs["predicate"](m) for mark in marks)]
    metafunc.parametrize("method", chosen, ids=[m.name for m in chosen])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks upstream's failures, and sorts by method: what is compiled for one is used again."""
    order = {method.name: i for i, method in enumerate(optgrad.methods())}
    for item in items:
        if method := method_of(item):
            if method.name in SLOW:
                item.add_marker(pytest.mark.slow)
            failure = upstream.FAILURES.get((method.name, property_of(item)))
            if failure is not None:
                mark = pytest.mark.xfail(strict=True, raises=failure.raises, reason=failure.reason)
                item.add_marker(mark)
    items.sort(key=lambda item: order[method.name] if (method := method_of(item)) else -1)


def method_of(item: pytest.Item) -> optgrad.Method | None:
    """The method that a test of this suite is for."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or HERE not in item.path.parents:
        return None
    return callspec.params.get("method")


def property_of(item: pytest.Item) -> str:
    """The test's name without its prefix and method: ``dtypes[bfloat16]``."""
    ids = item.callspec.id.split("-")
    ids.remove(item.callspec.params["method"].name)
    name = item.originalname.removeprefix("test_")
    return f"{name}[{'-'.join(ids)}]" if ids else name

"""One test per method and property; upstream's failures are marked."""

import zlib
from pathlib import Path

import pytest

import optgrad

from . import reliability, upstream

HERE = Path(__file__).parent
# Left to one stage of .ci/run: what takes XLA several times as long to compile as all else, and
# optax's own methods, which change with optax only. (A method is tested by being registered; it
# needs not be named here.) tests/conftest.py leaves the curvature family to it everywhere.
LONGEST = {"ogr_subspace", "ogr_diagonal_subspace"}
SLOW = LONGEST | {method.name for method in optgrad.methods("baselines")}
LONGEST |= {method.name for method in optgrad.methods("curvature")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every registered method, unless a mark restricts a property to some records."""
    if "method" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("methods_where"))
    chosen = [m for m in optgrad.methods() if all(mark.kwargs["predicate"](m) for mark in marks)]
    metafunc.parametrize("method", chosen, ids=[m.name for m in chosen])


# What is much the same as another property; the default run has a few methods of each kind.
SELDOM = {
    "explicit_mesh": {"m_svag", "ogr1ds", "csawg", "idbd"},
    "shard_map": {"m_svag", "ogr1dc", "l4_adam", "csawg", "ogr_full"},
}

# The methods take turns: of the tests that compile a program for each of many variants, or a large
# one, each method runs a third, and of all others half; methods that take longest to compile a
# sixth and a fifth, and optax's own a ninth and an eighth; what neighbours run differs. Whoever
# changes what all share runs ``--contract all``, as the table in docs/reliability.md asks for.
DEALT = {"odd_trees", "dtypes", "weak_types", "non_finite_entry", "either_extra_argument"}
DEALT |= {"low_precision_state", "golden", "program_size", "sharded_parameters"}
DEALT |= {"vmap_over_runs", "inject_integers", "extreme_rates", "position"}
DEALT |= {"orbax_standard", "msgpack", "state_to_dict", "pickled_leaves"}
DEALT |= {"invariants", "order_of_entries", "random_hyperparameter", "tiny_and_huge_gradients"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks upstream's failures, and sorts by method: what is compiled for one is used again."""
    _deselect(config, items)
    order = {method.name: i for i, method in enumerate(optgrad.methods())}
    for item in items:
        if method := method_of(item):
            module = item.path.stem.removeprefix("test_")
            name = item.originalname.removeprefix("test_")
            item.user_properties.append((reliability.KEY, (module, name, method.name)))
            often = SELDOM.get(item.originalname.removeprefix("test_"))
            seldom = often is not None and method.name not in often
            if method.name in SLOW or seldom:
                item.add_marker(pytest.mark.slow)
            failure = upstream.FAILURES.get((method.name, property_of(item)))
            if failure is not None:
                mark = pytest.mark.xfail(strict=True, raises=failure.raises, reason=failure.reason)
                item.add_marker(mark)
    items.sort(key=lambda item: order[method.name] if (method := method_of(item)) else -1)


def _deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what ``--contract`` says."""
    chosen = config.getoption("--contract")
    if chosen == "all" or config.getoption("--record-golden"):
        return
    kinds = {(m.family, m.needs): m.name for m in optgrad.methods()}

    def stays(item: pytest.Item) -> bool:
        method = method_of(item)
        is_chosen = chosen == "dealt" or method is None or method.name in kinds.values()
        return is_chosen and _is_dealt(item)

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = filter(stays, items)


def _is_dealt(item: pytest.Item) -> bool:
    method = method_of(item)
    if method is None or (method.name, property_of(item)) in upstream.FAILURES:
        return True
    name = item.originalname.removeprefix("test_")
    turn = sum(item.callspec.indices.values())  # the method's number, and those of the variants
    longer = 6 * (method.family == "baselines") + 3 * (method.name in LONGEST)
    rounds = (3 if name in DEALT else 2) + longer
    return (turn + zlib.crc32(name.encode())) % rounds == 0


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

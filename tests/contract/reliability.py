"""The table of methods and properties in docs/reliability.md, from a run of the whole suite.

``pytest tests/contract --contract all -m "slow or not slow" --reliability docs/reliability.md``;
with ``-k METHOD`` that method's row alone. Results stay in pytest's cache, so that after a failure
``--lf`` completes them (``--cache-clear`` forgets them).
"""

import collections
import importlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optgrad

KEY = "contract"  # under which a test records which property of which method it is
_CACHED = "optgrad/contract"
MARKS = {"passed": "", "xfailed": "†", "skipped": "‡"}
NONE = "–"  # of that module no test is defined for the method
BEGIN, END = "<!-- table of properties -->", "<!-- end of the table -->"


class Result(NamedTuple):
    """Of one test: one property, in one variant, of one method."""

    module: str  # without "test_"
    name: str  # of the property
    method: str
    outcome: str  # passed, xfailed, failed or skipped


def results(reports: Iterable[Any]) -> dict[str, Result]:
    """Test -> its result, of all that recorded what they are."""
    found = {}
    for report in reports:
        recorded = [value for key, value in getattr(report, "user_properties", ()) if key == KEY]
        if not recorded or not hasattr(report, "when"):  # such as a test that was deselected
            continue
        if report.when != "call" and report.outcome == "passed":
            continue
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        found[report.nodeid] = Result(*recorded[0], outcome)
    return found


def table(found: Collection[Result], old: str = "") -> str:
    """Markdown: a row for each method, a column for each module of the suite, then what they test.

    Args:
      found: results.
      old: an earlier table, whose rows stay for methods that did not run this time.

    Raises:
      ValueError: if a test failed, or if there is nothing for a registered method.
    """
    if bad := [r for r in found if r.outcome == "failed"]:
        raise ValueError(f"{len(bad)} tests did not pass, the first is {bad[0]}")
    modules = sorted({r.module for r in found})
    header = ["method", *(m.replace("_", " ") for m in modules)]
    counts = collections.Counter((r.method, r.module, r.outcome) for r in found)
    rows = _rows(old) if _row(header) in old else {}
    for name in {r.method for r in found}:
        rows[name] = [_cell(counts, name, module) for module in modules]
    names = [m.name for m in optgrad.methods()]
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"no test ran for {missing}, which the table has not: run all methods")
    cells = [cell for name in names for cell in rows[name]]
    total: collections.Counter[str] = collections.Counter()
    for cell in cells:
        for number, mark in re.findall(rf"(\d+)([{''.join(MARKS.values())}]?)", cell):
            total[mark] += int(number)
    lines = [
        _row(header),
        _row(["---"] * len(header)),
        *(_row([f"`{name}`", *rows[name]]) for name in names),
        "",
        f"{total['']:,} tests passed. {total['†']} (†) fail as listed, with their reasons, in "
        f"`tests/contract/upstream.py`, all for optax's own methods. {total['‡']} (‡) were skipped "
        "where jax or a method refuses the placement. A dash: nothing of it is defined for a "
        "method.",
        "",
    ]
    for module in modules:
        properties = sorted({r.name for r in found if r.module == module})
        lines.append(f"- **{module.replace('_', ' ')}**: {_docline(module)}")
        lines.append("  " + ", ".join(f"`{name}`" for name in properties))
    return "\n".join(lines)


def check_run(config: Any) -> None:
    """Raises ``ValueError`` unless all variants of all tests were asked for."""
    if config.getoption("--contract") != "all" or config.option.markexpr != "slow or not slow":
        raise ValueError(f"only a part was asked for; {__doc__}")


def write(path: Path, reports: Iterable[Any], cache: Any) -> None:
    """Puts the table between its marks in a document, and the results into pytest's cache."""
    found: dict[str, Any] = {**cache.get(_CACHED, {}), **results(reports)}
    cache.set(_CACHED, found)
    before, old, after = _parts(path)
    lines = table([Result(*result) for result in found.values()], old)
    text = f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}"
    path.write_text(text, encoding="utf-8")


def written(path: Path) -> tuple[list[str], list[str]]:
    """The methods and the properties that a document's table has."""
    _, text, _ = _parts(path)
    listed = [line for line in text.splitlines() if line.startswith("  `")]
    return [*_rows(text)], [name.strip(" `") for line in listed for name in line.split(",")]


def _parts(path: Path) -> tuple[str, str, str]:
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


def _rows(text: str) -> dict[str, list[str]]:
    """Method -> the other cells of its row."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip("`"): cells for name, *cells in lines}


def _cell(counts: collections.Counter[tuple[str, str, str]], method: str, module: str) -> str:
    numbers = {mark: counts[method, module, outcome] for outcome, mark in MARKS.items()}
    return " + ".join(f"{n}{mark}" for mark, n in numbers.items() if n) or NONE


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _docline(module: str) -> str:
    doc = importlib.import_module(f"{__package__}.test_{module}").__doc__ or ""
    return doc.strip().splitlines()[0]

"""The table of methods and properties in docs/reliability.md, from a run of the whole suite.

``pytest tests/contract --contract all -m "slow or not slow" --reliability docs/reliability.md``
"""

import collections
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optgrad

KEY = "contract"  # under which a test records which property of which method it is
BEGIN, END = "<!-- table of properties -->", "<!-- end of the table -->"


class Result(NamedTuple):
    """Of one test: one property, in one variant, of one method."""

    module: str  # without "test_"
    name: str  # of the property
    method: str
    outcome: str  # passed, xfailed, failed or skipped


def results(reports: Iterable[Any]) -> list[Result]:
    """Those of all tests that recorded what they are."""
    found = []
    for report in reports:
        recorded = [value for key, value in getattr(report, "user_properties", ()) if key == KEY]
        if not recorded or (report.when != "call" and report.outcome == "passed"):
            continue
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        found.append(Result(*recorded[0], outcome))
    return found


def table(found: Sequence[Result]) -> str:
    """Markdown: a row for each method, a column for each module of the suite, then what they test.

    Raises:
      ValueError: if a test failed or was skipped, or if a registered method has none.
    """
    if bad := [r for r in found if r.outcome not in {"passed", "xfailed"}]:
        raise ValueError(f"{len(bad)} tests did not pass, the first is {bad[0]}")
    modules = sorted({r.module for r in found})
    if missing := {m.name for m in optgrad.methods()} - {r.method for r in found}:
        raise ValueError(f"no test ran for {sorted(missing)}: --contract all runs them")
    counts = collections.Counter((r.method, r.module, r.outcome) for r in found)
    lines = [_row(["method", *(m.replace("_", " ") for m in modules)])]
    lines.append(_row(["---"] * (len(modules) + 1)))
    for method in optgrad.methods():
        cells = [_cell(counts, method.name, module) for module in modules]
        lines.append(_row([f"`{method.name}`", *cells]))
    total = collections.Counter(r.outcome for r in found)
    lines += [
        "",
        f"{total['passed']:,} tests passed; {total['xfailed']} fail as listed, with their reasons, "
        "in `tests/contract/upstream.py` (optax's own methods; † in the table). A dash: the "
        "property is not defined for the method, as a learning rate's schedule without one.",
        "",
    ]
    for module in modules:
        names = sorted({r.name for r in found if r.module == module})
        lines.append(f"- **{module.replace('_', ' ')}**: {_docline(module)}")
        lines.append("  " + ", ".join(f"`{name}`" for name in names))
    return "\n".join(lines)


def check_run(config: Any) -> None:
    """Raises ``ValueError`` unless all variants of all tests were asked for."""
    if config.getoption("--contract") != "all" or config.option.markexpr != "slow or not slow":
        raise ValueError(f"only a part was asked for; {__doc__}")


def write(path: Path, reports: Iterable[Any]) -> None:
    """Puts the table between its marks in a document."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{table(results(reports))}\n\n{END}{after}", "utf-8")


def written(path: Path) -> tuple[list[str], list[str]]:
    """The methods and the properties that a document's table has."""
    text = path.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")]
    listed = [line for line in text.splitlines() if line.startswith("  `")]
    return rows, [name.strip(" `") for line in listed for name in line.split(",")]


def _cell(counts: collections.Counter[tuple[str, str, str]], method: str, module: str) -> str:
    passed, expected = (counts[method, module, o] for o in ("passed", "xfailed"))
    if not passed and not expected:
        return "–"
    return f"{passed}†" if expected else str(passed)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _docline(module: str) -> str:
    doc = importlib.import_module(f"{__package__}.test_{module}").__doc__ or ""
    return doc.strip().splitlines()[0]

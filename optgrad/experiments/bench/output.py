"""A folder with what a benchmark found: Markdown for readers, JSON for programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from optgrad.experiments import report, results


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one kind.

    Attributes:
      title: its heading.
      header: of the cells.
      cells: the rows as text.
      records: the rows as they are, dataclasses.
      shown: which columns fit on a terminal.
    """

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    records: Sequence[Any]
    shown: Sequence[int]


def write(
    name: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Writes ``<name>.md``, ``<name>.json`` and ``config.toml``, whole or not at all.

    Args:
      name: of the benchmark.
      tables: what was measured.
      notes: what was left out, and why.
      settings: of the command.
      folder: to be made.
      overwrite: whether an earlier one may be replaced.

    Raises:
      ResultsError: if the folder cannot or may not be written.
    """
    environment = results.describe_environment()

    def write_files(prepared: Path) -> None:
        (prepared / results.MARKER).write_text(tomli_w.dumps(dict(settings)), encoding="utf-8")
        (prepared / f"{name}.md").write_text(
            markdown(name, tables, notes, environment), encoding="utf-8"
        )
        rows = [
            {"table": table.title, **dataclasses.asdict(record)}
            for table in tables
            for record in table.records
        ]
        content = {"environment": environment, "settings": settings, "rows": rows, "notes": notes}
        results.write_json(prepared / f"{name}.json", content)

    results.write_folder(folder, write_files, overwrite=overwrite)


def markdown(
    name: str, tables: Sequence[Table], notes: Sequence[str], environment: Mapping[str, str]
) -> str:
    """The tables, and the environment that they are from."""
    lines = [f"# optgrad bench {name}", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    for table in tables:
        lines += ["", f"## {table.title}", "", report.markdown_table(table.header, table.cells)]
    if notes:
        lines += ["", "## Not measured", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"

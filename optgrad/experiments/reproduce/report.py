"""The results folder of a reproduction: report, pictures and the numbers behind them."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from optgrad.experiments import plots, results
from optgrad.experiments.report import markdown_table
from optgrad.experiments.reproduce import Reproduction, Result, Settings

FINDINGS_HEADER = ("statement", "paper or specification", "measured here", "verdict")


def write(
    reproduction: Reproduction,
    found: Mapping[str, Result],
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Writes ``report.md`` and for each figure a PNG, an SVG and a CSV, whole or not at all.

    Args:
      reproduction: the paper.
      found: figure's name -> its result.
      settings: with which they were made.
      folder: its place.
      overwrite: whether an earlier results folder may be replaced.

    Raises:
      ResultsError: if the folder cannot or may not be written.
    """

    def write_files(prepared: Path) -> None:
        config = {
            "reproduce": reproduction.name,
            "figures": list(found),
            "quick": settings.quick,
            "scale": settings.scale,
        }
        (prepared / results.MARKER).write_text(tomli_w.dumps(config), encoding="utf-8")
        for name, result in found.items():
            results.write_csv(prepared / f"{name}.csv", result.rows)
            for suffix in ("svg", "png"):
                plots.save(result.figure, prepared / f"{name}.{suffix}")
        text = markdown(reproduction, found, settings)
        (prepared / "report.md").write_text(text, encoding="utf-8")

    results.write_folder(folder, write_files, overwrite=overwrite)


def markdown(reproduction: Reproduction, found: Mapping[str, Result], settings: Settings) -> str:
    """The report: for each figure what was done, the picture, and the paper beside the numbers."""
    lines = [f"# {reproduction.title}", "", f"Reproduced: {reproduction.reference}.", ""]
    if settings.quick:
        lines += ["**Quick mode: far too few runs for the numbers to mean anything.**", ""]
    elif label := reproduction.scales[settings.scale]:
        lines += [label, ""]
    for name, result in found.items():
        lines += [f"## {result.title}", "", result.text, "", f"![{name}]({name}.png)", ""]
        for header, rows in result.tables:
            lines += [markdown_table(header, rows), ""]
        lines += [markdown_table(FINDINGS_HEADER, findings_rows(result)), ""]
        lines += [f"Numbers: [{name}.csv]({name}.csv)", ""]
    lines += ["## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in results.describe_environment().items()]
    command = ["optgrad", "reproduce", reproduction.name]
    command += [] if set(found) == set(reproduction.figures) else list(found)
    if len(reproduction.scales) > 1 and not settings.quick:
        command += ["--scale", settings.scale]
    command += ["--quick"] if settings.quick else []
    lines += ["", "Repeat it:", "", "```", shlex.join(command), "```", ""]
    return "\n".join(lines)


def findings_rows(result: Result) -> Sequence[Sequence[str]]:
    """The findings as a table's rows."""
    return [[f.statement, f.reference, f.measured, f.verdict] for f in result.findings]

"""The command reproduce: the figures and tables of a paper."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from optgrad.experiments import terminal


def reproduce(  # noqa: PLR0917  typer reads the options from the signature
    paper: Annotated[str | None, typer.Argument(help="Which paper; none: list them all.")] = None,
    figures: Annotated[
        list[str] | None, typer.Argument(help="Figures or tables, or 'all', the default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier results folder.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data sets.")] = None,
    scale: Annotated[
        str, typer.Option(help="'cpu' or, where there is one, 'paper': the paper's budget.")
    ] = "cpu",
    quick: Annotated[
        bool, typer.Option(help="Seconds, to try it; the numbers mean little.")
    ] = False,
) -> None:
    """Reproduce the figures and tables of a paper: pictures, numbers and a report."""
    from optgrad.experiments import reproduce as lib  # noqa: PLC0415
    from optgrad.experiments import results  # noqa: PLC0415
    from optgrad.experiments.reproduce import report as reproduction_report  # noqa: PLC0415

    if paper is None:
        for name in lib.reproductions():
            terminal.console.print(_reproduction_table(lib.get_reproduction(name)))
        return
    with terminal.refusals():
        reproduction = lib.get_reproduction(paper)
        makers = reproduction.select(figures or ())
        settings = lib.Settings(quick=quick, data_dir=data_dir, scale=scale)
        reproduction.check_settings(settings)
        folder = output or results.default_folder_of(paper)
        results.check_destination(folder, overwrite=overwrite)
        found = _make_with_progress(makers, settings)
        reproduction_report.write(reproduction, found, settings, folder, overwrite=overwrite)
    for result in found.values():
        rows = reproduction_report.findings_rows(result)
        header = reproduction_report.FINDINGS_HEADER
        terminal.console.print(
            terminal.table(header, rows, title=result.title, shares=(3, 2, 2, 2))
        )
    terminal.console.print(
        f"Figures, numbers and report: {folder}", highlight=False, soft_wrap=True
    )


def _reproduction_table(reproduction: Any) -> Table:
    rows = [(name, maker.title) for name, maker in reproduction.figures.items()]
    return terminal.table(
        ("figure", "what"), rows, title=f"{reproduction.name}: {reproduction.reference}"
    )


def _make_with_progress(makers: Any, settings: Any) -> dict[str, Any]:
    """The results, under a progress bar with ETA over all figures."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
        console=terminal.console,
        transient=True,
    )
    task = progress.add_task("", total=sum(maker.share for maker in makers.values()))
    found, done = {}, 0.0
    with progress:
        for name, maker in makers.items():
            progress.update(task, description=name)

            def advance(fraction: float, done: float = done, share: float = maker.share) -> None:
                progress.update(task, completed=done + fraction * share)

            found[name] = maker.make(settings, advance)
            done += maker.share
            progress.update(task, completed=done)
    return found

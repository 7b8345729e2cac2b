"""The command reproduce: the figures and tables of a paper."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from optgrad.experiments import cli_names, terminal


def _complete_figures(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the paper that is on the command line already."""
    taken = ctx.params.get("figures") or ()
    names = cli_names.figures(ctx.params.get("paper") or "")
    return [name for name in names if name.startswith(incomplete) and name not in taken]


def reproduce(  # noqa: PLR0917  typer reads the options from the signature
    paper: Annotated[
        str | None,
        typer.Argument(help="Which paper; none: list them all.",
                       autocompletion=cli_names.beginning(cli_names.papers)),
    ] = None,
    figures: Annotated[
        list[str] | None,
        typer.Argument(help="Figures or tables, or 'all', the default.",
                       autocompletion=_complete_figures),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Results folder.", metavar="DIR")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier results folder.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data sets.", metavar="DIR")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(help="'cpu', or 'paper' for its own budget.", metavar="HOW",
                     autocompletion=cli_names.one_of("cpu", "paper")),
    ] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds, to try it; the numbers mean little.")
    ] = False,
) -> None:  # fmt: skip
    """Reproduce the figures and tables of a paper.

    Writes pictures, numbers, and a report with the paper's claims beside ours.

    Example: optgrad reproduce
    Example: optgrad reproduce dissecting-adam fig5 --output figure5
    """
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
    """The results of all figures."""
    found, done = {}, 0.0
    with terminal.progress(sum(maker.share for maker in makers.values())) as on_progress:
        for name, maker in makers.items():
            on_progress(name, done)

            def advance(
                fraction: float, name: str = name, done: float = done, share: float = maker.share
            ) -> None:
                on_progress(name, done + fraction * share)

            found[name] = maker.make(settings, advance)
            done += maker.share
        on_progress("the report", done)
    return found

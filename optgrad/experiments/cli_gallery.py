"""The command gallery: every method on eight landscapes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from optgrad.experiments import terminal


def gallery(  # noqa: PLR0917  typer reads the options from the signature
    output: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
    landscapes: Annotated[
        str | None,
        typer.Option(
            help="Some of rosenbrock, beale, saddle, narrow_valley, noisy_quadratic, plateau, "
            "styblinski_tang, goldstein_price, separated by commas; default: all."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names that 'optgrad list' shows, separated by commas; default: all."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier results folder.")] = False,
    quick: Annotated[
        bool, typer.Option(help="Few values and steps, to try it; the numbers mean little.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(help="An earlier gallery's folder: pictures and page are drawn anew."),
    ] = None,
) -> None:
    """Run every method on eight functions of two variables, tuned alike, and draw their paths.

    Example: optgrad gallery --landscapes rosenbrock,saddle --methods sgd,adam,bfgs
    """
    from optgrad.experiments import gallery as lib  # noqa: PLC0415
    from optgrad.experiments import results  # noqa: PLC0415

    progress = Progress(
        TextColumn("{task.description:32.32}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=terminal.console,
        transient=True,
    )
    task = progress.add_task("", total=1.0)

    def advance(share: float, what: str) -> None:
        progress.update(task, completed=share, description=what)

    with terminal.refusals(), progress:
        if draw is not None:
            if landscapes or methods or quick or overwrite:
                raise ValueError(
                    "--draw runs nothing: it accepts --output alone beside it, not --landscapes, "
                    "--methods, --quick or --overwrite"
                )
            folder = output or draw
            lib.draw(draw, folder, advance)
        else:
            folder = output or results.default_folder_of("gallery")
            settings = lib.QUICK if quick else lib.Settings()
            lib.make(folder, _names(methods), _names(landscapes), settings,
                     overwrite=overwrite, progress=advance)  # fmt: skip
    terminal.console.print(
        f"Page, pictures, numbers and report: {folder}", highlight=False, soft_wrap=True
    )


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]

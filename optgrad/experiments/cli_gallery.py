"""The command gallery: every method on eight landscapes."""

from pathlib import Path
from typing import Annotated

import typer

from optgrad.experiments import cli_names, terminal

LANDSCAPES = (
    "rosenbrock", "beale", "saddle", "narrow_valley", "noisy_quadratic", "plateau",
    "styblinski_tang", "goldstein_price",
)  # fmt: skip


def gallery(  # noqa: PLR0917  typer reads the options from the signature
    output: Annotated[Path | None, typer.Option(help="Results folder.", metavar="DIR")] = None,
    landscapes: Annotated[
        str | None,
        typer.Option(help=f"Some of {', '.join(LANDSCAPES)}; all by default.", metavar="A,B",
                     autocompletion=cli_names.listed(lambda: [*LANDSCAPES])),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Some of those of 'optgrad list'; all by default.", metavar="A,B",
                     autocompletion=cli_names.listed(cli_names.methods)),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier results folder.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few values and steps; the numbers mean little.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(help="Only draw the pictures of an earlier gallery again.",
                     metavar="DIR"),
    ] = None,
) -> None:  # fmt: skip
    """Run every method on eight functions of two variables, and draw it.

    All have the same number of trials, and are charged gradient equivalents.

    Writes pictures, animations, an interactive page, numbers and a report.

    Example: optgrad gallery
    Example: optgrad gallery --landscapes beale --methods sgd,adam,bfgs
    Example: optgrad gallery --draw docs/results/gallery --output pictures
    """
    from optgrad.experiments import gallery as lib  # noqa: PLC0415
    from optgrad.experiments import results  # noqa: PLC0415

    with terminal.refusals(), terminal.progress(1.0) as on_progress:

        def advance(share: float, what: str) -> None:
            on_progress(what, share)

        if draw is not None:
            if landscapes or methods or quick or overwrite:
                raise ValueError(
                    "--draw runs nothing: it accepts --output beside it, not --landscapes, "
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

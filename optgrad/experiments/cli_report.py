"""The command report: several studies in one page."""

from pathlib import Path
from typing import Annotated

import typer

from optgrad.experiments import terminal


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders that 'optgrad compare' wrote."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report.", metavar="DIR")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="TensorBoard event files, too.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier report.")
    ] = False,
) -> None:
    """Merge the results of comparisons into one page.

    Example: optgrad report results/one results/other --output page
    """
    from optgrad.experiments import (  # noqa: PLC0415
        across,
        event_files,
        merged_report,
        page,
        results,
        stored,
    )

    with terminal.refusals():
        page.check_installed()
        if tensorboard:
            event_files.check_installed()
        studies = stored.load_studies(folders)
        folder = output or results.default_folder_of("report")
        results.check_destination(folder, overwrite=overwrite)
        with terminal.progress() as on_progress:
            on_progress(f"page and pictures of {len(studies)} studies", 0)
            merged_report.write(studies, folder, tensorboard=tensorboard, overwrite=overwrite)
    header, rows = across.overview(studies)
    ends = [[row[0], *row[-2:]] for row in rows]
    terminal.console.print(terminal.table([header[0], *header[-2:]], ends))
    terminal.console.print(
        f"Page, Markdown and pictures: {folder}", highlight=False, soft_wrap=True
    )

"""MNIST for reproductions: taken where it is at hand, never downloaded; else a section says so."""

import matplotlib as mpl

from optgrad.experiments import data, plots
from optgrad.experiments.reproduce import Finding, Result, Settings, skipped_picture


def load(settings: Settings) -> data.Dataset:
    """MNIST, where it is at hand; nothing is downloaded.

    Raises:
      DataNotFoundError: if it is not.
    """
    return data.load("mnist", settings.data_dir, download=False)


def skipped(title: str, error: Exception) -> Result:
    """The section of a report without the data."""
    with mpl.rc_context(plots.STYLE):
        figure = skipped_picture("MNIST is not at hand")
    first = str(error).splitlines()[0]
    return Result(
        title=title,
        text=(
            "**Skipped: MNIST is not at hand.** Give the folder that holds its files by "
            "`--data-dir` or the environment variable `OPTGRAD_DATA_DIR`."
        ),
        figure=figure,
        rows=[{"status": "skipped"}],
        findings=[Finding("MNIST", "not in the paper", f"skipped: {first}", "not tried")],
    )

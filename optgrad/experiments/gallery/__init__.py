"""Every method on eight landscapes, tuned alike: numbers, pictures, a page to play with.

`make` runs all of it; `draw` draws pictures and page again from the numbers that are kept.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from optgrad.experiments import results
from optgrad.experiments.gallery import numbers as numbers_lib
from optgrad.experiments.gallery import page, pictures
from optgrad.experiments.gallery import report as report_lib
from optgrad.experiments.gallery.numbers import QUICK, Numbers, Progress, Settings

__all__ = ["QUICK", "Numbers", "Settings", "draw", "make", "page", "pictures"]

REPORT = "report.md"
_MEASURING = 0.75  # of the time of `make`


def _silent(share: float, what: str) -> None:
    del share, what


def make(
    folder: Path,
    methods: Sequence[str] = (),
    places: Sequence[str] = (),
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Numbers:
    """Runs methods on landscapes, and writes numbers, report, pictures and page, or nothing.

    Args:
      folder: where to.
      methods: names from the registry; default: all.
      places: names of landscapes; default: all.
      settings: how much is run; default: all of it.
      overwrite: whether an earlier results folder may be replaced.
      progress: is told the share that is done, and what that was.

    Raises:
      ResultsError: if the folder cannot or may not be written.
      ValueError: for an unknown name, with the nearest ones.
    """
    results.check_destination(folder, overwrite=overwrite)
    settings = settings or Settings()
    numbers = numbers_lib.measure(
        methods, places, settings, lambda share, what: progress(_MEASURING * share, what)
    )

    def write_files(prepared: Path) -> None:
        config = {
            "gallery": True,
            "quick": settings == QUICK,
            "landscapes": list(numbers.places),
            "methods": list(numbers.methods),
        }
        (prepared / results.MARKER).write_text(tomli_w.dumps(config), encoding="utf-8")
        numbers_lib.write(numbers, prepared)
        (prepared / REPORT).write_text(report_lib.markdown(numbers), encoding="utf-8")
        _draw_into(
            numbers_lib.read(prepared),  # as `draw` would
            prepared,
            lambda share, what: progress(_MEASURING + (1 - _MEASURING) * share, what),
        )

    results.write_folder(folder, write_files, overwrite=overwrite)
    return numbers


def draw(
    source_folder: Path,
    output_folder: Path,
    progress: Progress = _silent,
    formats: Sequence[str] = pictures.FORMATS,
) -> None:
    """Draws pictures and page from the numbers in a folder, without running anything.

    Args:
      source_folder: with ``summary.csv``, ``sensitivity.csv``, ``runs.npz`` and ``report.md``.
      output_folder: where pictures, page, and copies of these files are put; it may be the same.
      progress: is told the share that is done, and what that was.
      formats: of the pictures, of ``"png"`` and ``"svg"``; animations are GIF.

    Raises:
      ResultsError: if a file is missing.
    """
    source_folder, output_folder = Path(source_folder), Path(output_folder)
    numbers = numbers_lib.read(source_folder)
    output_folder.mkdir(parents=True, exist_ok=True)
    for name in (*numbers_lib.FILES, REPORT):
        if source_folder.resolve() != output_folder.resolve() and (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, output_folder / name)
    _draw_into(numbers, output_folder, progress, formats)


def _draw_into(
    numbers: Numbers,
    folder: Path,
    progress: Progress,
    formats: Sequence[str] = pictures.FORMATS,
) -> None:
    (folder / page.NAME).write_text(page.html(numbers), encoding="utf-8")
    pictures.write(numbers, folder, progress, formats)

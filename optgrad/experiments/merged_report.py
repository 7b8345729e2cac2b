"""The report of one or more studies: an HTML page, and Markdown with pictures for documents."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from optgrad.experiments import across, event_files, page, plots, report, results
from optgrad.experiments.stored import Study

_PICTURES = "figures"


def write(
    studies: Sequence[Study], folder: Path, *, tensorboard: bool = False, overwrite: bool = False
) -> None:
    """Writes the report's folder whole or not at all.

    Args:
      studies: under distinct names.
      folder: its place.
      tensorboard: whether event files of all runs are written too.
      overwrite: whether an earlier results folder may be replaced.

    Raises:
      ResultsError: if the folder cannot or may not be written.
      ImportError: without the extra that is needed.
    """
    if any(study.folder.resolve().is_relative_to(folder.resolve()) for study in studies):
        raise results.ResultsError(
            f"output = {folder} holds results that the report is about; accepted: another folder"
        )
    order = across.labels(studies)

    def write_files(prepared: Path) -> None:
        config = {"report": [str(study.folder) for study in studies]}
        (prepared / results.MARKER).write_text(tomli_w.dumps(config), encoding="utf-8")
        text = page.html(studies, _title(studies))
        (prepared / "report.html").write_text(text, encoding="utf-8")
        (prepared / "report.md").write_text(markdown(studies), encoding="utf-8")
        (prepared / _PICTURES).mkdir()
        for stem, study in zip(_stems(studies), studies, strict=True):
            for name, figure in plots.figures(study.comparison, order).items():
                plots.save(figure, prepared / _PICTURES / f"{stem}-{name}.svg")
            if tensorboard:
                event_files.write(study.comparison, prepared / event_files.FOLDER / stem)
        if found := across.all_profiles(studies):
            plots.save(plots.profiles(found, order), prepared / _PICTURES / "profiles.svg")

    results.write_folder(folder, write_files, overwrite=overwrite)


def _title(studies: Sequence[Study]) -> str:
    return report.title(studies[0].comparison) if len(studies) == 1 else f"{len(studies)} studies"


def _stems(studies: Sequence[Study]) -> list[str]:
    """What the names of each study's files begin with."""
    names = (re.sub(r"[^\w.-]+", "_", study.folder.resolve().name) for study in studies)
    return [f"{i}-{name}" for i, name in enumerate(names, 1)]


def markdown(studies: Sequence[Study]) -> str:
    """The report in Markdown; its pictures are in the folder ``figures`` beside it."""
    lines = [f"# {_title(studies)}", ""]
    if len(studies) > 1:
        lines += _together(studies)
    if found := across.all_profiles(studies):
        lines += ["## Performance profiles", "", f"![profiles]({_PICTURES}/profiles.svg)", ""]
        lines += [f"{across.instances(one)}\n" for one in found] + [across.PROFILES, ""]
    for stem, study in zip(_stems(studies), studies, strict=True):
        lines += [f"## {study.name}", ""]
        pictures = f"{_PICTURES}/{stem}-"
        lines += report.section(study.comparison, study.environment, pictures, "###")
    command = shlex.join(["optgrad", "report", *(str(study.folder) for study in studies)])
    lines += ["Made with:", "", "```", command, "```", ""]
    return report.without_html(lines)


def _together(studies: Sequence[Study]) -> list[str]:
    lines = ["## All studies", ""]
    for table in (across.overview(studies), across.results(studies)):
        lines += [report.markdown_table(*table), ""]
    if len((ranks := across.mean_ranks(studies))[1]) > 1:
        lines += ["### Mean ranks", "", report.markdown_table(*ranks), "", across.RANKS, ""]
    return [*lines, across.not_common(studies), ""]

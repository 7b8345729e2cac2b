"""Reproductions of papers' figures and tables, by name; ``optgrad reproduce`` runs them.

A reproduction is a module of this package with a `Reproduction` called ``REPRODUCTION`` in it. Its
figures are functions that compute, draw and judge: everything that a `Result` holds follows from
the numbers that were measured, the verdicts included.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from optgrad.core import checks

_MODULES = {  # name on the command line -> module
    "dissecting-adam": "dissecting_adam",
    "online-parabola": "online_parabola",
    "step-size-planning": "step_size_planning",
    "survey-slides": "survey_slides",
}

ALL = "all"  # on the command line: every figure
Progress = Callable[[float], None]  # called with the fraction of a figure that is done


@dataclasses.dataclass(frozen=True)
class Settings:
    """How thoroughly and from what.

    Attributes:
      quick: seconds instead of minutes, for tests; the numbers then mean little.
      data_dir: folder with the data sets.
      scale: how much of a paper's budget, one of the reproduction's scales.
    """

    quick: bool = False
    data_dir: Path | None = None
    scale: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One number or statement of the paper beside what was measured."""

    statement: str
    reference: str  # what the paper or the specification has
    measured: str
    verdict: str  # "holds", "does not hold", "within a factor …"


@dataclasses.dataclass(frozen=True)
class Result:
    """One reproduced figure or table.

    Attributes:
      title: heading of its section in the report.
      text: what was done, in words, as Markdown.
      figure: the picture.
      rows: the numbers behind it, records with the same keys.
      findings: paper beside measurement.
      tables: further tables for the report, (header, rows) of strings.
    """

    title: str
    text: str
    figure: Figure
    rows: Sequence[Mapping[str, Any]]
    findings: Sequence[Finding]
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()


@dataclasses.dataclass(frozen=True)
class FigureMaker:
    """A function that reproduces one figure or table.

    Attributes:
      title: one line for menus.
      make: computes and draws it.
      share: its part of the work of all, for the progress bar; roughly seconds.
    """

    title: str
    make: Callable[[Settings, Progress], Result]
    share: float


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """Everything that is reproduced of one paper.

    Attributes:
      name: on the command line.
      title: of the report.
      reference: the paper.
      figures: name -> what makes it, in the paper's order.
      scales: budgets that it can be run with -> what the report says about them.
    """

    name: str
    title: str
    reference: str
    figures: Mapping[str, FigureMaker]
    scales: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"cpu": ""})

    def select(self, names: Sequence[str]) -> dict[str, FigureMaker]:
        """The named figures in the paper's order, all without names or with ``"all"``.

        Raises:
          ValueError: for an unknown figure, with the nearest names.
        """
        for name in names:
            checks.check_one_of("figure", name, (*self.figures, ALL))
        wanted = self.figures if not names or ALL in names else names
        return {k: v for k, v in self.figures.items() if k in wanted}

    def check_settings(self, settings: Settings) -> None:
        """Refuses a scale that this reproduction does not have.

        Raises:
          ValueError: naming the scales that it has.
        """
        checks.check_one_of("scale", settings.scale, self.scales)
        if settings.quick and settings.scale != "cpu":
            raise ValueError(
                f"scale = {settings.scale!r} and quick exclude each other; accepted: one of them"
            )


def reproductions() -> tuple[str, ...]:
    """Names of all reproductions.

    Examples:
      >>> reproductions()
      ('dissecting-adam', 'online-parabola', 'step-size-planning', 'survey-slides')
    """
    return tuple(_MODULES)


def get_reproduction(name: str) -> Reproduction:
    """A reproduction by name.

    Raises:
      ValueError: for an unknown name, with the nearest ones.

    Examples:
      >>> sorted(get_reproduction("online-parabola").figures)[:2]
      ['beale3d', 'curvature']
    """
    checks.check_one_of("paper", name, _MODULES)
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    found: Reproduction = module.REPRODUCTION
    return found


def skipped_picture(reason: str) -> Figure:
    """Stands for a figure that could not be made."""
    figure = Figure(figsize=(6, 1.2))
    figure.text(0.5, 0.5, f"skipped: {reason}", ha="center", va="center")
    return figure


def ratio_verdict(measured: float, reference: float, factor: float) -> str:
    """Whether two positive numbers agree within a factor, and by how much they differ.

    Examples:
      >>> ratio_verdict(1.2, 1.0, factor=1.5)
      'agrees within a factor 1.5 (1.20)'
      >>> ratio_verdict(0.1, 1.0, factor=1.5)
      'does not agree: 0.10 of the reference'
    """
    ratio = measured / reference
    if 1 / factor <= ratio <= factor:
        return f"agrees within a factor {factor:g} ({ratio:.2f})"
    return f"does not agree: {ratio:.2f} of the reference"


def verdict(holds: bool) -> str:
    """In words.

    Examples:
      >>> verdict(True), verdict(False)
      ('holds', 'does not hold')
    """
    return "holds" if holds else "does not hold"

"""The report of several studies as one HTML page, which needs nothing beside it."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from optgrad.experiments import across, plots, profiles, report, search_space, statistics, tuning
from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.results import plain_json
from optgrad.experiments.stored import Study

_TEMPLATES = Path(__file__).parent / "templates"
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
FINAL = "final runs"


def check_installed() -> None:
    """Raises an ImportError that names the extra, if the page cannot be made."""
    for name in ("jinja2", "plotly"):
        _import(name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the report needs {name}, which is not installed; "
            'install it with: pip install "optgrad[report]"'
        ) from error


def html(studies: Sequence[Study], title: str) -> str:
    """The page: tables, and pictures that are drawn when it is opened.

    Args:
      studies: under distinct names.
      title: of the page.

    Raises:
      ImportError: without the extra ``report``.
    """
    jinja2, plotly = _import("jinja2"), _import("plotly.offline")
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    found = across.all_profiles(studies)
    text: str = environment.get_template("report.html").render(
        title=title,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=(_TEMPLATES / "report.js").read_text(encoding="utf-8"),
        plotly=plotly.get_plotlyjs(),
        data=plain_json(_drawn(studies, found)),
        across=across,
        report=report,
        rule=statistics.RULE,
        studies=studies,
        profiles=found,
    )
    return text


def _drawn(studies: Sequence[Study], found: Sequence[profiles.Profiles]) -> dict[str, Any]:
    """The numbers that the page's script draws; labels are plain text."""
    order = across.labels(studies)
    return {
        "looks": {label: _look(order.index(label)) for label in order},
        "studies": [_study(study.comparison) for study in studies],
        "profiles": [
            {
                "cost": one.cost,
                "lines": [
                    {"label": k, "x": p.factors.tolist(), "y": p.shares.tolist()}
                    for k, p in one.profiles.items()
                ],
            }
            for one in found
        ],
    }


def _look(index: int) -> dict[str, str]:
    look = plots.look(index)
    return {"color": look["color"], "dash": _DASHES[look["linestyle"]]}


def _study(comparison: Comparison) -> dict[str, Any]:
    score, select_by = comparison.score, comparison.config.tuning.select_by
    metrics = comparison.outcomes[0].tuned.stages[0].history.metrics
    first = [score.name, *(name for name in metrics if name != score.name)]
    return {
        "metrics": [{"key": name, "title": _heading(name, comparison)} for name in first],
        "stages": {
            stage: {name: list(_lines(comparison, stage, name)) for name in first}
            for stage in _stages(comparison)
        },
        "target": comparison.target * _unit(score.name, comparison),
        "score": score.name,
        "sensitivity": {
            "title": f"best {_heading(select_by, comparison)}",
            "lines": list(_sensitivity(comparison)),
            "log": not _in_percent(select_by, comparison),
        },
    }


def _stages(comparison: Comparison) -> list[str]:
    names = [stage.name for o in comparison.outcomes for stage in o.stages]
    return [FINAL, *dict.fromkeys(name for name in names if name != "replication")]


def _lines(comparison: Comparison, stage: str, metric: str) -> Iterator[dict[str, Any]]:
    """One line for each optimizer and value that has runs which did not diverge."""
    unit = _unit(metric, comparison)
    for outcome in comparison.outcomes:
        for point, runs in _runs(outcome, stage):
            if band := plots.band(runs.history, metric):
                yield {
                    "label": outcome.config.label,
                    "name": ", ".join(map(search_space.text, point)),
                    "chosen": point in ((), tuple(outcome.tuned.chosen.values())),
                    **_numbers(band, unit),
                }


def _runs(outcome: Outcome, stage: str) -> Iterator[tuple[tuple[Any, ...], tuning.Stage]]:
    """Values of what was tuned, () where nothing was, and their runs in a stage."""
    if stage == FINAL:
        found = [outcome.tuned.final] if outcome.tuned.final else []
    else:
        found = [one for one in outcome.stages if one.name == stage]
    for one in found:
        # NaN, which is not equal to itself, stands where nothing is tuned.
        points = [() if point[0] != point[0] else point for point in one.points]
        for point in dict.fromkeys(points):
            yield point, tuning.runs_where(one, np.array([other == point for other in points]))


def _sensitivity(comparison: Comparison) -> Iterator[dict[str, Any]]:
    select_by = comparison.config.tuning.select_by
    for outcome in comparison.outcomes:
        band = plots.tried(outcome, select_by, comparison.score)
        if band is not None and band.places.dtype != object:  # its axis is one of numbers
            numbers = _numbers(band, _unit(select_by, comparison))
            best = outcome.tuned.best
            yield {"label": outcome.config.label, "best": best, **numbers}


def _numbers(band: plots.Band, unit: float) -> dict[str, Any]:
    return {
        "x": band.places.tolist(),
        "y": (unit * band.mean).tolist(),
        "sd": (unit * band.sd).tolist(),
        "runs": band.runs,
    }


def _in_percent(metric: str, comparison: Comparison) -> bool:
    return comparison.score.in_percent and metric.endswith(f"_{comparison.score.metric}")


def _unit(metric: str, comparison: Comparison) -> float:
    return 100.0 if _in_percent(metric, comparison) else 1.0


def _heading(metric: str, comparison: Comparison) -> str:
    unit = " [%]" if _in_percent(metric, comparison) else ""
    return metric.replace("_", " ").replace("train ", "training ") + unit

"""Studies read back from the results folders that ``optgrad compare`` wrote."""

import csv
import dataclasses
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optgrad.experiments import checkpoint, tuning
from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.config import OptimizerConfig, load_config
from optgrad.experiments.engine import History
from optgrad.experiments.results import FORMAT, MARKER, METRICS, SUMMARY, ResultsError
from optgrad.experiments.scores import Score

_KEYS = ("optimizer", "stage", "value", "seed", "step", "diverged_at")
_HYPERPARAMS = "hyperparams."  # columns of further tuned ones; the rest are metrics


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison from a results folder.

    Attributes:
      name: of the problem, with the folder's where several have the same.
      folder: where it was read.
      comparison: as it was when it was written, except that the wall time of all stages of an
        optimizer is on the first one.
      environment: versions and device that it was measured with.
    """

    name: str
    folder: Path
    comparison: Comparison
    environment: Mapping[str, str]


def load_studies(folders: Sequence[Path]) -> list[Study]:
    """The studies in results folders, under distinct names.

    Raises:
      ResultsError: a folder that is given twice, or cannot be read as results.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [f for f, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ResultsError(f"folder = {twice[0]} is given twice; accepted: distinct results")
    studies = [load_study(folder) for folder in folders]
    names = _distinct_names([study.name for study in studies], places)
    return [dataclasses.replace(s, name=name) for s, name in zip(studies, names, strict=True)]


def load_study(folder: Path) -> Study:
    """The study in a results folder.

    Raises:
      ResultsError: it is none, unfinished, of another version, or damaged.
    """
    _check_is_results(folder)
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            version = found.get("format") if isinstance(found, dict) else None
            raise ResultsError(
                f"{folder / SUMMARY} was written by another version of optgrad: format = "
                f"{version}; accepted: {FORMAT}. Repeat it: optgrad compare --config "
                f"{folder / MARKER}"
            )
        comparison = _comparison(folder, found)
    except KeyError as error:
        raise ResultsError(f"{folder} cannot be read as results: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ResultsError(f"{folder} cannot be read as results: {error}") from error
    return Study(comparison.problem, folder, comparison, found["environment"])


def _check_is_results(folder: Path) -> None:
    finished = folder.with_name(folder.name.removesuffix(checkpoint.SUFFIX))
    partial = checkpoint.partial_folder(folder)
    if partial.is_dir() and (folder == partial or not folder.exists()):
        raise ResultsError(
            f"folder = {folder} is unfinished; go on with it: optgrad resume {finished}"
        )
    if not folder.is_dir():
        raise ResultsError(f"folder = {folder} is no folder; accepted: what optgrad compare wrote")
    if not (folder / SUMMARY).is_file():
        kind = "no results of optgrad compare"
        if (folder / MARKER).is_file() and (reproduced := _reproduction(folder / MARKER)):
            kind = f"a reproduction ({reproduced}) and " + kind
        raise ResultsError(f"folder = {folder} holds {kind}: there is no {SUMMARY}")


def _reproduction(path: Path) -> str:
    try:
        return str(tomllib.loads(path.read_text(encoding="utf-8")).get("reproduce", ""))
    except (OSError, ValueError):
        return ""


def _distinct_names(names: Sequence[str], places: Sequence[Path]) -> list[str]:
    """Each name, with as many last parts of its folder as tell equal ones apart."""
    found = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        for depth in range(1, 1 + max(len(places[i].parts) for i in same)):
            tails = ["/".join(places[i].parts[-depth:]) for i in same]
            if len(set(tails)) == len(tails):
                break
        for i, tail in zip(same, tails, strict=True):
            found[i] = f"{name} ({tail})"
    return found


def _comparison(folder: Path, found: Mapping[str, Any]) -> Comparison:
    config = load_config(folder / MARKER)  # a user's problem is the copy beside it, and is not run
    stages = _stages(folder / METRICS)
    summary = {row["optimizer"]: row for row in found["summary"]}
    score = Score(**found["score"])
    outcomes = tuple(_outcome(o, summary[o.label], stages[o.label]) for o in config.optimizers)
    if not config.tuning.select_by:  # of another problem it is resolved with the problem
        raise ValueError("tuning.select_by is missing in its configuration")
    return Comparison(config, str(found["problem"]), outcomes, float(found["target"]), score)


def _outcome(
    config: OptimizerConfig, row: Mapping[str, Any], stages: Sequence[tuning.Stage]
) -> Outcome:
    first = stages[0]
    history = first.history._replace(seconds=float(row["training_seconds"]))
    stages = (dataclasses.replace(first, history=history), *stages[1:])
    published = next((stage for stage in stages if stage.name == "published"), None)
    stages = tuple(stage for stage in stages if stage is not published)
    final = next((stage for stage in stages if stage.name == "replication"), None)
    if final is None and row["best"] is not None:  # of a grid
        final = tuning.runs_at(stages[-1], row["best"])
    tuned = tuning.Tuned(
        row["tuned"] or None, row["best"], row["at_edge"], stages, final, row["others"]
    )
    seconds, compiling = float(row["training_seconds"]), float(row["compile_seconds"])
    return Outcome(
        config, tuned, int(row["compilations"]), seconds, compiling, row["seconds_per_step"],
        published, (row["notes"],) if row["notes"] else (),
    )  # fmt: skip


def _stages(path: Path) -> dict[str, list[tuning.Stage]]:
    """Optimizer -> its stages in order; those of one name that follow each other are one."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    if not rows:
        raise ValueError(f"{path.name} is empty")
    stages: dict[str, list[tuning.Stage]] = {}
    for (label, name, _), runs in itertools.groupby(_runs(rows), _batch_of):
        stages.setdefault(label, []).append(_stage(name, list(runs)))
    return stages


Run = list[dict[str, str]]  # its rows, one for each evaluation


def _runs(rows: Sequence[dict[str, str]]) -> Iterator[Run]:
    """The rows of one run after the other; each begins at step 0."""
    run: Run = []
    for row in rows:
        if run and int(row["step"]) <= int(run[-1]["step"]):
            yield run
            run = []
        run.append(row)
    yield run


def _batch_of(run: Run) -> tuple[str, str, tuple[str, ...]]:
    return run[0]["optimizer"], run[0]["stage"], tuple(row["step"] for row in run)


def _stage(name: str, runs: Sequence[Run]) -> tuning.Stage:
    # Columns of what other optimizers tune are empty.
    others = [k for k, text in runs[0][0].items() if k.startswith(_HYPERPARAMS) and text]
    metrics = [k for k in runs[0][0] if k not in _KEYS and not k.startswith(_HYPERPARAMS)]
    history = History(
        np.array([int(row["step"]) for row in runs[0]]),
        {m: np.array([[float(row[m]) for row in run] for run in runs]) for m in metrics},
        np.array([int(run[-1]["diverged_at"]) for run in runs]),
        math.nan,
    )
    seeds = np.array([int(run[0]["seed"]) for run in runs])
    values, *further = (
        tuning.column([_value(run[0][k]) for run in runs]) for k in ("value", *others)
    )
    names = [k.removeprefix(_HYPERPARAMS) for k in others]
    return tuning.Stage(name, values, seeds, history, dict(zip(names, further, strict=True)))


def _value(text: str) -> Any:
    """A hyperparameter's value, of the type that it had."""
    for read in (int, float, {"True": True, "False": False}.__getitem__):
        try:
            return read(text)
        except (ValueError, KeyError):
            continue
    return text

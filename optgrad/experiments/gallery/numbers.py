"""The numbers behind the gallery: runs are made, values chosen, and all of it kept in a folder.

``summary.csv`` has what each method reached, ``sensitivity.csv`` what each tried value did, and
``runs.npz`` the paths. Pictures and page are drawn from these three files alone.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import optgrad
from optgrad import registry
from optgrad.core import checks
from optgrad.experiments import results
from optgrad.experiments.gallery import places as places_lib
from optgrad.experiments.gallery import runs as runs_lib
from optgrad.experiments.gallery.places import NOISES, Float, Place

SUMMARY, SENSITIVITY, RUNS = "summary.csv", "sensitivity.csv", "runs.npz"
FILES = (SUMMARY, SENSITIVITY, RUNS)
WORST = 12.0  # log₁₀ excess of a run that diverged
MISSING = -(2**15)  # in place of a position that is not finite, or not there
UNIT = 2**13  # positions are rounded to that many parts of what is shown
_REACH = 2**14  # and are moved to that distance from it where they are further away
STEP = 0.1  # log₁₀ excesses are rounded to
_NONE = 255  # in place of a log₁₀ excess that is not there
_TIE = 1e-9

Progress = Callable[[float, str], None]
Array = npt.NDArray[Any]
Row = Mapping[str, Any]  # of the summary


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
      budgets: gradient equivalents, ascending.
      shown: the budget of the paths in the pictures, one of them.
      values: how many are tried of what a method tunes.
      starts: of tuning, and as many held-out ones.
      looks: times at which positions are kept, at most; beside them the budgets.
    """

    budgets: tuple[int, ...] = (30, 100, 300, 1000)
    shown: int = 300
    values: int = runs_lib.VALUES
    starts: int = 5
    looks: int = 64

    @property
    def times(self) -> Float:
        """Gradient equivalents at which positions are kept: 0, powers of a factor, the budgets."""
        spread = np.round(np.geomspace(1, self.budgets[-1], self.looks))
        return np.unique(np.concatenate([[0.0], spread, self.budgets]))


FULL = Settings()
QUICK = Settings(budgets=(10, 30), shown=30, values=5, starts=2)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """All numbers of a gallery of L landscapes and M methods.

    Attributes:
      settings: how much was run.
      places: names of the landscapes.
      methods: name -> ``family``, ``title`` and ``tunes``, the hyperparameter or an empty string.
      left_out: (landscape, method) -> why.
      environment: in which it was run.
      summary: rows of ``summary.csv``.
      values: what was tried, NaN behind the last, shape (M, V).
      tuned: mean log₁₀ excess over tuning starts, NaN where left out, shape (L, M, V, budgets).
      positions: see `unrounded`; from the named start at each noise, int16, shape
        (L, M, V, noises, times, 2).
      excesses: log₁₀ excess there, see `log_excess`, uint8, shape (L, M, V, noises, times).
      paths: every position until ``settings.shown``, with the value that was chosen for it, from
        the named start, int16, shape (L, M, shown + 1, 2).
    """

    settings: Settings
    places: tuple[str, ...]
    methods: Mapping[str, Mapping[str, str]]
    left_out: Mapping[tuple[str, str], str]
    environment: Mapping[str, str]
    summary: Sequence[Mapping[str, Any]]
    values: Float
    tuned: Float
    positions: Array
    excesses: Array
    paths: Array

    @property
    def families(self) -> tuple[str, ...]:
        """Of the methods, in the registry's order."""
        return tuple(dict.fromkeys(m["family"] for m in self.methods.values()))

    def of_family(self, family: str) -> list[str]:
        """Its methods' names."""
        return [name for name, m in self.methods.items() if m["family"] == family]

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, str, int], Mapping[str, Any]]:
        return {(r["landscape"], r["method"], r["budget"]): r for r in self.summary}

    def row(self, place: str, method: str, budget: int) -> Mapping[str, Any] | None:
        """The row of the summary; None where the method was left out."""
        return self._rows.get((place, method, budget))

    def chosen(self, place: str, method: str, budget: int) -> int | None:
        """The number of the chosen value; None where the method was left out."""
        row = self.row(place, method, budget)
        if row is None:
            return None
        tried = self.values[list(self.methods).index(method)]
        return int(np.nanargmin(np.abs(tried - row["value"]))) if row["value"] is not None else 0

    def path(self, place: str, method: str) -> Float:
        """The shown path, shape (steps + 1, 2); NaN from where it was not finite."""
        index = self.places.index(place), list(self.methods).index(method)
        return unrounded(self.paths[index], _view(place))

    def shown_excess(self, place: str, method: str) -> float:
        """log₁₀ excess at the end of the shown path, rounded to 0.1."""
        where = self.places.index(place), list(self.methods).index(method)
        chosen = self.chosen(place, method, self.settings.shown)
        time = list(self.settings.times).index(self.settings.shown)
        found = self.excesses[(*where, chosen, places_lib.places()[place].own_noise, time)]
        return float(log_excess(found))


# Rounding ---------------------------------------------------------------------------------------


def rounded(points: Float, view: Any) -> Array:
    """Positions (…, 2) as int16: 0 and 8192 are the edges of what is shown."""
    low, high = np.array(view).T
    with np.errstate(all="ignore"):
        scaled = (np.asarray(points, float) - low) / (high - low) * UNIT
        kept = np.clip(np.round(scaled), -_REACH, UNIT + _REACH - 1)
    lost = ~np.isfinite(scaled).all(axis=-1, keepdims=True)
    return np.where(lost, MISSING, np.nan_to_num(kept)).astype(np.int16)


def unrounded(positions: Array, view: Any) -> Float:
    """The positions again, up to rounding; NaN where there is none."""
    low, high = np.array(view).T
    found = low + positions.astype(float) / UNIT * (high - low)
    return np.where(positions == MISSING, np.nan, found)


def _rounded_excess(log_excess: Float) -> Array:
    return np.round((np.asarray(log_excess) + WORST) / STEP).astype(np.uint8)


def log_excess(codes: Array) -> Float:
    """log₁₀ excess from what is kept of it; NaN where it is not there."""
    return np.where(codes == _NONE, np.nan, codes * STEP - WORST)


def _view(place: str) -> Any:
    return places_lib.places()[place].view


# Runs -------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a method did on one landscape; see `Numbers`."""

    tuned: Float  # shape (V, budgets)
    rows: list[dict[str, Any]]
    positions: Array
    excesses: Array
    path: Array


def measure(
    method_names: Sequence[str] = (),
    place_names: Sequence[str] = (),
    settings: Settings = FULL,
    progress: Progress = lambda share, what: None,
) -> Numbers:
    """Runs methods on landscapes.

    Args:
      method_names: registered methods; default: all.
      place_names: landscapes; default: all.
      settings: how much.
      progress: is told the share that is done, and which method that was.

    Raises:
      ValueError: for an unknown name, with the nearest ones.
    """
    methods = _chosen("method", method_names, {m.name: m for m in optgrad.methods()})
    places = _chosen("landscape", place_names, places_lib.places())
    with concurrent.futures.ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        tasks = {
            pool.submit(run_method, method, places, settings): method.name for method in methods
        }
        try:
            for done, task in enumerate(concurrent.futures.as_completed(tasks), start=1):
                task.result()
                progress(done / len(tasks), tasks[task])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    by_method = {name: task.result() for task, name in tasks.items()}
    shape = (len(places), len(methods), settings.values)
    times, noises = len(settings.times), len(NOISES)
    found = Numbers(
        settings=settings,
        places=tuple(p.name for p in places),
        methods={
            m.name: {
                "family": m.family,
                "title": m.title,
                "tunes": m.tunes.hyperparameter if m.tunes else "",
            }
            for m in methods
        },
        left_out={
            (p.name, m.name): reason
            for p in places
            for m in methods
            if (reason := runs_lib.reason_left_out(m, p))
        },
        environment=results.describe_environment(),
        summary=[
            row
            for p in places
            for m in methods
            if p.name in by_method[m.name]
            for row in by_method[m.name][p.name].rows
        ],
        values=np.stack([_padded(runs_lib.tried_values(m, settings.values), settings.values)
                         for m in methods]),
        tuned=np.full((*shape, len(settings.budgets)), np.nan),
        positions=np.full((*shape, noises, times, 2), MISSING, np.int16),
        excesses=np.full((*shape, noises, times), _NONE, np.uint8),
        paths=np.full((*shape[:2], settings.shown + 1, 2), MISSING, np.int16),
    )  # fmt: skip
    for j, method in enumerate(methods):
        for i, place in enumerate(places):
            if (one := by_method[method.name].get(place.name)) is not None:
                count = len(one.tuned)
                found.tuned[i, j, :count] = one.tuned
                found.positions[i, j, :count] = one.positions
                found.excesses[i, j, :count] = one.excesses
                found.paths[i, j, : len(one.path)] = one.path
    return found


def _chosen(name: str, wanted: Sequence[str], known: Mapping[str, Any]) -> tuple[Any, ...]:
    for one in wanted:
        checks.check_one_of(name, one, known)
    return tuple(x for key, x in known.items() if key in wanted or not wanted)


def _padded(values: Float, length: int) -> Float:
    return np.pad(values, (0, length - len(values)), constant_values=np.nan)


def run_method(
    method: registry.Method, places: Sequence[Place], settings: Settings
) -> dict[str, Found]:
    """Landscape -> what the method did there, of those on which it can be run."""
    able = tuple(p for p in places if not runs_lib.reason_left_out(method, p))
    if not able:
        return {}
    program = runs_lib.Program(method, able)
    values = runs_lib.tried_values(method, settings.values)
    return {p.name: _run(program, method, p, values, settings) for p in able}


def _run(
    program: runs_lib.Program,
    method: registry.Method,
    place: Place,
    values: Float,
    settings: Settings,
) -> Found:
    """Tuning starts, held-out ones, and the named start at all noises, in this order."""
    count, budget = settings.starts, settings.budgets[-1]
    own = place.noises[place.own_noise]
    made = [
        (place.starts(count, "tuning"), runs_lib.noises(place, "tuning", count, budget, own)),
        (place.starts(count, "held-out"), runs_lib.noises(place, "held-out", count, budget, own)),
        *(
            (np.array([place.start], np.float32),
             runs_lib.noises(place, "shown", 1, budget, deviation))
            for deviation in place.noises
        ),
    ]  # fmt: skip
    starts, noise = (np.concatenate(part) for part in zip(*made, strict=True))
    runs = program.run(place.name, values, starts, noise, budget)
    budgets = np.array(settings.budgets)
    ends, steps = place.log_excess(runs.at(budgets)), runs.steps_within(budgets)
    tuned = ends[:, :count].mean(axis=1)
    chosen = [best(tuned[:, k]) for k in range(len(budgets))]
    held_out = slice(count, 2 * count)
    rows = [
        {
            "landscape": place.name,
            "method": method.name,
            "budget": int(budgets[k]),
            "hyperparameter": method.tunes.hyperparameter if method.tunes else "",
            "value": float(f"{values[i]:.6g}") if method.tunes else None,
            "edge": bool(method.tunes) and i in (0, len(values) - 1),
            "tuning_log10_excess": _short(tuned[i, k]),
            "log10_excess": _short(ends[i, held_out, k].mean()),
            "spread": _short(ends[i, held_out, k].std(ddof=1)) if count > 1 else 0.0,
            "diverged": int(np.sum(ends[i, held_out, k] == WORST)),
            "steps": round(float(steps[i, held_out, k].mean()), 1),
        }
        for k, i in enumerate(chosen)
    ]
    at_times = runs.at(settings.times)[:, 2 * count :]
    positions, excesses = rounded(at_times, place.view), _rounded_excess(place.log_excess(at_times))
    if runs_lib.is_blind_to_noise(method, place):
        noisy = np.array(place.noises) > 0
        positions[:, noisy], excesses[:, noisy] = MISSING, _NONE
    shown = chosen[settings.budgets.index(settings.shown)]
    run = 2 * count + place.own_noise
    length = int(runs.steps_within(np.array([settings.shown]))[shown, run, 0])
    path = np.concatenate([starts[run : run + 1], runs.points[shown, run, :length]])
    return Found(tuned, rows, positions, excesses, rounded(path, place.view))


def best(tuned: Float) -> int:
    """The number of the lowest entry; the middle one of several that are equal."""
    ties = np.flatnonzero(tuned <= np.min(tuned) + _TIE)
    return int(ties[(len(ties) - 1) // 2])


def value_text(value: float) -> str:
    """Two digits of a tried value.

    Examples:
      >>> value_text(316.2), value_text(0.00316)
      ('320', '0.0032')
    """
    return f"{float(f'{value:.2g}'):g}"


def _short(number: Any) -> float:
    return round(float(number), 3)


# The folder -------------------------------------------------------------------------------------


def write(numbers: Numbers, folder: Path) -> None:
    """Writes `FILES`."""
    results.write_csv(folder / SUMMARY, numbers.summary)
    results.write_csv(folder / SENSITIVITY, list(_sensitivity_rows(numbers)))
    settings = dataclasses.asdict(numbers.settings)
    about = {
        "settings": settings,
        "places": numbers.places,
        "methods": numbers.methods,
        "left_out": [[*key, reason] for key, reason in numbers.left_out.items()],
        "environment": numbers.environment,
    }
    np.savez_compressed(
        folder / RUNS,
        about=np.array(json.dumps(about)),
        values=numbers.values,
        positions=packed(numbers.positions),
        excesses=differences(numbers.excesses, axis=-1),
        paths=packed(numbers.paths),
    )


def read(folder: Path) -> Numbers:
    """What `write` wrote.

    Raises:
      ResultsError: if a file is missing.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise results.ResultsError(
            f"{folder} has no {', '.join(missing)}; accepted: a folder that 'optgrad gallery' wrote"
        )
    with np.load(folder / RUNS) as file:
        about = json.loads(str(file["about"]))
        arrays = {name: file[name] for name in ("values", "positions", "excesses", "paths")}
    settings = Settings(**{**about["settings"], "budgets": tuple(about["settings"]["budgets"])})
    places, methods = tuple(about["places"]), about["methods"]
    rows = read_rows(folder / SENSITIVITY)
    tuned = np.full((len(places), len(methods), settings.values, len(settings.budgets)), np.nan)
    counts: dict[tuple[int, int], int] = {}
    order = {name: j for j, name in enumerate(methods)}
    for row in rows:  # in the order of the values
        at = places.index(row["landscape"]), order[row["method"]]
        number = counts.setdefault(at, 0)
        tuned[(*at, number)] = [row[f"log10_excess_{budget}"] for budget in settings.budgets]
        counts[at] += 1
    return Numbers(
        settings=settings,
        places=places,
        methods=methods,
        left_out={(place, method): why for place, method, why in about["left_out"]},
        environment=about["environment"],
        summary=read_rows(folder / SUMMARY),
        values=arrays["values"],
        tuned=tuned,
        positions=unpacked(arrays["positions"]),
        excesses=np.cumsum(arrays["excesses"], axis=-1, dtype=np.uint8),
        paths=unpacked(arrays["paths"]),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV with numbers as numbers, and None where there is nothing."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: _parsed(k, text) for k, text in row.items()} for row in csv.DictReader(file)]


def _parsed(column: str, text: str) -> Any:
    if column in {"landscape", "method", "hyperparameter"}:
        return text
    if column == "edge":
        return text == "True"
    if column in {"budget", "diverged"}:
        return int(text)
    return float(text) if text else None


def _sensitivity_rows(numbers: Numbers) -> Iterator[dict[str, Any]]:
    for i, place in enumerate(numbers.places):
        for j, method in enumerate(numbers.methods):
            for value, reached in zip(numbers.values[j], numbers.tuned[i, j], strict=True):
                if not np.isnan(reached[0]):
                    yield {
                        "landscape": place,
                        "method": method,
                        "value": None if math.isnan(value) else float(f"{value:.6g}"),
                        **{
                            f"log10_excess_{budget}": _short(x)
                            for budget, x in zip(numbers.settings.budgets, reached, strict=True)
                        },
                    }


def packed(positions: Array) -> Array:
    """int16 of shape (…, times, 2) as uint8 (2, …): differences in time, low and high bytes apart.

    So they are compressed best.
    """
    changes = differences(positions.view(np.uint16), axis=-2)
    return np.stack([(changes & 255).astype(np.uint8), (changes >> 8).astype(np.uint8)])


def unpacked(planes: Array) -> Array:
    """What was `packed`."""
    differences = planes[0].astype(np.uint16) | (planes[1].astype(np.uint16) << 8)
    return np.cumsum(differences, axis=-2, dtype=np.uint16).view(np.int16)


def differences(numbers: Array, axis: int) -> Array:
    """From one entry to the next, the first as it is; modulo the type's range."""
    first = np.take(numbers, [0], axis=axis)
    return np.concatenate([first, np.diff(numbers, axis=axis)], axis=axis)

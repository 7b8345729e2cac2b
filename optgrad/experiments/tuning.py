"""Tuning and replication: which value of the learning rate, and how good it is over seeds.

The protocol is that of Balles & Hennig, appendix A.2: find the largest stable learning rate, search
downwards over two decades at 6, 3, 1 × 10^m, replicate the best over several seeds. Two things
differ, because picking by test accuracy leaks: the default picks by a validation split, and the
replications use seeds that the tuning has not seen.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from optgrad.experiments import checkpoint, search_space
from optgrad.experiments.engine import History, Runs, Trainer
from optgrad.experiments.scores import ACCURACY, Score

MANTISSAS = (6.0, 3.0, 1.0)
_BATCH_NOISE = 0.05  # relative, of the loss of one batch before training

OnInterval = Callable[[str, Mapping[str, Any]], None]  # stage, record


@dataclasses.dataclass(frozen=True)
class Stage:
    """One batch of runs: what for, which runs, and what they did."""

    name: str  # "stability", "tuning" or "replication"
    values: np.ndarray  # tuned hyperparameter of each run [R]; NaN where nothing is tuned
    seeds: np.ndarray  # [R]
    history: History
    others: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # Further tuned hyperparameters, by name, each [R].

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """Of each run the values of all tuned hyperparameters, the main one first."""
        columns = (self.values, *self.others.values())
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per run and evaluation."""
        for run, (point, seed) in enumerate(zip(self.points, self.seeds, strict=True)):
            value, *others = point
            for column, step in enumerate(self.history.steps):
                yield {
                    "stage": self.name,
                    "value": value,
                    **{f"hyperparams.{k}": v for k, v in zip(self.others, others, strict=True)},
                    "seed": int(seed),
                    "step": int(step),
                    **{k: float(v[run, column]) for k, v in self.history.metrics.items()},
                    "diverged_at": int(self.history.diverged_at[run]),
                }


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome for one optimizer.

    Attributes:
      hyperparameter: what was tuned, the main one of several, or None.
      best: its chosen value, or None if nothing was tuned or no value was stable.
      at_edge: whether the best is the lowest or highest value tried, so that a better one may lie
        outside (the largest *stable* value is no edge).
      stages: all runs, in order.
      final: the runs at the best value whose mean and spread are reported; None if there are none.
      others: further tuned hyperparameters and their chosen values.
    """

    hyperparameter: str | None
    best: Any  # nearly always a float
    at_edge: bool
    stages: tuple[Stage, ...]
    final: Stage | None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self) -> search_space.Point:
        """All chosen values by name, the main one first; empty if there are none."""
        if self.hyperparameter is None or self.best is None:
            return {}
        return {self.hyperparameter: self.best, **self.others}


def rate_grid(low: float, high: float) -> np.ndarray:
    """6, 3, 1 × 10^m from ``high`` down to ``low``, both included if they are of that form.

    Examples:
      >>> rate_grid(3e-3, 1e-1).tolist()
      [0.1, 0.06, 0.03, 0.01, 0.006, 0.003]
    """
    decades = range(math.floor(math.log10(high)), math.floor(math.log10(low)) - 1, -1)
    values = [float(f"{mantissa:g}e{m}") for m in decades for mantissa in MANTISSAS]
    return np.array([v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)])


def tune(
    trainer: Trainer,
    *,
    steps: int,
    seeds: int,
    protocol: str = "search",
    rates: Sequence[float] | None = None,
    decades: float = 2.0,
    tuning_seeds: int = 1,
    first_seed: int = 0,
    select_by: str = "validation_accuracy",
    score: Score = ACCURACY,
    on_interval: OnInterval | None = None,
    waves: checkpoint.Waves | None = None,
) -> Tuned:
    """Tunes an optimizer's hyperparameter and replicates the best value.

    Args:
      trainer: trains batches of runs of one optimizer.
      steps: steps of a full run, a multiple of ``trainer.eval_every``.
      seeds: replications of the best value.
      protocol: ``"search"`` (the paper's), ``"grid"`` (all values × all seeds at once), ``"none"``.
      rates: values to try; default: 6, 3, 1 × 10^m over the method's range.
      decades: how far below the largest stable value the search goes.
      tuning_seeds: seeds over which the selection metric is averaged while searching; the
        replications have those after them.
      first_seed: of the final runs in a grid, and where nothing is tuned.
      select_by: a metric; of an accuracy the largest, of a loss the smallest value reached counts.
      score: of the problem; it says which of the two.
      on_interval: called with (stage, record) after every evaluation of every run.
      waves: where the runs are kept as they go, and come from if they were interrupted.
    """
    tunable = trainer.method.tunes
    if protocol == "none":
        tunable = None

    def run(name: str, values: Sequence[float], run_seeds: Sequence[int], length: int) -> Stage:
        points = [{tunable.hyperparameter: value} for value in values] if tunable else [{}]
        return run_stage(name, points, run_seeds, length, lambda _: trainer, on_interval, waves)

    if tunable is None:
        final = run("replication", [math.nan], range(first_seed, first_seed + seeds), steps)
        return Tuned(None, None, False, (final,), final)

    candidates = sorted(set(rates or rate_grid(tunable.low, tunable.high).tolist()), reverse=True)
    if protocol == "grid":
        stage = run("tuning", candidates, range(first_seed, first_seed + seeds), steps)
        best = _select(stage, select_by, score)
        at_best = None if best is None else runs_at(stage, best)
        at_edge = _at_edge(best, candidates)
        return Tuned(tunable.hyperparameter, best, at_edge, (stage,), at_best)

    # The largest stable value: one interval each. One at a time from the top where runs go one
    # after the other anyway, all together where they share a program.
    stages = []
    at_once = len(candidates) if trainer.vectorize == "vmap" else 1
    largest = None
    for first in range(0, len(candidates), at_once):
        tried = candidates[first : first + at_once]
        stages.append(run("stability", tried, [0], trainer.eval_every))
        if stable := [v for v, ok in zip(tried, _is_stable(stages[-1]), strict=True) if ok]:
            largest = max(stable)
            break
    if largest is None:
        return Tuned(tunable.hyperparameter, None, True, tuple(stages), None)

    lowest = largest / 10**decades
    grid = [v for v in candidates if v <= largest] if rates else rate_grid(lowest, largest)
    stages.append(run("tuning", list(grid), range(tuning_seeds), steps))
    best = _select(stages[-1], select_by, score)
    if best is None:
        return Tuned(tunable.hyperparameter, None, True, tuple(stages), None)
    unseen = range(tuning_seeds, tuning_seeds + seeds)
    stages.append(run("replication", [best], unseen, steps))
    # Above the largest stable value others were tried, and failed: it is no edge.
    at_edge = _at_edge(best, [*(v for v in candidates if v > largest), *grid])
    return Tuned(tunable.hyperparameter, best, at_edge, tuple(stages), stages[-1])


def run_stage(  # noqa: PLR0917  as of a batch of runs: what, which, how long
    name: str,
    points: Sequence[search_space.Point],
    seeds: Sequence[int],
    steps: int,
    trainer_of: Callable[[search_space.Point], Trainer],
    on_interval: OnInterval | None = None,
    waves: checkpoint.Waves | None = None,
) -> Stage:
    """Trains every point with every seed; points of one trainer in one batch of runs.

    Args:
      name: of the stage.
      points: hyperparameter -> value, the same hyperparameters in each.
      seeds: of the runs.
      steps: of each run.
      trainer_of: the trainer of a point; static hyperparameters are its own.
      on_interval: called with (stage, record) after every evaluation of every run.
      waves: where the runs are kept as they go, and come from if they were interrupted.
    """
    runs = list(itertools.product(points, seeds))
    groups: dict[Trainer, list[int]] = {}
    for index, (point, _) in enumerate(runs):
        groups.setdefault(trainer_of(point), []).append(index)
    histories = []
    for trainer, rows in groups.items():
        traced = [k for k in points[0] if k not in trainer.method.static_args]
        columns = {k: np.array([runs[row][0][k] for row in rows]) for k in traced}

        def report(
            row: int, step: int, metrics: Mapping[str, float], rows: Sequence[int] = rows
        ) -> None:
            if on_interval:
                point, seed = runs[rows[row]]
                record = {"value": _label(point), "seed": seed, "step": step}
                on_interval(name, record | dict(metrics))

        chosen = Runs(columns, np.array([runs[row][1] for row in rows]))
        histories.append(trainer.train(chosen, steps, report, waves))
    history = _merged(histories, list(itertools.chain(*groups.values())))
    seed_of = np.array([seed for _, seed in runs])
    values = {k: column([point[k] for point, _ in runs]) for k in points[0]}
    values = values or {"": np.full(len(runs), math.nan)}
    main, *others = values
    return Stage(name, values[main], seed_of, history, {k: values[k] for k in others})


def _label(point: search_space.Point) -> Any:
    """The value of a run for whoever watches: a number where that says it all."""
    if len(point) > 1:
        return search_space.text_of(point)
    return next(iter(point.values()), math.nan)


def column(values: Sequence[Any]) -> np.ndarray:
    """Values of runs as an array: real numbers as floats, anything else as it is."""
    are_real = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    are_counts = all(isinstance(v, int) for v in values)
    return np.array(values, float if are_real and not are_counts else object)


def _merged(histories: Sequence[History], rows: Sequence[int]) -> History:
    """The histories of several batches as that of one, with its runs in the order of ``rows``."""
    if len(histories) == 1:
        return histories[0]
    order = np.argsort(rows)
    first = histories[0]
    return History(
        first.steps,
        {k: np.concatenate([h.metrics[k] for h in histories])[order] for k in first.metrics},
        np.concatenate([h.diverged_at for h in histories])[order],
        sum(h.seconds for h in histories),
    )


def _is_stable(stage: Stage) -> np.ndarray:
    """Which runs stayed below the loss they began with: at the end, and on average on the way.

    On the way it is the training loss, regularisation included, and compared with the same of the
    first batch, which is noisy.
    """
    metrics, first = stage.history.metrics, stage.history.first_loss
    loss = metrics.get("validation_loss", metrics["test_loss"])
    begun = loss[:, 0] if first is None else first + _BATCH_NOISE * np.abs(first)
    below = (loss[:, -1] < loss[:, 0]) & (metrics["train_loss"][:, -1] < begun)
    return np.asarray(below & (stage.history.diverged_at == 0))


def scores(
    stage: Stage, select_by: str, score: Score = ACCURACY, number: int = 0
) -> dict[Any, float]:
    """Value -> the best that its runs reached, averaged over seeds; larger is better.

    A value that diverged with any seed scores −∞. Of several hyperparameters it is that of the
    best values of the others.

    Args:
      stage: the runs.
      select_by: the metric.
      score: of the problem; it says whether larger ones are better.
      number: which of the tuned hyperparameters, 0 for the main one.
    """
    found = scores_by_seed(stage, select_by, score, number)
    return {value: float(np.mean(reached)) for value, reached in found.items()}


def scores_by_seed(
    stage: Stage, select_by: str, score: Score = ACCURACY, number: int = 0
) -> dict[Any, np.ndarray]:
    """As `scores`, but of each seed, in the order of the runs."""
    best: dict[Any, np.ndarray] = {}
    for point, reached in _reached(stage, select_by, score).items():
        value = point[number]
        if value not in best or np.mean(reached) > np.mean(best[value]):
            best[value] = reached
    return best


def point_scores(
    stage: Stage, select_by: str, score: Score = ACCURACY
) -> dict[tuple[Any, ...], float]:
    """Values of all tuned hyperparameters -> as `scores`, in the order of the runs."""
    found = _reached(stage, select_by, score)
    return {point: float(np.mean(reached)) for point, reached in found.items()}


def _reached(stage: Stage, select_by: str, score: Score) -> dict[tuple[Any, ...], np.ndarray]:
    """Values of all tuned hyperparameters -> the best that each of its runs reached."""
    after = stage.history.metrics[select_by][:, 1:]  # before training does not count
    metric = score.sign(select_by) * after
    reached = np.where(np.isfinite(metric), metric, -np.inf).max(axis=1)
    reached = np.where(stage.history.diverged_at > 0, -np.inf, reached)
    by_point: dict[tuple[Any, ...], list[float]] = {}
    for point, found in zip(stage.points, reached, strict=True):
        by_point.setdefault(point, []).append(found)
    return {point: np.array(found) for point, found in by_point.items()}


def _select(stage: Stage, select_by: str, score: Score) -> float | None:
    by_value = scores(stage, select_by, score)
    best = max(by_value, key=lambda value: by_value[value])
    return None if by_value[best] == -np.inf else best


def _at_edge(best: float | None, tried: Iterable[float]) -> bool:
    """Whether a better value may lie outside; so it does where all failed."""
    return best is None or search_space.at_edge({"": best}, ({"": value} for value in tried))


def runs_at(stage: Stage, value: float) -> Stage:
    """Those of a stage's runs that had one value, as replications of it."""
    return dataclasses.replace(runs_where(stage, stage.values == value), name="replication")


def runs_where(stage: Stage, keep: np.ndarray) -> Stage:
    """Some of a stage's runs, by a mask [R]."""
    metrics = {name: values[keep] for name, values in stage.history.metrics.items()}
    at, first = stage.history.diverged_at[keep], stage.history.first_loss
    history = stage.history._replace(
        metrics=metrics, diverged_at=at, first_loss=None if first is None else first[keep]
    )
    others = {name: values[keep] for name, values in stage.others.items()}
    return Stage(stage.name, stage.values[keep], stage.seeds[keep], history, others)

"""Tuning and replication: which value of the learning rate, and how good it is over seeds.

The protocol is that of Balles & Hennig, appendix A.2: find the largest stable learning rate, search
downwards over two decades at 6, 3, 1 × 10^m, replicate the best over several seeds. Two things
differ, because picking by test accuracy leaks: the default picks by a validation split, and the
replications use seeds that the tuning has not seen.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from optgrad.experiments import checkpoint
from optgrad.experiments.engine import History, Runs, Trainer
from optgrad.experiments.scores import ACCURACY, Score

MANTISSAS = (6.0, 3.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One batch of runs: what for, which runs, and what they did."""

    name: str  # "stability", "tuning" or "replication"
    values: np.ndarray  # tuned hyperparameter of each run [R]; NaN where nothing is tuned
    seeds: np.ndarray  # [R]
    history: History

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per run and evaluation."""
        for run, (value, seed) in enumerate(zip(self.values, self.seeds, strict=True)):
            for column, step in enumerate(self.history.steps):
                yield {
                    "stage": self.name,
                    "value": float(value),
                    "seed": int(seed),
                    "step": int(step),
                    **{k: float(v[run, column]) for k, v in self.history.metrics.items()},
                    "diverged_at": int(self.history.diverged_at[run]),
                }


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome for one optimizer.

    Attributes:
      hyperparameter: what was tuned, or None.
      best: its chosen value, or None if nothing was tuned or no value was stable.
      at_edge: whether the best is the lowest or highest value tried, so that a better one may lie
        outside (the largest *stable* value is no edge).
      stages: all runs, in order.
      final: the runs at the best value whose mean and spread are reported; None if there are none.
    """

    hyperparameter: str | None
    best: float | None
    at_edge: bool
    stages: tuple[Stage, ...]
    final: Stage | None


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
    select_by: str = "validation_accuracy",
    score: Score = ACCURACY,
    on_interval: Callable[[str, Mapping[str, Any]], None] | None = None,
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
      tuning_seeds: seeds over which the selection metric is averaged while searching.
      select_by: a metric; of an accuracy the largest, of a loss the smallest value reached counts.
      score: of the problem; it says which of the two.
      on_interval: called with (stage, record) after every evaluation of every run.
      waves: where the runs are kept as they go, and come from if they were interrupted.
    """
    tunable = trainer.method.tunes

    def run(name: str, values: Sequence[float], run_seeds: Sequence[int], length: int) -> Stage:
        pairs = list(itertools.product(values, run_seeds))
        value_of, seed_of = (np.array(column) for column in zip(*pairs, strict=True))
        hyperparams = {tunable.hyperparameter: value_of} if tunable and protocol != "none" else {}

        def report(index: int, step: int, metrics: Mapping[str, float]) -> None:
            if on_interval:
                record = {"value": value_of[index], "seed": seed_of[index], "step": step}
                on_interval(name, record | dict(metrics))

        return Stage(
            name,
            value_of,
            seed_of,
            trainer.train(Runs(hyperparams, seed_of), length, report, waves),
        )

    if tunable is None or protocol == "none":
        final = run("replication", [math.nan], range(seeds), steps)
        return Tuned(None, None, False, (final,), final)

    candidates = sorted(set(rates or rate_grid(tunable.low, tunable.high).tolist()), reverse=True)
    if protocol == "grid":
        stage = run("tuning", candidates, range(seeds), steps)
        best, at_edge = _select(stage, select_by, score)
        at_best = None if best is None else runs_at(stage, best)
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
    best, at_edge = _select(stages[-1], select_by, score)
    if best is None:
        return Tuned(tunable.hyperparameter, None, True, tuple(stages), None)
    unseen = range(tuning_seeds, tuning_seeds + seeds)
    stages.append(run("replication", [best], unseen, steps))
    at_edge &= best != largest or largest == candidates[0]
    return Tuned(tunable.hyperparameter, best, at_edge, tuple(stages), stages[-1])


def _is_stable(stage: Stage) -> np.ndarray:
    """Which runs stayed below the loss they began with: at the end, and on average on the way."""
    metrics = stage.history.metrics
    loss = metrics.get("validation_loss", metrics["test_loss"])
    below = np.maximum(loss[:, -1], metrics["train_loss"][:, -1]) < loss[:, 0]
    return np.asarray(below & (stage.history.diverged_at == 0))


def scores(stage: Stage, select_by: str, score: Score = ACCURACY) -> dict[float, float]:
    """Value -> the best that its runs reached, averaged over seeds; larger is better.

    A value that diverged with any seed scores −∞.
    """
    after = stage.history.metrics[select_by][:, 1:]  # before training does not count
    metric = score.sign(select_by) * after
    reached = np.where(np.isfinite(metric), metric, -np.inf).max(axis=1)
    reached = np.where(stage.history.diverged_at > 0, -np.inf, reached)
    return {
        float(v): float(np.mean(reached[stage.values == v])) for v in dict.fromkeys(stage.values)
    }


def _select(stage: Stage, select_by: str, score: Score) -> tuple[float | None, bool]:
    by_value = scores(stage, select_by, score)
    best = max(by_value, key=lambda value: by_value[value])
    if by_value[best] == -np.inf:
        return None, True
    return best, len(by_value) > 1 and best in (min(by_value), max(by_value))


def runs_at(stage: Stage, value: float) -> Stage:
    """Those of a stage's runs that had one value, as replications of it."""
    return dataclasses.replace(runs_where(stage, stage.values == value), name="replication")


def runs_where(stage: Stage, keep: np.ndarray) -> Stage:
    """Some of a stage's runs, by a mask [R]."""
    metrics = {name: values[keep] for name, values in stage.history.metrics.items()}
    at = stage.history.diverged_at[keep]
    history = stage.history._replace(metrics=metrics, diverged_at=at)
    return Stage(stage.name, stage.values[keep], stage.seeds[keep], history)

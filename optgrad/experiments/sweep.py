"""Tuning over several hyperparameters: all points of a search space, and the best replicated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from optgrad import registry
from optgrad.experiments import checkpoint, search_space, tuning
from optgrad.experiments.engine import Trainer
from optgrad.experiments.scores import ACCURACY, Score


class Trainers:
    """A trainer for each combination of static values, which are compiled, and no more.

    Args:
      make: static hyperparameters -> their trainer.
      method: the optimizer's record.
      points: of the search space; all trainers that they need are made here.
    """

    def __init__(
        self,
        make: Callable[[Mapping[str, Any]], Trainer],
        method: registry.Method,
        points: Sequence[search_space.Point],
    ) -> None:
        self.method = method
        self._found: list[tuple[Mapping[str, Any], Trainer]] = []  # lists are no keys of a dict
        for point in points:
            static = self._static(point)
            if all(static != other for other, _ in self._found):
                self._found.append((static, make(static)))

    def __call__(self, point: search_space.Point) -> Trainer:
        """The trainer of a point."""
        return next(trainer for static, trainer in self._found if static == self._static(point))

    def traced(self, point: search_space.Point) -> dict[str, Any]:
        """The hyperparameters of a point that are no part of its trainer."""
        return {k: v for k, v in point.items() if k not in self.method.static_args}

    def _static(self, point: search_space.Point) -> dict[str, Any]:
        return {k: v for k, v in point.items() if k in self.method.static_args}


def tune_points(
    trainer_of: Callable[[search_space.Point], Trainer],
    points: Sequence[search_space.Point],
    *,
    steps: int,
    seeds: int,
    tuning_seeds: int = 1,
    select_by: str = "validation_accuracy",
    score: Score = ACCURACY,
    on_interval: tuning.OnInterval | None = None,
    waves: checkpoint.Waves | None = None,
) -> tuning.Tuned:
    """Trains every point with every tuning seed, and the best one with fresh seeds.

    Args:
      trainer_of: the trainer of a point.
      points: of the search space; the first hyperparameter is the main one.
      steps: of a run.
      seeds: replications of the best point, by seeds that the tuning has not seen.
      tuning_seeds: seeds over which the selection metric is averaged; a point that diverged with
        any of them never wins.
      select_by: a metric; of an accuracy the largest, of a loss the smallest value reached counts.
      score: of the problem; it says which of the two.
      on_interval: called with (stage, record) after every evaluation of every run.
      waves: where the runs are kept as they go, and come from if they were interrupted.
    """
    stage = tuning.run_stage(
        "tuning", points, range(tuning_seeds), steps, trainer_of, on_interval, waves
    )
    by_point = tuning.point_scores(stage, select_by, score)
    reached, best = max(zip(by_point.values(), points, strict=True), key=lambda found: found[0])
    (main, value), *others = best.items()
    if reached == -np.inf:
        return tuning.Tuned(main, None, True, (stage,), None)
    unseen = range(tuning_seeds, tuning_seeds + seeds)
    final = tuning.run_stage("replication", [best], unseen, steps, trainer_of, on_interval, waves)
    edge = search_space.at_edge(best, points)
    return tuning.Tuned(main, value, edge, (stage, final), final, dict(others))

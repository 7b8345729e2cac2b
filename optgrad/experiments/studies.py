"""The study of one optimizer: its trainers, how long its runs are, and what they did."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optgrad import registry
from optgrad.experiments import budgets, checkpoint, problems, sweep, timing, tuning
from optgrad.experiments.config import CompareConfig, OptimizerConfig
from optgrad.experiments.engine import Trainer


@dataclasses.dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
      tuned: the tuning, and the final runs.
      published: runs at the published defaults with the seeds of the final ones, or None.
      seconds_per_step: of training, where that was measured.
    """

    tuned: tuning.Tuned
    published: tuning.Stage | None
    seconds_per_step: float | None


class Study:
    """One optimizer of a comparison; made before any work, it refuses what could not be run.

    Args:
      config: the comparison, its metric to select by resolved.
      problem: what to train on.
      optimizer: one of the configuration's.
    """

    def __init__(
        self, config: CompareConfig, problem: problems.Problem, optimizer: OptimizerConfig
    ) -> None:
        self.config, self.problem, self.optimizer = config, problem, optimizer
        self.method = registry.get_method(optimizer.method)
        self.points = config.points(optimizer)
        self.trainers = sweep.Trainers(self._trainer, self.method, self.points or [{}])
        self.at_defaults: Trainer | None = None
        if config.published_defaults and self.method.runs_at_published_defaults:
            try:
                self.at_defaults = self._make(self.method.published, ())
            except ValueError as error:
                raise ValueError(f"published_defaults: {optimizer.label}: {error}") from error

    @property
    def compilations(self) -> int:
        """How often training steps have been compiled."""
        defaults = self.at_defaults.compilations if self.at_defaults else 0
        return self.trainers.compilations + defaults

    def run(self, on_interval: tuning.OnInterval, waves: checkpoint.Waves) -> Found:
        """Tunes and replicates the optimizer.

        Args:
          on_interval: called with (stage, record) after every evaluation of every run.
          waves: where the runs are kept as they go, and come from if they were interrupted.
        """
        seconds = self._seconds_per_step(waves)
        steps = self.config.length(self.optimizer).steps
        if self.config.budget_seconds is not None and seconds is not None:
            assert self.config.eval_every is not None
            steps = budgets.of_seconds(
                self.config.budget_seconds, self.config.eval_every, seconds
            ).steps
        tuned = self._tune(steps, on_interval, waves)
        published = None
        if at_defaults := self.at_defaults:
            seeds = tuned.final.seeds if tuned.final else range(self.config.seeds)
            published = tuning.run_stage(
                "published", [{}], list(seeds), steps, lambda _: at_defaults, on_interval, waves
            )
        return Found(tuned, published, seconds)

    def _tune(
        self, steps: int, on_interval: tuning.OnInterval, waves: checkpoint.Waves
    ) -> tuning.Tuned:
        config, options = self.config, self.config.tuning
        if self.points:
            return sweep.tune_points(
                self.trainers,
                self.points,
                steps=steps,
                seeds=config.seeds,
                tuning_seeds=options.seeds,
                select_by=options.select_by,
                score=self.problem.score,
                on_interval=on_interval,
                waves=waves,
            )
        return tuning.tune(
            self.trainers({}),
            steps=steps,
            seeds=config.seeds,
            protocol=options.protocol if config.tunes(self.optimizer) else "none",
            rates=self.optimizer.rates or options.rates,
            decades=options.decades,
            tuning_seeds=options.seeds,
            select_by=options.select_by,
            score=self.problem.score,
            on_interval=on_interval,
            waves=waves,
        )

    def _seconds_per_step(self, waves: checkpoint.Waves) -> float | None:
        """Measured at a point from the middle of those tried, where it is asked for."""
        if not (self.config.measure_seconds or self.config.budget == "seconds"):
            return None
        point: Mapping[str, Any] = {}
        if self.points:
            point = self.points[len(self.points) // 2]
        elif tuned := self.config.tunes(self.optimizer):
            rates = self.optimizer.rates or self.config.tuning.rates
            assert self.method.tunes is not None
            low, high = self.method.tunes.low, self.method.tunes.high
            rates = rates or tuning.rate_grid(low, high).tolist()
            point = {tuned[0]: sorted(rates)[len(rates) // 2]}
        trainer = self.trainers(point)
        return timing.seconds_per_step(trainer, self.trainers.traced(point), waves)

    def _trainer(self, static: Mapping[str, Any]) -> Trainer:
        traced = [n for n in self.config.tunes(self.optimizer) if n not in self.method.static_args]
        return self._make({**self.optimizer.hyperparams, **static}, traced)

    def _make(self, hyperparams: Mapping[str, Any], traced: Any) -> Trainer:
        length = self.config.length(self.optimizer)
        trainer = Trainer(
            self.problem,
            self.method,
            hyperparams,
            eval_every=length.eval_every,
            vectorize=self.config.vectorize,
            microbatch_size=self.config.microbatch_size,
            features=self.config.features_over(length.steps),
        )
        trainer.check(traced)
        return trainer

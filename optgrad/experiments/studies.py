"""The study of one optimizer: its trainers, how long its runs are, and what they did."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from optgrad import registry
from optgrad.experiments import budgets, checkpoint, problems, search_space, sweep, timing, tuning
from optgrad.experiments.config import CompareConfig, OptimizerConfig, expected_steps
from optgrad.experiments.engine import Trainer
from optgrad.experiments.mesh import RunMesh


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
      mesh: the devices, if there are several.
    """

    def __init__(
        self,
        config: CompareConfig,
        problem: problems.Problem,
        optimizer: OptimizerConfig,
        mesh: RunMesh | None = None,
    ) -> None:
        self.config, self.problem, self.optimizer = config, problem, optimizer
        self._mesh, self._made = mesh, list[Trainer]()
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
        return sum(trainer.compilations for trainer in self._made)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the runs went through the machine, and why."""
        return tuple(dict.fromkeys(note for trainer in self._made for note in trainer.notes))

    def listen(self, on_note: Callable[[str], None]) -> None:
        """Has each of these notes reported as it is made."""
        for trainer in self._made:
            trainer.on_note = on_note

    def run(self, on_interval: tuning.OnInterval, waves: checkpoint.Waves) -> Found:
        """Tunes and replicates the optimizer.

        Args:
          on_interval: called with (stage, record) after every evaluation of every run.
          waves: where the runs are kept as they go, and come from if they were interrupted.
        """
        self._choose_ways(waves)
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
            first = self.config.first_seed
            seeds = range(first, first + self.config.seeds)
            published = tuning.run_stage(
                "published", [{}], seeds, steps, lambda _: at_defaults, on_interval, waves
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
            first_seed=config.first_seed,
            select_by=options.select_by,
            score=self.problem.score,
            on_interval=on_interval,
            waves=waves,
        )

    def _choose_ways(self, waves: checkpoint.Waves) -> None:
        """Has the trainers of the tuning measure how their runs go through the machine."""
        expected = expected_steps(self.config, self.optimizer)
        seeds = self.config.seeds if self.config.tuning.protocol == "grid" else 1
        if not self.points:
            rates = self._rates()
            runs = len(rates) * seeds if rates else self.config.seeds
            self.trainers({}).choose(self._middle(), runs, expected, waves)
            return
        groups: dict[Trainer, list[search_space.Point]] = {}
        for point in self.points:
            groups.setdefault(self.trainers(point), []).append(point)
        for trainer, points in groups.items():
            traced = self.trainers.traced(points[len(points) // 2])
            runs = len(points) * self.config.tuning.seeds
            trainer.choose(traced, runs, expected * len(points) // len(self.points), waves)

    def _rates(self) -> list[float]:
        """The values of the tuned hyperparameter, in order, where there is no search space."""
        if self.points or not self.config.tunes(self.optimizer) or self.method.tunes is None:
            return []
        rates = self.optimizer.rates or self.config.tuning.rates
        low, high = self.method.tunes.low, self.method.tunes.high
        return sorted(rates or tuning.rate_grid(low, high).tolist())

    def _middle(self) -> search_space.Point:
        """A point from the middle of those tried."""
        if self.points:
            return self.points[len(self.points) // 2]
        rates = self._rates()
        tuned = self.config.tunes(self.optimizer)
        return {tuned[0]: rates[len(rates) // 2]} if rates else {}

    def _seconds_per_step(self, waves: checkpoint.Waves) -> float | None:
        """Measured at a point from the middle of those tried, where it is asked for."""
        if not (self.config.measure_seconds or self.config.budget == "seconds"):
            return None
        point = self._middle()
        trainer = self.trainers(point)
        return timing.seconds_per_step(trainer, self.trainers.traced(point), waves)

    def _trainer(self, static: Mapping[str, Any]) -> Trainer:
        traced = [n for n in self.config.tunes(self.optimizer) if n not in self.method.static_args]
        return self._make({**self.optimizer.hyperparams, **static}, traced)

    def _make(self, hyperparams: Mapping[str, Any], traced: Any) -> Trainer:
        length = self.config.length(self.optimizer)
        # The trainers are made in the same order whenever the study is begun.
        trainer = Trainer(
            self.problem,
            self.method,
            hyperparams,
            eval_every=length.eval_every,
            vectorize=self.config.vectorize,
            microbatch_size=self.config.microbatch_size,
            features=self.config.features_over(length.steps),
            mesh=self._mesh,
            memory_limit=self.config.memory_limit,
            name=str(len(self._made) or ""),
        )
        self._made.append(trainer)
        trainer.check(traced)
        return trainer

"""A comparison: every optimizer of a configuration, tuned and replicated on one problem."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optgrad import registry
from optgrad.core import checks
from optgrad.experiments import (
    catalogue,
    checkpoint,
    compilation,
    data,
    problems,
    robustness,
    statistics,
    studies,
    tuning,
)
from optgrad.experiments.config import CompareConfig, OptimizerConfig
from optgrad.experiments.mesh import RunMesh
from optgrad.experiments.scores import ACCURACY, Score

# (label, stage, record of one evaluation of one run, with the problem's "score") -> None
OnInterval = Callable[[str, str, Mapping[str, Any]], None]
OnNote = Callable[[str, str], None]  # label, one line


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one optimizer did."""

    config: OptimizerConfig
    tuned: tuning.Tuned
    compilations: int  # of the training step
    seconds: float  # wall time of its training, compilation included
    compile_seconds: float = 0.0  # of this process, for all its programs
    seconds_per_step: float | None = None  # of training, where that was measured
    published: tuning.Stage | None = None  # runs at the published defaults
    notes: tuple[str, ...] = ()  # how the runs went through the machine, and why

    @property
    def stages(self) -> tuple[tuning.Stage, ...]:
        """All its runs, in order."""
        return (*self.tuned.stages, *([self.published] if self.published else []))

    @property
    def cost_per_step(self) -> Mapping[str, float | None]:
        """Of a step, in each unit in which progress is shown; None if it was not measured."""
        cost = registry.get_method(self.config.method).cost
        return {
            "steps": 1.0,
            "gradient_evaluations": cost,
            "seconds": self.seconds_per_step,
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All outcomes, with the configuration that they follow from."""

    config: CompareConfig
    problem: str
    outcomes: tuple[Outcome, ...]
    target: float  # of the score
    score: Score = ACCURACY

    def summary(self) -> list[dict[str, Any]]:
        """One record per optimizer: the best rate, and mean and deviation over the final seeds."""
        records = []
        for outcome in self.outcomes:
            record = _summary(outcome, self.target, self.score)
            record |= _robustness_record(self.sensitivity(outcome))
            if self.config.published_defaults:
                record |= _mean_sd(f"published_{self.score.name}",
                                   _last(outcome.published, self.score.name))  # fmt: skip
            records.append(record)
        return records

    def sensitivity(self, outcome: Outcome) -> robustness.Sensitivity | None:
        """What the values of an optimizer's main hyperparameter reached, where that is a curve."""
        tuned_by = self.config.tuning
        return robustness.sensitivity(
            outcome.tuned.stages, tuned_by.select_by, self.score, is_grid=not tuned_by.draws_points
        )

    @property
    def units(self) -> tuple[str, ...]:
        """What progress is shown over: the unit of the budget, and others where they differ."""
        costs = [outcome.cost_per_step for outcome in self.outcomes]
        others = []
        if len({cost["gradient_evaluations"] for cost in costs}) > 1:
            others.append("gradient_evaluations")
        if costs and all(cost["seconds"] is not None for cost in costs):
            others.append("seconds")
        return tuple(dict.fromkeys([self.config.budget, *others]))

    def ranking(self) -> statistics.Ranking:
        """The order of the optimizers by the score after the last step, and who is told apart."""
        finals = {o.config.label: final_scores(o, self.score) for o in self.outcomes}
        return statistics.ranking(finals, larger_is_better=self.score.larger_is_better)


def run_comparison(
    config: CompareConfig,
    on_interval: OnInterval | None = None,
    journal: checkpoint.Keeper | None = None,
    on_note: OnNote | None = None,
) -> Comparison:
    """Loads the data, then tunes and replicates each optimizer in turn.

    Args:
      config: what to compare.
      on_interval: called with (label, stage, record) after every evaluation of every run.
      journal: where the runs are kept as they go, and come from if they were interrupted.
      on_note: called with (label, how its runs go through the machine, and why).
    """
    several = bool(config.mesh) or jax.process_count() > 1
    mesh = RunMesh(config.mesh) if several else None  # refused before any data is read
    problem = load_problem(config)
    if mesh:  # once for all optimizers
        problem = dataclasses.replace(problem, data=mesh.replicate(problem.data))
    config = _with_selection(config, problem)
    # Made before any runs: what cannot be run is refused first.
    all_studies = [studies.Study(config, problem, one, mesh) for one in config.optimizers]
    for study in all_studies:
        if on_note:
            study.listen(functools.partial(on_note, study.optimizer.label))
    outcomes = [
        _run_one(study, on_interval, checkpoint.Waves(journal, study.optimizer.label))
        for study in all_studies
    ]
    target = _target(config, problem.score, outcomes)
    return Comparison(config, problem.name, tuple(outcomes), target, problem.score)


def _target(config: CompareConfig, score: Score, outcomes: Sequence[Outcome]) -> float:
    """The value of the score that counts as "there"."""
    given = config.target if config.problem else config.target_accuracy
    if given is not None:
        return given
    finals = [f for f in (final_metric(o, score.name) for o in outcomes) if f.size]
    if not finals:
        return score.default_target(1.0, 1.0)
    best = max((float(np.mean(f)) for f in finals), key=lambda mean: score.sign(score.name) * mean)
    starts = [o.tuned.final.history.metrics[score.name][:, 0] for o in outcomes if o.tuned.final]
    return float(score.default_target(float(np.mean(starts[0])), best))


def load_problem(config: CompareConfig) -> problems.Problem:
    """The configured problem, or data set and network."""
    if config.problem:
        options = {"batch_size": config.batch_size, **config.problem_options}
        return catalogue.create_problem(config.problem, **options)
    dataset = data.load(config.dataset, config.data_dir)
    if config.validation:
        try:
            dataset = dataset.split_validation(config.validation)
        except ValueError as error:
            raise ValueError(f"validation = {config.validation}: {error}") from error
    return problems.image_classification(
        dataset,
        config.model,
        batch_size=config.batch_size,
        augment=config.augment,
        l2=config.l2,
        label_smoothing=config.label_smoothing,
        precision=config.precision,
        model_options=config.model_options,
    )


def _with_selection(config: CompareConfig, problem: problems.Problem) -> CompareConfig:
    """With the metric to select by: the problem's score, on validation examples if any."""
    if not config.problem:
        return config  # resolved by the configuration
    metrics = dict.fromkeys([problem.score.metric, "loss"])
    splits = [s for s in ("validation", "test") if s in problem.splits]
    accepted = [f"{split}_{metric}" for split in splits for metric in metrics]
    select_by = config.tuning.select_by or accepted[0]
    checks.check_one_of("tuning.select_by", select_by, accepted)
    tuned = config.tuning.model_copy(update={"select_by": select_by})
    return config.model_copy(update={"tuning": tuned})


def _run_one(
    study: studies.Study, on_interval: OnInterval | None, waves: checkpoint.Waves
) -> Outcome:
    score, optimizer = study.problem.score, study.optimizer
    compiling = compilation.seconds()

    def report(stage: str, record: Mapping[str, Any]) -> None:
        if on_interval:
            on_interval(optimizer.label, stage, {**record, "score": score})

    found = study.run(report, waves)
    compiling = compilation.seconds() - compiling
    outcome = Outcome(
        optimizer, found.tuned, study.compilations, 0.0, compiling, found.seconds_per_step,
        found.published, study.notes,
    )  # fmt: skip
    seconds = sum(stage.history.seconds for stage in outcome.stages)
    return dataclasses.replace(outcome, seconds=seconds)


def final_values(outcome: Outcome, name: str) -> np.ndarray:
    """A metric after the last step by seed; NaN where the run diverged, empty without runs."""
    return _last(outcome.tuned.final, name)


def final_metric(outcome: Outcome, name: str) -> np.ndarray:
    """The metric after the last step, of the final runs that did not diverge."""
    values = final_values(outcome, name)
    return np.asarray(values[np.isfinite(values)])


def final_scores(outcome: Outcome, score: Score) -> dict[int, float]:
    """Seed -> the score after the last step of the final runs; NaN of one that diverged."""
    final = outcome.tuned.final
    seeds = np.empty(0) if final is None else final.seeds
    values = final_values(outcome, score.name)
    return {int(seed): float(v) for seed, v in zip(seeds, values, strict=True)}


def _last(stage: tuning.Stage | None, name: str) -> np.ndarray:
    """A metric after the last step, by seed; NaN where the run diverged."""
    return np.empty(0) if stage is None else np.asarray(stage.history.metrics[name][:, -1])


def _mean_sd(name: str, values: np.ndarray) -> dict[str, float | None]:
    values = values[np.isfinite(values)]
    return {
        f"{name}_mean": float(np.mean(values)) if values.size else None,
        f"{name}_sd": float(np.std(values, ddof=1)) if values.size > 1 else None,
    }


def _robustness_record(found: robustness.Sensitivity | None) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for tolerance in robustness.TOLERANCES:
        good = found.within(tolerance) if found else None
        name = f"factor_within_{100 * tolerance:g}_percent"
        record[name] = good.factor if good else None
        record[f"{name}_at_edge"] = good.at_edge if good else None
    return record


def _summary(outcome: Outcome, target: float, score: Score) -> dict[str, Any]:
    final = outcome.tuned.final
    record: dict[str, Any] = {
        "optimizer": outcome.config.label,
        "method": outcome.config.method,
        "tuned": outcome.tuned.hyperparameter or "",
        "best": outcome.tuned.best,
        "others": dict(outcome.tuned.others),
        "at_edge": outcome.tuned.at_edge,
        "seeds": 0 if final is None else len(final.seeds),
        "diverged": 0 if final is None else int(np.sum(final.history.diverged_at > 0)),
    }
    for name in dict.fromkeys((score.name, "test_loss", "train_loss")):
        record |= _mean_sd(name, final_values(outcome, name))
    values = final_metric(outcome, score.name)
    record[f"{score.name}_median"] = float(np.median(values)) if values.size else None
    low, high = statistics.median_interval(values) if values.size else (None, None)
    record[f"{score.name}_median_low"], record[f"{score.name}_median_high"] = low, high
    record[f"target_{score.metric}"] = target
    steps = None if final is None else _steps_to(final, target, score)
    for unit, cost in outcome.cost_per_step.items():
        taken = None if steps is None or cost is None else cost * steps
        record[f"{unit}_to_target"] = taken
    record["steps"] = None if final is None else int(final.history.steps[-1])
    record["gradient_evaluations_per_step"] = outcome.cost_per_step["gradient_evaluations"]
    record["seconds_per_step"] = outcome.seconds_per_step
    record["training_seconds"] = outcome.seconds
    record["compile_seconds"] = outcome.compile_seconds
    record["compilations"] = outcome.compilations
    record["notes"] = "; ".join(outcome.notes)
    return record


def _steps_to(final: tuning.Stage, target: float, score: Score) -> float | None:
    """Median over seeds of the first evaluated step at the target; None if most never reach it."""
    median = float(np.median(steps_to_target(final, target, score)))
    return median if np.isfinite(median) else None


def steps_to_target(final: tuning.Stage, target: float, score: Score) -> np.ndarray:
    """The first evaluated step at the target, of each run; infinite if it never reaches it."""
    reached = score.reaches(final.history.metrics[score.name], target)
    return np.where(reached.any(axis=1), final.history.steps[reached.argmax(axis=1)], np.inf)

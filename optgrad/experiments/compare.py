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
    statistics,
    tuning,
)
from optgrad.experiments.config import CompareConfig, OptimizerConfig, expected_steps
from optgrad.experiments.engine import Trainer
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
    notes: tuple[str, ...] = ()  # how the runs went through the machine, and why


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
        return [_summary(outcome, self.target, self.score) for outcome in self.outcomes]

    def ranking(self) -> statistics.Ranking:
        """The order of the optimizers by the score after the last step, and who is told apart."""
        finals = {outcome.config.label: _finals(outcome, self.score) for outcome in self.outcomes}
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
    trainers = [
        _trainer(config, problem, one, mesh) for one in config.optimizers
    ]  # refuses all first
    for trainer, one in zip(trainers, config.optimizers, strict=True):
        if on_note:
            trainer.on_note = functools.partial(on_note, one.label)
    outcomes = [
        _run_one(config, trainer, one, on_interval, checkpoint.Waves(journal, one.label))
        for trainer, one in zip(trainers, config.optimizers, strict=True)
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


def _trainer(
    config: CompareConfig,
    problem: problems.Problem,
    optimizer: OptimizerConfig,
    mesh: RunMesh | None,
) -> Trainer:
    assert config.eval_every is not None  # resolved by the configuration
    method = registry.get_method(optimizer.method)
    trainer = Trainer(
        problem,
        method,
        optimizer.hyperparams,
        eval_every=config.eval_every,
        vectorize=config.vectorize,
        microbatch_size=config.microbatch_size,
        features=config.features,
        mesh=mesh,
        memory_limit=config.memory_limit,
    )
    tuned = _tuned(config, optimizer)
    trainer.check([tuned] if tuned else [])
    return trainer


def _tuned(config: CompareConfig, optimizer: OptimizerConfig) -> str | None:
    """The hyperparameter that is tuned: none if it is fixed, or there is none."""
    tunable = registry.get_method(optimizer.method).tunes
    if tunable is None or config.tuning.protocol == "none":
        return None
    return None if tunable.hyperparameter in optimizer.hyperparams else tunable.hyperparameter


def _run_one(
    config: CompareConfig,
    trainer: Trainer,
    optimizer: OptimizerConfig,
    on_interval: OnInterval | None,
    waves: checkpoint.Waves,
) -> Outcome:
    score = trainer.problem.score
    compiling = compilation.seconds()

    def report(stage: str, record: Mapping[str, Any]) -> None:
        if on_interval:
            on_interval(optimizer.label, stage, {**record, "score": score})

    tunable, protocol = trainer.method.tunes, config.tuning.protocol
    values = {tunable.hyperparameter: tunable.low} if tunable and _tuned(config, optimizer) else {}
    run_steps = expected_steps(config, optimizer)
    trainer.choose(values, _first_runs(config, optimizer), run_steps, waves)
    tuned = tuning.tune(
        trainer,
        steps=config.steps,
        seeds=config.seeds,
        protocol=protocol if values else "none",
        rates=optimizer.rates or config.tuning.rates,
        decades=config.tuning.decades,
        tuning_seeds=config.tuning.seeds,
        select_by=config.tuning.select_by,
        score=score,
        on_interval=report,
        waves=waves,
    )
    seconds = sum(stage.history.seconds for stage in tuned.stages)
    compiling = compilation.seconds() - compiling
    return Outcome(optimizer, tuned, trainer.compilations, seconds, compiling, tuple(trainer.notes))


def _first_runs(config: CompareConfig, optimizer: OptimizerConfig) -> int:
    """How many runs the first stage has if they go together: it sets the width of the program."""
    tunable = registry.get_method(optimizer.method).tunes
    if tunable is None or not _tuned(config, optimizer):
        return config.seeds
    rates = optimizer.rates or config.tuning.rates or tuning.rate_grid(tunable.low, tunable.high)
    return len(rates) * (config.seeds if config.tuning.protocol == "grid" else 1)


def _finals(outcome: Outcome, score: Score) -> dict[int, float]:
    """Seed -> the score after the last step of the final runs; NaN of one that diverged."""
    final = outcome.tuned.final
    if final is None:
        return {}
    values = np.where(
        final.history.diverged_at == 0, final.history.metrics[score.name][:, -1], np.nan
    )
    return {int(seed): float(v) for seed, v in zip(final.seeds, values, strict=True)}


def final_metric(outcome: Outcome, name: str) -> np.ndarray:
    """The metric after the last step, of the final runs that did not diverge."""
    final = outcome.tuned.final
    if final is None:
        return np.empty(0)
    return np.asarray(final.history.metrics[name][final.history.diverged_at == 0, -1])


def _summary(outcome: Outcome, target: float, score: Score) -> dict[str, Any]:
    final = outcome.tuned.final
    record: dict[str, Any] = {
        "optimizer": outcome.config.label,
        "method": outcome.config.method,
        "tuned": outcome.tuned.hyperparameter or "",
        "best": outcome.tuned.best,
        "at_edge": outcome.tuned.at_edge,
        "seeds": 0 if final is None else len(final.seeds),
        "diverged": 0 if final is None else int(np.sum(final.history.diverged_at > 0)),
    }
    for name in dict.fromkeys((score.name, "test_loss", "train_loss")):
        values = final_metric(outcome, name)
        record[f"{name}_mean"] = float(np.mean(values)) if values.size else None
        record[f"{name}_sd"] = float(np.std(values, ddof=1)) if values.size > 1 else None
    values = final_metric(outcome, score.name)
    record[f"{score.name}_median"] = float(np.median(values)) if values.size else None
    low, high = statistics.median_interval(values) if values.size else (None, None)
    record[f"{score.name}_median_low"], record[f"{score.name}_median_high"] = low, high
    record[f"target_{score.metric}"] = target
    record["steps_to_target"] = None if final is None else _steps_to(final, target, score)
    record["training_seconds"] = outcome.seconds
    record["compile_seconds"] = outcome.compile_seconds
    return record


def _steps_to(final: tuning.Stage, target: float, score: Score) -> float | None:
    """Median over seeds of the first evaluated step at the target; None if most never reach it."""
    reached = score.reaches(final.history.metrics[score.name], target)
    first = np.where(reached.any(axis=1), final.history.steps[reached.argmax(axis=1)], np.inf)
    median = float(np.median(first))
    return median if np.isfinite(median) else None

"""A comparison: every optimizer of a configuration, tuned and replicated on one problem."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optgrad import registry
from optgrad.experiments import data, problems, tuning
from optgrad.experiments.config import CompareConfig, OptimizerConfig
from optgrad.experiments.engine import Trainer

OnInterval = Callable[[str, str, Mapping[str, Any]], None]  # label, stage, record


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one optimizer did."""

    config: OptimizerConfig
    tuned: tuning.Tuned
    compilations: int  # of the training step
    seconds: float  # wall time of its training, compilation included


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All outcomes, with the configuration that they follow from."""

    config: CompareConfig
    problem: str
    outcomes: tuple[Outcome, ...]
    target_accuracy: float

    def summary(self) -> list[dict[str, Any]]:
        """One record per optimizer: the best rate, and mean and deviation over the final seeds."""
        return [_summary(outcome, self.target_accuracy) for outcome in self.outcomes]


def run_comparison(config: CompareConfig, on_interval: OnInterval | None = None) -> Comparison:
    """Loads the data, then tunes and replicates each optimizer in turn."""
    problem = load_problem(config)
    trainers = [_trainer(config, problem, one) for one in config.optimizers]  # refuses all first
    outcomes = [
        _run_one(config, trainer, one, on_interval)
        for trainer, one in zip(trainers, config.optimizers, strict=True)
    ]
    target = config.target_accuracy
    if target is None:  # what counts as "there": 99 % of the best final mean
        finals = [final_metric(outcome, "test_accuracy") for outcome in outcomes]
        target = 0.99 * max((np.mean(f) for f in finals if f.size), default=1.0)
    return Comparison(config, problem.name, tuple(outcomes), float(target))


def load_problem(config: CompareConfig) -> problems.Problem:
    """The configured data set and network."""
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


def _trainer(
    config: CompareConfig, problem: problems.Problem, optimizer: OptimizerConfig
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
) -> Outcome:
    tuned = tuning.tune(
        trainer,
        steps=config.steps,
        seeds=config.seeds,
        protocol=config.tuning.protocol if _tuned(config, optimizer) else "none",
        rates=optimizer.rates or config.tuning.rates,
        decades=config.tuning.decades,
        tuning_seeds=config.tuning.seeds,
        select_by=config.tuning.select_by,
        on_interval=on_interval and (lambda *record: on_interval(optimizer.label, *record)),
    )
    seconds = sum(stage.history.seconds for stage in tuned.stages)
    return Outcome(optimizer, tuned, trainer.compilations, seconds)


def final_metric(outcome: Outcome, name: str) -> np.ndarray:
    """The metric after the last step, of the final runs that did not diverge."""
    final = outcome.tuned.final
    if final is None:
        return np.empty(0)
    return np.asarray(final.history.metrics[name][final.history.diverged_at == 0, -1])


def _summary(outcome: Outcome, target: float) -> dict[str, Any]:
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
    for name in ("test_accuracy", "test_loss", "train_loss"):
        values = final_metric(outcome, name)
        record[f"{name}_mean"] = float(np.mean(values)) if values.size else None
        record[f"{name}_sd"] = float(np.std(values, ddof=1)) if values.size > 1 else None
    record["target_accuracy"] = target
    record["steps_to_target"] = None if final is None else _steps_to(final, target)
    record["training_seconds"] = outcome.seconds
    return record


def _steps_to(final: tuning.Stage, target: float) -> float | None:
    """Median over seeds of the first evaluated step at the target; None if most never reach it."""
    reached = final.history.metrics["test_accuracy"] >= target
    first = np.where(reached.any(axis=1), final.history.steps[reached.argmax(axis=1)], np.inf)
    median = float(np.median(first))
    return median if np.isfinite(median) else None

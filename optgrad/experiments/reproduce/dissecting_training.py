"""Training for figures 3, 6 and 7: the networks of appendix A.1, tuned as in A.2, replicated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import optgrad
from optgrad.experiments import compare, data, engine, features, problems, tuning
from optgrad.experiments.config import OptimizerConfig
from optgrad.experiments.reproduce import Progress, Settings
from optgrad.experiments.reproduce.dissecting_scales import Network, scale_of
from optgrad.experiments.schedules import ScheduleConfig

Array = npt.NDArray[Any]
LABELS = {
    "momentum": "M-SGD",
    "m_svag": "M-SVAG",
    "adam": "Adam",
    "m_ssd": "M-SSD",
    "adam_star": "Adam∗",
    "adam_star_mb": "Adam∗-mb",
    "m_svag_mb": "M-SVAG-mb",
}
SELECT_BY = "test_accuracy"  # A.2: "in terms of maximally reached test accuracy"


@functools.lru_cache(maxsize=3)
def load_problem(settings: Settings, name: str) -> problems.Problem:
    """A test problem; its data is taken where it is at hand, nothing is downloaded.

    Raises:
      DataNotFoundError: if it is not.
    """
    budget = scale_of(settings).networks[name]
    dataset = data.load(budget.dataset, settings.data_dir, download=False)
    dataset = reduced(dataset, budget.classes, budget.test_images)
    return problems.image_classification(
        dataset,
        budget.model,
        batch_size=budget.batch_size,
        augment=budget.augment,
        l2=budget.l2,
        model_options=budget.model_options,
    )


def reduced(dataset: data.Dataset, classes: int | None, test_images: int | None) -> data.Dataset:
    """The data set's first classes, and of their test images the first ones; None: all."""
    classes = dataset.num_classes if classes is None else classes
    train, test = dataset.train_labels < classes, dataset.test_labels < classes
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.test_images[test][:test_images],
        test_labels=dataset.test_labels[test][:test_images],
        classes=dataset.classes[:classes],
    )


def boundaries(budget: Network) -> list[int]:
    """The steps after which the learning rate is divided by ten."""
    return [round(fraction * budget.steps) for fraction in budget.decay_at]


def surroundings(budget: Network) -> features.Features:
    """The schedule of the learning rate."""
    if not budget.decay_at:
        return features.Features()
    decay = ScheduleConfig(kind="step", at=tuple(boundaries(budget)))
    return features.Features(schedule=decay.factor_at(budget.steps))


def outcome(
    settings: Settings, name: str, method: str, progress: Progress = lambda fraction: None
) -> compare.Outcome:
    """One method tuned and replicated on one test problem; figures share what they have in common.

    Args:
      settings: with the scale.
      name: of the test problem.
      method: registered name.
      progress: called with the fraction that is done.
    """
    if (settings, name, method) not in _OUTCOMES:
        _OUTCOMES[settings, name, method] = _train(settings, name, method, progress)
    progress(1.0)
    return _OUTCOMES[settings, name, method]


_OUTCOMES: dict[tuple[Settings, str, str], compare.Outcome] = {}


def _train(settings: Settings, name: str, method: str, progress: Progress) -> compare.Outcome:
    budget = scale_of(settings).networks[name]
    trainer = engine.Trainer(
        load_problem(settings, name),
        optgrad.get_method(method),
        eval_every=budget.eval_every,
        microbatch_size=budget.microbatch_size,
        features=surroundings(budget),
    )
    tuned = tuning.tune(
        trainer,
        steps=budget.steps,
        seeds=budget.seeds,
        decades=budget.decades,
        select_by=SELECT_BY,
        on_interval=_counter(progress, budget.runs * budget.evaluations),
    )
    config = OptimizerConfig(method=method, label=LABELS[method])
    seconds = sum(stage.history.seconds for stage in tuned.stages)
    return compare.Outcome(config, tuned, trainer.compilations, seconds)


def _counter(progress: Progress, expected: int) -> Callable[..., None]:
    done = 0

    def count(stage: str, record: Any) -> None:
        nonlocal done
        if stage != "stability" and record["step"]:
            done += 1
            progress(min(done / expected, 1.0))

    return count


# What is read from an outcome -------------------------------------------------------------------


def early_loss(found: compare.Outcome) -> Array:
    """Mean training loss over the first third of the steps, by seed."""
    if found.tuned.final is None:
        return np.empty(0)
    losses = found.tuned.final.history.metrics["train_loss"][:, 1:]
    return np.asarray(losses[:, : max(losses.shape[1] // 3, 1)].mean(axis=1))


def mean_sd(values: Array, scale: float, digits: int) -> str:
    """``mean ± sd`` over the runs that did not diverge, and how many did."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return "all diverged" if len(values) else "no stable rate"
    spread = f" ± {scale * kept.std(ddof=1):.{digits}f}" if len(kept) > 1 else ""
    lost = f" ({len(values) - len(kept)} diverged)" if len(kept) < len(values) else ""
    return f"{scale * kept.mean():.{digits}f}{spread}{lost}"

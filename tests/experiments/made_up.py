"""A comparison out of thin air: what tests of results, reports and pictures need of one."""

import math

import numpy as np

from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.config import load_config
from optgrad.experiments.engine import History
from optgrad.experiments.tuning import Stage, Tuned

METRICS = ("train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
STEPS = np.arange(0, 41, 10)
SEEDS = 3


def history(runs, salt, diverged=()):
    """Smooth curves that differ by run; a diverged one is NaN from its third evaluation on."""
    random = np.random.RandomState(salt)
    progress = STEPS / STEPS[-1]
    metrics = {}
    for name in METRICS:
        noise = 0.02 * random.randn(runs, 1)
        loss, accuracy = 2.3 - 2.0 * progress, 0.1 + 0.8 * progress
        metrics[name] = (accuracy if name.endswith("accuracy") else loss) + progress * noise
    metrics["train_loss"][:, 0] = np.nan
    at = np.zeros(runs, int)
    for run in diverged:
        at[run] = 17
        for values in metrics.values():
            values[run, 2:] = np.nan
    return History(STEPS, metrics, at, 1.25)


def stage(name, values, seeds, salt, diverged=()):
    values, seeds = np.array(values, float), np.array(seeds)
    return Stage(name, values, seeds, history(len(seeds), salt, diverged))


def made_up_comparison(
    labels=("adam", "M-SVAG, β=0.5", "sgd", "lbfgs"), name="mlp_small on digits"
):
    """Tuned; tuned with one diverged replication; nothing stable; nothing to tune."""
    config = load_config(
        overrides={
            "optimizers": [
                {"method": "adam", "label": labels[0]},
                {"method": "m_svag", "label": labels[1], "hyperparams": {"beta": 0.5}},
                {"method": "sgd", "label": labels[2]},
                {"method": "lbfgs", "label": labels[3]},
            ],
            "steps": 40,
            "eval_every": 10,
            "seeds": SEEDS,
            "output": "somewhere/else",
            "data_dir": "some/images",
            "target_accuracy": 0.6,
        }
    )
    rates = [0.1, 0.06, 0.03]
    seeds = range(1, 1 + SEEDS)
    tuned = []
    for salt, (best, diverged) in enumerate([(0.06, ()), (0.1, (1,))]):
        final = stage("replication", [best] * SEEDS, seeds, 10 * salt + 2, diverged)
        stages = (
            stage("stability", [1.0], [0], 10 * salt, [0]),
            stage("tuning", rates, [0] * 3, 10 * salt + 1, [2]),
            final,
        )
        tuned.append(Tuned("learning_rate", best, best == 0.1, stages, final))
    tuned.append(
        Tuned("learning_rate", None, True, (stage("stability", [1.0], [0], 40, [0]),), None)
    )
    only = stage("replication", [math.nan] * SEEDS, range(SEEDS), 50)
    tuned.append(Tuned(None, None, False, (only,), only))
    outcomes = tuple(
        Outcome(optimizer, one, 1, 1.25 * len(one.stages))
        for optimizer, one in zip(config.optimizers, tuned, strict=True)
    )
    return Comparison(config, name, outcomes, 0.6)

"""Runs, and what they did."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from optgrad.experiments.checkpoint import Records


class Runs(NamedTuple):
    """A batch of R runs: what differs between them."""

    hyperparams: Mapping[str, np.ndarray]  # traced hyperparameters, each of shape [R]
    seeds: np.ndarray  # integers [R]


class History(NamedTuple):
    """What R runs did, at E evaluations; NaN from an evaluation's divergence on."""

    steps: np.ndarray  # [E], from 0
    metrics: Mapping[str, np.ndarray]  # each [R, E]; train_loss, test_accuracy, …
    diverged_at: np.ndarray  # [R], 0 for a run that did not diverge
    seconds: float  # wall time of the training, compilation included
    first_loss: np.ndarray | None = None  # [R], training loss of the first batch, before any update

    @classmethod
    def of(cls, records: Records, steps: np.ndarray, seconds: float) -> "History":
        """The history that the records of the runs tell."""
        names = [name for name in records[0][-1] if name != "diverged_at"]
        metrics = {name: np.array([[r[name] for r in run] for run in records]) for name in names}
        diverged_at = np.array([int(run[-1]["diverged_at"]) for run in records])
        first_loss = np.array([run[0].get("first_loss", np.nan) for run in records])
        return cls(steps, metrics, diverged_at, seconds, first_loss)

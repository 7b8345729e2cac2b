"""How long a training step takes, for budgets in seconds and curves over them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optgrad.experiments import checkpoint, measurement
from optgrad.experiments.engine import Trainer
from optgrad.experiments.executable import Executable


def seconds_per_step(
    trainer: Trainer, hyperparams: Mapping[str, Any], waves: checkpoint.Waves
) -> float:
    """Seconds of a training step, measured once in a study: kept in its journal, and read there.

    Args:
      trainer: of the optimizer.
      hyperparams: traced ones, at which it is measured.
      waves: where the measurement is kept, or comes from; it counts as a wave of no steps.
    """
    wave = waves.next({k: np.array(v) for k, v in hyperparams.items()}, np.array(0), 0)
    found = wave.finished()
    if found is None:
        found = [[{"seconds_per_step": _measure(trainer, hyperparams)}]]
        wave.finish(found)
    return found[0][0]["seconds_per_step"]


def _measure(trainer: Trainer, hyperparams: Mapping[str, Any]) -> float:
    """Of a lone run, after compiling and without evaluation."""
    alone = trainer.executable
    if alone.together:
        alone = Executable(trainer.program, together=False, scans=alone.scans)
    return measurement.cost(alone, hyperparams, 1).step

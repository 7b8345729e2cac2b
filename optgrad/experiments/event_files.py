"""TensorBoard event files of the runs of a comparison."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import numpy as np

from optgrad.experiments import search_space
from optgrad.experiments.compare import Comparison
from optgrad.experiments.tuning import Stage

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raises an ImportError that names the extra, if event files cannot be written."""
    _library()


def _library() -> ModuleType:
    try:
        return importlib.import_module("tensorboardX")
    except ModuleNotFoundError as error:
        raise ImportError(
            "tensorboard = True needs tensorboardX, which is not installed; "
            'install it with: pip install "optgrad[tensorboard]"'
        ) from error


def write(comparison: Comparison, folder: Path) -> None:
    """Writes ``<optimizer>/<stage>-<value>-seed<k>/events…`` for every run.

    Every metric is a scalar at each evaluation, under the tag ``<split>/<metric>``; NaN, where
    there is none or the run has diverged, is left out.

    Args:
      comparison: whose runs.
      folder: under which; an optimizer's folder is its label, with ``/`` and the like quoted.

    Raises:
      ImportError: without the extra ``tensorboard``.
    """
    for outcome in comparison.outcomes:
        below = folder / _folder_of(outcome.config.label)
        for stage in outcome.stages:
            for run in range(len(stage.seeds)):
                _write_run(stage, run, below / name_of(stage, run))


def _folder_of(label: str) -> str:
    """The label as a name that stays below its folder."""
    return quote(label, safe=" ,;=+()").replace(".", "%2E" if not label.strip(".") else ".")


def name_of(stage: Stage, run: int) -> str:
    """The folder of one run: the tuned values, the main one without its name, and the seed."""
    names = ("", *(f"{name}=" for name in stage.others))
    values = [
        name + (f"{value:.12g}" if search_space.is_number(value) else _folder_of(str(value)))
        for name, value in zip(names, stage.points[run], strict=True)
        if not (isinstance(value, float) and np.isnan(value))  # where nothing is tuned
    ]
    return "-".join([stage.name, *values, f"seed{stage.seeds[run]}"])


def _write_run(stage: Stage, run: int, folder: Path) -> None:
    with _library().SummaryWriter(logdir=str(folder)) as writer:
        for metric, values in stage.history.metrics.items():
            tag = re.sub("_", "/", metric, count=1)
            for step, value in zip(stage.history.steps, values[run], strict=True):
                if np.isfinite(value):
                    writer.add_scalar(tag, float(value), int(step))

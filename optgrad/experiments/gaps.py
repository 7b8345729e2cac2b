"""How far an optimizer is behind the best of others on one study, in percent.

Studies of different kinds are put on one scale, on which 0 is level, more is worse and 1 is
"within one percent":

- of an accuracy, points of it;
- of a loss, the relative difference to the best one's;
- of the excess over a known minimum, which optimizers reduce by decades and never to nothing, the
  share of the best one's decades that is missing, 1 − log(s/f)/log(s*/f*), from starts s to f.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from optgrad.experiments.scores import Score

Kind = Literal["points", "loss", "decades"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one optimizer reached on one study.

    Attributes:
      label: the optimizer's.
      starts: the score of each final run before its first step.
      finals: the score of each final run after its last step, in the same order; not finite where
        it diverged. None at all where no value of what was tuned was stable.
    """

    label: str
    starts: Sequence[float]
    finals: Sequence[float]

    @property
    def failed(self) -> bool:
        """Whether any run diverged, or there are none."""
        return not self.finals or not np.all(np.isfinite(self.finals))


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far one is behind another.

    Attributes:
      percent: as the module says; negative if it is ahead, ∞ if it failed, NaN if the other has
        not come below its start.
      error: standard error of ``percent`` from the spread over the seeds of both; NaN of one seed.
      ratio: of its excess and the other's, where a minimum is known; else NaN.
    """

    percent: float
    error: float
    ratio: float = math.nan

    def within(self, bar: float) -> bool:
        """Whether it is at most so many percent behind.

        Examples:
          >>> Gap(0.9, 0.2).within(1.0), Gap(1.1, 0.2).within(1.0)
          (True, False)
        """
        return self.percent <= bar


def kind_of(score: Score) -> Kind:
    """How gaps of a score are measured.

    Raises:
      ValueError: a score of which more is better, and no share.
    """
    if score.in_percent:
        return "points"
    if score.larger_is_better:
        raise ValueError(f"score = {score.name}; accepted: a share, a loss or an excess")
    return "decades" if score.metric == "excess" else "loss"


def typical(result: Result, kind: Kind) -> float:
    """The mean of the final scores, of an excess the geometric one; the worst value if it failed.

    Examples:
      >>> round(typical(Result("adam", [1.0, 1.0], [1e-2, 1e-4]), "decades"), 6)
      0.001
    """
    if result.failed:
        return -math.inf if kind == "points" else math.inf
    if kind == "decades":
        return float(np.exp(np.mean(_logs(result.finals))))
    return float(np.mean(result.finals))


def best(results: Iterable[Result], kind: Kind) -> Result | None:
    """The one with the best typical score; None if there are none, or all failed."""
    running = [result for result in results if not result.failed]
    sign = -1.0 if kind == "points" else 1.0
    return min(running, key=lambda result: sign * typical(result, kind), default=None)


def gap(mine: Result, other: Result, kind: Kind) -> Gap:
    """How far one is behind another, which did not fail.

    Examples:
      >>> accuracies = Result("auto", [0.1, 0.1], [0.96, 0.98]), Result("adam", [0.1], [0.975])
      >>> round(gap(*accuracies, "points").percent, 6)
      0.5
      >>> losses = Result("auto", [2.3], [0.202]), Result("adam", [2.3], [0.2])
      >>> round(gap(*losses, "loss").percent, 6)
      1.0
      >>> excesses = Result("auto", [1.0], [1e-3]), Result("adam", [1.0], [1e-4])
      >>> found = gap(*excesses, "decades")
      >>> round(found.percent, 6), round(found.ratio, 6)
      (25.0, 10.0)
    """
    if mine.failed:
        return Gap(math.inf, math.nan, math.inf if kind == "decades" else math.nan)
    if kind == "decades":
        return _gap_in_decades(mine, other)
    here, there = typical(mine, kind), typical(other, kind)
    difference = there - here if kind == "points" else (here - there) / abs(there)
    scale = 1.0 if kind == "points" else abs(there)
    error = math.hypot(_error(mine.finals), _error(other.finals)) / scale
    return Gap(100 * difference, 100 * error)


def _gap_in_decades(mine: Result, other: Result) -> Gap:
    here, there = _gains(mine), _gains(other)
    gained = float(np.mean(there))
    if gained <= 0.0:
        return Gap(math.nan, math.nan)
    missing = 100 * (1 - float(np.mean(here)) / gained)
    error = 100 * math.hypot(_error(here), _error(there)) / gained
    return Gap(missing, error, typical(mine, "decades") / typical(other, "decades"))


def _gains(result: Result) -> list[float]:
    """The logarithm of start over final score, of each run."""
    return list(_logs(result.starts) - _logs(result.finals))


def _logs(values: Sequence[float]) -> npt.NDArray[np.float64]:
    smallest = np.finfo(np.float32).tiny  # an excess of 0, or rounded below
    return np.asarray(np.log(np.maximum(np.asarray(values, float), smallest)))


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan

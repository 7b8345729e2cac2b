"""How exactly a learning rate must be met: over which factor of it the performance is good."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optgrad.experiments import search_space, tuning
from optgrad.experiments.scores import Score

TOLERANCES = (0.01, 0.05, 0.10)
Floats = npt.NDArray[np.float64]


class Range(NamedTuple):
    """The values around the best one whose performance is good enough, contiguous."""

    low: float
    high: float
    at_edge: bool  # whether it ends where nothing further was tried: it may be wider

    @property
    def factor(self) -> float:
        """How wide it is: high / low ≥ 1."""
        return self.high / self.low


class Sensitivity(NamedTuple):
    """What each tried value of the main hyperparameter reached.

    Attributes:
      values: ascending, positive.
      reached: selection metric averaged over seeds, with the sign that makes larger ones better;
        −∞ where a run diverged or was found unstable.
    """

    values: Floats
    reached: Floats

    def within(self, tolerance: float) -> Range:
        r"""The range of values within a tolerance of the best, between them interpolated.

        An accuracy is good enough from (1 − x)·best on, a loss up to (1 + x)·best. Where it is
        crossed between two tried values, it is interpolated linearly in the logarithm of the value;
        towards a value that diverged the range ends at the last one that did not.

        Args:
          tolerance: x > 0.

        Examples:
          >>> found = Sensitivity(np.array([0.01, 0.1, 1.0]), np.array([0.5, 0.9, 0.85]))
          >>> low, high, at_edge = found.within(0.10)
          >>> round(low, 4), high, at_edge
          (0.0596, 1.0, True)
        """
        best = int(np.argmax(self.reached))
        limit = float(self.reached[best]) * (1 - math.copysign(tolerance, self.reached[best]))
        low, open_below = self._end(best, -1, limit)
        high, open_above = self._end(best, 1, limit)
        return Range(low, high, open_below or open_above)

    def _end(self, best: int, direction: int, limit: float) -> tuple[float, bool]:
        """Where the range ends in one direction, and whether for want of further values."""
        last = best
        while 0 <= last + direction < len(self.values):
            beyond = last + direction
            if self.reached[beyond] < limit:
                return self._crossing(last, beyond, limit), False
            last = beyond
        return float(self.values[last]), True

    def _crossing(self, inside: int, outside: int, limit: float) -> float:
        here, there = self.reached[inside], self.reached[outside]
        if not np.isfinite(there):
            return float(self.values[inside])
        share = (here - limit) / (here - there)
        ends = np.log(self.values[[inside, outside]])
        return math.exp((1 - share) * ends[0] + share * ends[1])


def sensitivity(
    stages: Sequence[tuning.Stage], select_by: str, score: Score, *, is_grid: bool
) -> Sensitivity | None:
    """What the values of the main hyperparameter reached, at the best values of the others.

    Args:
      stages: of one optimizer.
      select_by: the metric.
      score: of the problem.
      is_grid: whether the points are a grid; where random ones have several hyperparameters, no
        two share a value, and there is no such curve.

    Returns:
      The curve; None where there is none: fewer than two values, values that are no positive
      numbers, or a best metric that is not positive, so that it has no fractions.
    """
    stage = next((s for s in stages if s.name == "tuning"), None)
    if stage is None or (stage.others and not is_grid):
        return None
    reached = tuning.scores(stage, select_by, score)
    if len(reached) < 2 or not all(search_space.is_number(v) and v > 0 for v in reached):
        return None
    unstable = {
        value
        for other in stages
        if other.name == "stability"
        for value in other.values.tolist()
        if value > max(reached)
    }
    reached |= dict.fromkeys(unstable, -math.inf)
    best = score.sign(select_by) * max(reached.values())  # as measured
    if not (0 < best < math.inf):
        return None
    values = sorted(reached)
    return Sensitivity(
        np.array(values, float), np.array([reached[value] for value in values], float)
    )

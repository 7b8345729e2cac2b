"""Verdicts on claims, from paired differences and their uncertainty."""

from typing import Any, NamedTuple

import numpy as np

from optgrad.experiments import statistics

UNDECIDED = "cannot be judged at this scale"


class Difference(NamedTuple):
    """Mean of paired differences with the half-width of its confidence interval."""

    mean: float
    margin: float  # of `statistics.mean_interval`; NaN for fewer than two pairs
    pairs: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.margin

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.margin

    def text(self, scale: float = 1.0, digits: int = 2, unit: str = "") -> str:
        """Such as ``+1.20 ± 0.30 % (5 pairs)``; ± is the interval's half-width."""
        if not self.pairs:
            return "no pair of runs that did not diverge"
        margin = "" if np.isnan(self.margin) else f" ± {scale * self.margin:.{digits}f}"
        return f"{scale * self.mean:+.{digits}f}{margin}{unit} ({self.pairs} pairs)"


def difference(first: Any, second: Any) -> Difference:
    """Of ``first`` − ``second``, value by value; pairs with one that is not finite are left out.

    Args:
      first: values by seed, shape (n,).
      second: those of the same seeds.

    Examples:
      >>> difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
      Difference(mean=2.0, margin=0.0, pairs=3)
    """
    values = np.asarray(first, float) - np.asarray(second, float)
    values = values[np.isfinite(values)]
    mean, _, margin = statistics.mean_interval(values)
    return Difference(mean, margin, len(values))


def is_above(found: Difference, bound: float = 0.0) -> str:
    """Whether the mean difference is above the bound, if its interval tells.

    Examples:
      >>> is_above(Difference(1.0, 0.5, 5)), is_above(Difference(1.0, 1.5, 5))
      ('holds', 'cannot be judged at this scale')
      >>> is_above(Difference(-1.0, 0.5, 5))
      'does not hold'
    """
    if found.low > bound:
        return "holds"
    return "does not hold" if found.high < bound else UNDECIDED


def is_within(found: Difference, low: float, high: float) -> str:
    """Whether the mean difference is between the bounds, if its interval tells.

    Examples:
      >>> is_within(Difference(0.1, 0.1, 5), -0.5, 0.5), is_within(Difference(0.1, 2.0, 5), -1, 1)
      ('holds', 'cannot be judged at this scale')
    """
    if low < found.low and found.high < high:
        return "holds"
    return "does not hold" if found.low > high or found.high < low else UNDECIDED


def all_hold(verdicts: list[str]) -> str:
    """The verdict on a claim of several parts."""
    if "does not hold" in verdicts:
        return "does not hold" if "holds" not in verdicts else "holds in part"
    return UNDECIDED if UNDECIDED in verdicts else "holds"

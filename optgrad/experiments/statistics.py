"""How sure a comparison is: intervals, paired differences, and the rule that calls a winner."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from optgrad.core import checks

LEVEL = 0.95  # of intervals; what is left is the level of the tests
MIN_SEEDS = 3  # fewer differences say nothing of their spread

RULE = (
    "An optimizer is called the winner if the mean of its final runs is the best and, over the "
    "seeds that it has in common with each other optimizer (the same initial weights and "
    "batches), a paired t-test tells them apart at 5 %, corrected for the number of rivals by "
    f"Holm's method; below {MIN_SEEDS} common seeds nothing is told apart. Runs that diverged do "
    "not count, and who has one that did is no winner."
)

Finals = Mapping[str, Mapping[int, float]]  # label -> seed -> final value, NaN if it diverged


@dataclasses.dataclass(frozen=True)
class Difference:
    """The best optimizer beside another one, over their common seeds.

    Attributes:
      label: the other one.
      seeds: number of common seeds at which neither diverged.
      mean: by how much the best is better, on average; negative if it is not over these seeds.
      low: lower end of the 95 % interval of that mean (Student's t).
      high: its upper end.
      p: two-sided p-value of the paired t-test, corrected by Holm's method.
    """

    label: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The order of all optimizers, and who is told apart from the best.

    Attributes:
      order: labels, the best mean first; those without a finite value last.
      differences: the best beside each other one that has a finite value.
      winner: the best if `RULE` says so, else None.
    """

    order: Sequence[str]
    differences: Sequence[Difference]
    winner: str | None


def median_interval(values: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, from 10,000 resamples of a fixed seed.

    With few values it is coarse and too narrow: of five it goes from the smallest to the largest,
    which covers the median with 93.75 % instead of 95 %.

    Args:
      values: finite numbers; of none the ends are NaN, of one they are that value.
      level: of the interval, in (0, 1).

    Examples:
      >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
      (1.0, 5.0)
    """
    checks.check_in_range("level", level, 0.0, 1.0, low_open=True, high_open=True)
    values = np.asarray(values, float)
    if not values.size:
        return math.nan, math.nan
    draws = np.random.default_rng(0).choice(values, (10_000, values.size))
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.median(draws, axis=1), [tail, 100.0 - tail])
    return float(low), float(high)


def mean_interval(values: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean, its standard error, and the half-width of its 95 % interval by Student's t.

    Args:
      values: finite numbers; of one the mean alone is known, of none nothing: NaN.

    Examples:
      >>> mean_interval([2.0, 2.0, 2.0])
      (2.0, 0.0, 0.0)
    """
    values = np.asarray(values, float)
    mean = float(np.mean(values)) if values.size else math.nan
    if values.size < 2:
        return mean, math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(values.size)
    return mean, error, error * float(stats.t.ppf(0.5 + LEVEL / 2.0, values.size - 1))


def ranking(finals: Finals, *, larger_is_better: bool) -> Ranking:
    """Orders optimizers by the mean of their final runs, and says who is told apart; see `RULE`.

    Args:
      finals: label -> seed -> final value; NaN for a run that diverged.
      larger_is_better: as for an accuracy, not for a loss.

    Examples:
      >>> finals = {"a": {0: 0.90, 1: 0.91, 2: 0.92}, "b": {0: 0.80, 1: 0.82, 2: 0.81}}
      >>> found = ranking(finals, larger_is_better=True)
      >>> found.winner, round(found.differences[0].mean, 3), round(found.differences[0].p, 3)
      ('a', 0.1, 0.003)
    """
    sign = 1.0 if larger_is_better else -1.0
    means = {label: finite_mean(values.values()) for label, values in finals.items()}
    ranked = sorted((label for label in finals if np.isfinite(means[label])),
                    key=lambda label: -sign * means[label])  # fmt: skip
    order = [*ranked, *(label for label in finals if label not in ranked)]
    if not ranked:
        return Ranking(order, (), None)
    best, *rivals = ranked
    found = [_difference(finals[best], finals[label], label, sign) for label in rivals]
    differences = [
        dataclasses.replace(one, p=p)
        for one, p in zip(found, holm([d.p for d in found]), strict=True)
    ]
    alone = all(d.p < 1.0 - LEVEL and d.mean > 0.0 for d in differences)
    whole = all(np.isfinite(list(finals[best].values())))
    winner = best if differences and alone and whole else None
    return Ranking(order, differences, winner)


def holm(p_values: Sequence[float]) -> list[float]:
    r"""p-values of m tests, corrected so that all together err with their level (Holm 1979).

    .. math::
      p'_{(i)} = \max_{j\le i} \min(1, (m - j + 1)\, p_{(j)})

    Examples:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return [float(p) for p in corrected]


def finite_mean(values: Iterable[float]) -> float:
    """The mean of those that are finite, the same in any order; NaN if there are none."""
    finite = [v for v in values if np.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _difference(
    best: Mapping[int, float], other: Mapping[int, float], label: str, sign: float
) -> Difference:
    both = sorted(best.keys() & other.keys())
    pairs = np.array([sign * (best[seed] - other[seed]) for seed in both], float)
    pairs = pairs[np.isfinite(pairs)]
    mean, error, margin = mean_interval(pairs)
    if pairs.size < MIN_SEEDS:
        return Difference(label, pairs.size, mean, math.nan, math.nan, 1.0)
    if error == 0.0:
        p = float(mean == 0.0)
    else:
        p = 2.0 * float(stats.t.sf(abs(mean) / error, pairs.size - 1))
    return Difference(label, pairs.size, mean, mean - margin, mean + margin, p)

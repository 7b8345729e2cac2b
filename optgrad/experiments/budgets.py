"""Equal budgets: how many steps of each optimizer cost the same."""

import math
from typing import NamedTuple

_ROUNDING = 1e-9


class Length(NamedTuple):
    """How long a run is."""

    steps: int  # a multiple of eval_every
    eval_every: int


def of_gradient_evaluations(budget: int, eval_every: int, cost: float) -> Length:
    """The steps that a budget in gradient evaluations pays for; at least one.

    Evaluations are moved together with the steps, so that they come after (about) as many gradient
    evaluations whatever a step costs.

    Args:
      budget: gradient evaluations of a run.
      eval_every: gradient evaluations from one evaluation of the model to the next.
      cost: of one step, in gradient evaluations, > 0.

    Examples:
      >>> of_gradient_evaluations(1000, 100, cost=2.0)
      Length(steps=500, eval_every=50)
      >>> of_gradient_evaluations(1000, 100, cost=201.0)
      Length(steps=4, eval_every=1)
    """
    interval = max(1, math.floor(eval_every / cost + _ROUNDING))
    intervals = math.floor(budget / cost + _ROUNDING) // interval
    return Length(max(1, intervals) * interval, interval)


def of_seconds(budget: float, eval_every: int, seconds_per_step: float) -> Length:
    """The steps that fit into so many seconds, in whole intervals; at least one of these.

    Examples:
      >>> of_seconds(2.0, 10, seconds_per_step=0.03)
      Length(steps=60, eval_every=10)
    """
    intervals = math.floor(budget / (seconds_per_step * eval_every) + _ROUNDING)
    return Length(max(1, intervals) * eval_every, eval_every)

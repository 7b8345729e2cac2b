"""Programs timed in turn, so that whatever else the machine does meets all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optgrad.core import checks

clock = time.perf_counter
SHORTEST = 5e-3  # seconds of one sample; faster programs run several times in it
_WARM_UP = 3
STREAM_ENTRIES = 10_000_000

Run = Callable[[], Any]  # starts one execution and gives what is to be waited for


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of one execution of each, for each round: A B C, then A B C again.

    Args:
      runs: name -> what is timed; compiled and warmed up first.
      rounds: how many, ≥ 1.

    Examples:
      >>> found = interleaved({"a": lambda: jnp.zeros(1), "b": lambda: jnp.ones(1)}, 3)
      >>> [(name, len(seconds)) for name, seconds in found.items()]
      [('a', 3), ('b', 3)]
    """
    checks.check_count("rounds", rounds, 1)
    repeats = {}
    for name, run in runs.items():
        for _ in range(_WARM_UP):
            alone = _seconds(run, 1)
        repeats[name] = max(1, math.ceil(SHORTEST / max(alone, 1e-9)))
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            spent[name].append(_seconds(run, repeats[name]))
    return spent


def _seconds(run: Run, repeats: int) -> float:
    started = clock()
    for _ in range(repeats):
        found = run()
    jax.block_until_ready(found)  # type: ignore[no-untyped-call]
    return (clock() - started) / repeats


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Examples:
      >>> spread([3.0, 1.0, 2.0])
      Spread(median=2.0, low=1.5, high=2.5)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(spent: Sequence[float], reference: Sequence[float]) -> Spread:
    """Of each round its own ratio, and their spread.

    Examples:
      >>> ratios([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]).median
      2.0
    """
    return spread([a / b for a, b in zip(spent, reference, strict=True)])


class Stream:
    """x ← a·x + b in place: what the memory gives a program that does nothing else.

    Attributes:
      bytes: that one execution reads and writes.
    """

    def __init__(self, entries: int = STREAM_ENTRIES) -> None:
        self._x = jnp.linspace(0.0, 1.0, entries)
        self._scale = jax.jit(lambda x: 0.999 * x + 1e-3, donate_argnums=0)
        self.bytes = 2 * self._x.nbytes

    def __call__(self) -> Any:
        """Starts one execution."""
        self._x = self._scale(self._x)
        return self._x

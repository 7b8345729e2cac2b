"""Whether runs go one after the other or together: by measurement, where that pays.

On a CPU that one run keeps busy, runs that go together gain nothing; a small network on an
accelerator leaves it idle unless they do. Which is the case is measured on a few steps. That costs
the compilation of the way that is not taken, so only long sweeps are measured.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optgrad.experiments.executable import Executable
from optgrad.experiments.program import Program

GAIN = 1.25  # so many times as fast the other way must be, so that repetitions agree
_LEAST_INTERVALS = 50  # of all runs; trying it costs two of them
_STEPS = 10  # timed of runs that go together
_REPEATS = 3

clock = time.perf_counter
WAYS = {"map": "one after the other", "vmap": "together"}


class Choice(NamedTuple):
    """A way of running a sweep, and why."""

    vectorize: str
    why: str


class Cost(NamedTuple):
    """Of a way of running a sweep, in seconds."""

    compiling: float
    step: float  # of one run


def choose_way(
    executable: Executable, hyperparams: Mapping[str, float], runs: int, run_steps: int
) -> Choice:
    """As `choose`, by the clock.

    Args:
      executable: of the default way.
      hyperparams: with which it is tried.
      runs: how many go together, if they do.
      run_steps: expected of all runs of the sweep.
    """
    program, scans = executable.program, executable.scans
    default = "vmap" if executable.together else "map"

    def measure(way: str) -> Cost:
        tried = executable
        if way != default:
            tried = Executable(program, together=way == "vmap", scans=scans)
        return cost(tried, hyperparams, runs)

    return choose(default, runs, run_steps, program.eval_every, measure)


def choose(
    default: str, runs: int, run_steps: int, eval_every: int, measure: Callable[[str], Cost]
) -> Choice:
    """The faster way, or the default where finding out takes longer than it can save.

    Args:
      default: ``"map"`` or ``"vmap"``.
      runs: how many go together, if they do.
      run_steps: expected of all runs of the sweep.
      eval_every: steps of an interval.
      measure: what a way costs; it is asked for the default first, and not if all is short.

    Examples:
      >>> costs = {"map": Cost(1.0, 0.004), "vmap": Cost(2.0, 0.001)}
      >>> choose("map", 8, 10_000, 100, lambda way: costs[way])  # 40 s: worth a second compilation
      Choice(vectorize='vmap', why='together: 1 ms a step of a run, one after the other 4 ms')
      >>> choose("map", 8, 5_000, 1000, lambda way: costs[way]).vectorize
      'map'
    """
    other = "map" if default == "vmap" else "vmap"
    if runs == 1 or run_steps < _LEAST_INTERVALS * eval_every:
        return Choice(default, f"{WAYS[default]}: too short to measure")
    here = measure(default)
    expected = run_steps * here.step
    # Twice as fast is a usual gain. The other way is compiled to be measured, and to be used.
    if expected / 2 < 2 * here.compiling:
        return Choice(default, f"{WAYS[default]}: {expected:.2g} s are too short to measure")
    there = measure(other)
    chosen = other if GAIN * there.step < here.step else default
    costs = {default: here.step, other: there.step}
    left_out = "map" if chosen == "vmap" else "vmap"
    return Choice(
        chosen,
        f"{WAYS[chosen]}: {1e3 * costs[chosen]:.3g} ms a step of a run, {WAYS[left_out]} "
        f"{1e3 * costs[left_out]:.3g} ms",
    )


def cost(executable: Executable, hyperparams: Mapping[str, float], runs: int) -> Cost:
    """What one way costs, on runs that are thrown away.

    Args:
      executable: of that way. If runs go together, a few steps of its program are timed.
      hyperparams: of every run.
      runs: how many go together.
    """
    width = (runs,) if executable.together else ()
    if executable.together:
        executable = Executable(
            _shortened(executable.program), together=True, scans=executable.scans
        )
    values = {name: np.full(width, value, np.float32) for name, value in hyperparams.items()}
    seeds = np.arange(runs, dtype=np.uint32) if width else np.uint32(0)
    values, seeds = executable.place((values, seeds))
    state = executable.init(values, seeds)
    jax.block_until_ready(state)  # type: ignore[no-untyped-call]
    spent = []
    for _ in range(1 + _REPEATS):
        started = clock()
        state, losses = executable.advance(state, values, seeds)
        jax.block_until_ready(losses)  # type: ignore[no-untyped-call]
        spent.append(clock() - started)
        if len(spent) > 1 and sum(spent[1:]) > 1.0:
            break
    interval = min(spent[1:])
    steps: Any = executable.program.eval_every * (runs if width else 1)
    return Cost(max(spent[0] - interval, 0.0), interval / steps)


def _shortened(program: Program) -> Program:
    if program.eval_every <= _STEPS:
        return program
    return dataclasses.replace(program, eval_every=_STEPS)

"""``optgrad bench sweep``: what a run costs alone, and among several that go together."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from optgrad import registry
from optgrad.experiments import engine
from optgrad.experiments.bench import timing
from optgrad.experiments.problems import Problem

RATE = 0.01


@dataclasses.dataclass(frozen=True)
class SweepCost:
    """A row: so many runs in one program, beside the same runs one after the other.

    Attributes:
      runs: how many go together.
      milliseconds: of one step of one of them.
      apart: the same of a run that has the machine alone.
      ratio: together to apart, of the same rounds: below 1 where going together pays.
      ratio_low: lower quartile.
      ratio_high: upper quartile.
    """

    runs: int
    milliseconds: float
    apart: float
    ratio: float
    ratio_low: float
    ratio_high: float


def costs(
    problem: Problem, method: registry.Method, widths: Sequence[int], *, steps: int, rounds: int
) -> Iterator[SweepCost]:
    """The rows of the table, one after the other.

    Args:
      problem: what is trained.
      method: by what.
      widths: numbers of runs.
      steps: of an interval, after which the machine is waited for.
      rounds: of the interleaved clock.
    """
    alone = interval(_trainer(problem, method, steps, "map"), 1)
    for runs in widths:
        together = interval(_trainer(problem, method, steps, "vmap"), runs)
        spent = timing.interleaved({"together": together, "apart": alone}, rounds)
        ratio = timing.ratios([t / runs for t in spent["together"]], spent["apart"])
        yield SweepCost(
            runs,
            1e3 * timing.spread(spent["together"]).median / runs / steps,
            1e3 * timing.spread(spent["apart"]).median / steps,
            *ratio,
        )


def _trainer(
    problem: Problem, method: registry.Method, steps: int, vectorize: str
) -> engine.Trainer:
    return engine.Trainer(problem, method, eval_every=steps, vectorize=vectorize)


def interval(trainer: engine.Trainer, runs: int) -> timing.Run:
    """What the harness computes between two evaluations of so many runs.

    Args:
      trainer: whose way of running them is taken: together, or one after the other.
      runs: how many.
    """
    executable = trainer.executable
    count = runs if executable.together else 1
    shape = (count,) if executable.together else ()
    method = trainer.method
    tuned = {} if method.tunes is None else {method.tunes.hyperparameter: _value(method)}
    values = {name: np.full(shape, value, np.float32) for name, value in tuned.items()}
    values, seeds = executable.place((values, np.zeros(shape, np.uint32)))
    states = [executable.init(values, seeds) for _ in range(runs // count)]

    def run() -> Any:
        for i, state in enumerate(states):
            states[i], loss = executable.advance(state, values, seeds)
            jax.block_until_ready(loss)  # type: ignore[no-untyped-call]
        return states

    return run


def _value(method: registry.Method) -> float:
    assert method.tunes is not None
    return RATE if method.tunes.low <= RATE <= method.tunes.high else method.tunes.low


HEADER = ("runs", "ms a step of a run, together", "apart", "together ÷ apart")
SHOWN = range(len(HEADER))


def cells(cost: SweepCost) -> list[str]:
    """A row as text, under `HEADER`."""
    return [
        str(cost.runs),
        f"{cost.milliseconds:.3g}",
        f"{cost.apart:.3g}",
        f"{cost.ratio:.2f} ({cost.ratio_low:.2f}–{cost.ratio_high:.2f})",
    ]

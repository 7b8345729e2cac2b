"""The training loop: one compiled function that serves every run of a study.

A *study* is a batch of runs of one optimizer: values of hyperparameters × seeds. All runs share
one compilation of the training step, because hyperparameters and seeds are traced. They are either

- ``"vmap"``-ed: all runs advance together in one program (accelerators, where a lone small network
  leaves the hardware idle), or
- ``"map"``-ped: one after the other through the same compiled function (CPU, where the cores are
  busy with one run already).

Which of the two is measured where that pays (`measurement`). Runs that go together and do not fit
into memory go in waves (`memory`); on several devices they are divided among them (`mesh`).

An evaluation interval is one `lax.scan`. There is one exception, which the engine makes itself: on
CPU, XLA runs a convolution inside any loop many times slower than outside, so there a host loop
drives one compiled step.

What one run computes is in `program`: functions of (seed, step) alone, so that a run gives the same
numbers, up to float rounding, whatever runs beside it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from optgrad import registry
from optgrad.core import checks
from optgrad.experiments import checkpoint, measurement, memory
from optgrad.experiments import features as features_lib
from optgrad.experiments.executable import Executable
from optgrad.experiments.extras import Extras
from optgrad.experiments.history import History, Runs
from optgrad.experiments.mesh import RunMesh
from optgrad.experiments.problems import Problem
from optgrad.experiments.program import Losses, Program

__all__ = ["VECTORIZE", "History", "OnInterval", "Runs", "Trainer"]

VECTORIZE = ("auto", "vmap", "map")
OnInterval = Callable[[int, int, Mapping[str, float]], None]  # run, step, its metrics


class Trainer:
    """Trains batches of runs of one optimizer on one problem, compiling once.

    Args:
      problem: what to train on.
      method: the optimizer's record; its ``needs`` decide what each step computes. Methods that
        sample labels (``kfac_stats``) do so by seed and step. What that costs is not counted.
      hyperparams: fixed hyperparameters, static ones among them.
      eval_every: steps from one evaluation to the next.
      vectorize: ``"auto"``, ``"vmap"`` or ``"map"``.
      microbatch_size: per-example gradients held at once, for methods that need their variance.
      features: what surrounds the method: schedule, weight decay, accumulation, average.
      mesh: the devices; with an axis of runs these go together, whatever ``vectorize`` says.
      memory_limit: bytes that the runs may take on one device; None: see `memory.device_bytes`.
      name: under which its decisions are kept, where an optimizer has several trainers.

    Attributes:
      vectorize: ``"vmap"`` or ``"map"``; for ``"auto"`` the backend's usual, until `choose`.
      notes: in words, how the runs go and why.
      on_note: called with each of them.

    Raises:
      ValueError: if the method needs something that the harness, or the problem, does not have, or
        does not go with the features.
    """

    def __init__(
        self,
        problem: Problem,
        method: registry.Method,
        hyperparams: Mapping[str, Any] | None = None,
        *,
        eval_every: int,
        vectorize: str = "auto",
        microbatch_size: int | None = None,
        features: features_lib.Features = features_lib.PLAIN,
        mesh: RunMesh | None = None,
        memory_limit: int | None = None,
        name: str = "",
    ) -> None:
        checks.check_one_of("vectorize", vectorize, VECTORIZE)
        checks.check_in_range("eval_every", eval_every, 1)
        features.check(method)
        extras = Extras(problem, method, microbatch_size)
        if mesh:
            problem = dataclasses.replace(problem, data=mesh.replicate(problem.data))
        fixed = dict(hyperparams or {})
        self.program = Program(problem, method, fixed, eval_every, features, extras, mesh)
        on_cpu = jax.default_backend() == "cpu"
        self.problem, self.method = problem, method
        self.eval_every, self.features = eval_every, features
        self.notes: list[str] = []
        self.on_note: Callable[[str], None] = lambda text: None
        self._measures = vectorize == "auto" and not mesh
        self._scans = not (on_cpu and problem.has_convolutions)
        self._memory_limit, self._name = memory_limit, name
        self._width: int | None = None
        usual = "map" if on_cpu else "vmap"
        self._use(usual if vectorize == "auto" else vectorize)
        if mesh and mesh.runs > 1 and self.vectorize == "map":
            self._use("vmap")
            self.notes.append(f"together, not one after the other, on the mesh {mesh}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)

    def _use(self, vectorize: str) -> None:
        self.vectorize = vectorize
        together = vectorize == "vmap"
        self.executable = Executable(self.program, together=together, scans=self._scans)

    @property
    def compilations(self) -> int:
        """How often the training step has been compiled."""
        return self.executable.compilations

    def choose(
        self,
        hyperparams: Mapping[str, float],
        runs: int,
        run_steps: int,
        waves: checkpoint.Waves | None = None,
    ) -> None:
        """Measures whether runs go together or not, if that was left to the trainer and pays.

        Args:
          hyperparams: those that the runs will have, with values to try it with.
          runs: how many could go together.
          run_steps: expected of all runs.
          waves: where the choice is kept.
        """
        if not self._measures:
            return

        def choice() -> list[str]:
            return [*measurement.choose_way(self.executable, hyperparams, runs, run_steps)]

        chosen, why = (waves or checkpoint.Waves()).decide(f"vectorize{self._name}", choice)
        self._note(why)
        if chosen != self.vectorize:
            self._use(chosen)

    def check(self, hyperparams: Iterable[str]) -> None:
        """As `Program.check`, for the names of the hyperparameters that the runs will have."""
        self.program.check(hyperparams)

    def train(
        self,
        runs: Runs,
        steps: int,
        on_interval: OnInterval | None = None,
        waves: checkpoint.Waves | None = None,
    ) -> History:
        """Trains every run for ``steps`` steps, a multiple of ``eval_every``.

        Args:
          runs: hyperparameters and seeds, R of each.
          steps: how many steps.
          on_interval: called with (run, step, metrics) after every evaluation.
          waves: where the runs are kept as they go, and come from if they were interrupted.
        """
        if steps % self.eval_every or steps < 1:
            raise ValueError(
                f"steps = {steps} is not a positive multiple of eval_every = {self.eval_every}"
            )
        count = len(runs.seeds)
        vmapped = self.vectorize == "vmap"
        # The first batch of runs sets the width of the compiled program; later ones are padded.
        waves = waves or checkpoint.Waves()
        self._width = (self._width or self._fitting(runs, waves)) if vmapped else 1
        records: checkpoint.Records = []
        seconds = 0.0
        for first in range(0, count, self._width):
            # The last wave is filled up with its last run.
            rows = np.minimum(first + np.arange(self._width), count - 1)
            select = rows if vmapped else first
            chosen = Runs({k: v[select] for k, v in runs.hyperparams.items()}, runs.seeds[select])

            def report(
                row: int, step: int, record: Mapping[str, float], first: int = first
            ) -> None:
                if on_interval and first + row < count:
                    on_interval(first + row, step, record)

            wave = waves.next(chosen.hyperparams, chosen.seeds, steps)
            found = wave.finished()
            if found is None:
                found = self._train_wave(chosen, steps, wave, report)
                wave.finish(found)
            else:
                checkpoint.replay(found, self.eval_every, report)
            seconds += wave.seconds
            records += found[: count - first]
        return History.of(records, np.arange(0, steps + 1, self.eval_every), seconds)

    def _fitting(self, runs: Runs, waves: checkpoint.Waves) -> int:
        """How many of these runs go together."""
        count = len(runs.seeds)

        def width() -> list[Any]:
            plan = memory.plan_runs(self.executable, [*runs.hyperparams], count, self._memory_limit)
            return [plan.width, plan.describe(count)]

        found, note = waves.decide(f"width{self._name}", width)
        self._note(note)
        return int(found)

    def _train_wave(
        self, runs: Runs, steps: int, wave: checkpoint.Wave, on_interval: OnInterval
    ) -> checkpoint.Records:
        executable = self.executable
        values = {k: np.asarray(v, np.float32) for k, v in runs.hyperparams.items()}
        hyperparams, seeds = executable.place((values, np.asarray(runs.seeds, np.uint32)))
        state = executable.init(hyperparams, seeds)
        losses = Losses(*executable.place([np.full(seeds.shape, np.nan, np.float32)] * 2))
        records: checkpoint.Records = [[] for _ in np.atleast_1d(runs.seeds)]
        if interrupted := wave.load(state):
            state, records = interrupted
            state = executable.place(state)
            checkpoint.replay(records, self.eval_every, on_interval)
        for step in range(len(records[0]) * self.eval_every, steps + 1, self.eval_every):
            if step:
                state, losses = executable.advance(state, hyperparams, seeds)
            metrics = {"train_loss": losses.mean, **executable.evaluate(state)}
            observed = executable.observed(state)
            numbers = [*metrics.values(), *observed.values(), state.diverged_at, losses.first]
            *fetched, diverged_at, first = executable.fetch(numbers)
            host = dict(zip([*metrics, *observed], np.asarray(fetched, float), strict=True))
            for row, record in enumerate(records):
                if step == self.eval_every:  # what the first batch cost before any update
                    record[0]["first_loss"] = float(first[row])
                found = {k: float(v[row]) for k, v in host.items()}
                at = int(record[-1]["diverged_at"]) if record else 0
                at = at or int(diverged_at[row])
                if step and not at and not np.isfinite([found[name] for name in metrics]).all():
                    at = step  # the last update went wrong, after the last finite loss
                record.append(
                    {**(dict.fromkeys(found, np.nan) if at else found), "diverged_at": at}
                )
                on_interval(row, step, record[-1])
            if all(record[-1]["diverged_at"] for record in records):
                # Nothing more to learn: the rest of the rows stay NaN.
                return [r + [r[-1]] * ((steps - step) // self.eval_every) for r in records]
            wave.save(state, records)
        return records

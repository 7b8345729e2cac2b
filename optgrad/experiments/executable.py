"""A run's program, compiled for many runs: one by one or together, on one device or on a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.experiments.program import Losses, Program, RunState


class Executable:
    """The compiled functions of a program.

    Args:
      program: what a run computes.
      together: whether arrays have a leading axis of runs, which advance in one program (vmap), or
        belong to one run (map).
      scans: whether an interval is one scan, or a host loop over compiled steps (see `engine`).

    Attributes:
      program, together, scans: as above.
    """

    def __init__(self, program: Program, *, together: bool, scans: bool) -> None:
        self.program, self.together, self.scans = program, together, scans
        self._mesh = program.mesh
        self.init = self._compiled(program.init, 0, 0)
        self._draw = self._compiled(_with_raw_keys(program.draw), 0, 0, None)
        # Donation lets XLA update parameters and averages in place.
        interval, step = (_with_typed_keys(f) for f in (program.interval, program.step))
        self._interval = self._compiled(interval, 0, 0, 0, None, donate_argnums=0)
        self._step = self._compiled(step, 0, 0, 0, None, None, donate_argnums=0)
        self._observed = self._compiled(program.observed, 0)
        self._evaluated = program.evaluated
        if program.computes_evaluated:
            self._evaluated = self._compiled(program.evaluated, 0)
        self._evaluate = {
            split: self._compiled(_of_split(program.evaluate, split), 0, None)
            for split in program.problem.splits
        }
        self._evaluate_group = {
            split: self._compiled(_of_split(program.evaluate_group, split), 0, None, None)
            for split in program.problem.splits
        }

    def _compiled(self, function: Callable[..., Any], *axes: int | None, **options: Any) -> Any:
        if self._mesh:
            return self._mesh.compiled(function, axes, together=self.together, **options)
        return jax.jit(jax.vmap(function, axes) if self.together else function, **options)

    @property
    def compilations(self) -> int:
        """How often the training step has been compiled."""
        compiled: Any = self._interval if self.scans else self._step
        return int(compiled._cache_size())

    def place(self, tree: Any) -> Any:
        """Arrays of the runs, where the runs are."""
        if not self._mesh:
            return jax.tree.map(jnp.asarray, tree)
        return self._mesh.split(tree) if self.together else self._mesh.replicate(tree)

    def fetch(self, tree: Any) -> Any:
        """Numbers of the runs, as NumPy arrays with an axis of runs."""
        found = self._mesh.gather(tree) if self._mesh else tree
        return jax.tree.map(np.atleast_1d, found)

    def advance(
        self, state: RunState, hyperparams: Any, seeds: chex.Array
    ) -> tuple[RunState, Losses]:
        """One evaluation interval."""
        data = self.program.problem.data
        drawn = self._draw(state.step, seeds, data)
        if self.scans:
            state, losses = self._interval(state, hyperparams, drawn, data)
            return state, losses
        state, first = self._step(state, hyperparams, drawn, 0, data)
        total = self.program.counted(first)
        for index in range(1, self.program.eval_every):
            state, loss = self._step(state, hyperparams, drawn, index, data)
            total += self.program.counted(loss)
        return state, Losses(self.program.mean(total), first)

    def observed(self, state: RunState) -> dict[str, chex.Array]:
        """What guard and monitor tell of the last interval, scalars of each run by name."""
        features = self.program.features
        return self._observed(state) if features.guard or features.monitor else {}

    def evaluate(self, state: RunState) -> dict[str, chex.Array]:
        """The metrics of every split, in order."""
        params, data = self._evaluated(state), self.program.problem.data
        metrics: dict[str, chex.Array] = {}
        for split in self.program.problem.splits:
            if self.scans:
                sums = self._evaluate[split](params, data)
            else:
                one = self._evaluate_group[split]
                parts = [one(params, data, i) for i in range(self.program.groups(split))]
                sums = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts)
            metrics |= {f"{split}_{k}": v / sums["count"] for k, v in sums.items() if k != "count"}
        return metrics

    def memory_bytes(self, names: Sequence[str], width: int) -> int:
        """What ``width`` runs hold on one device at their most, the data set included.

        The larger of training and evaluation, by the compiler's own count. It compiles what these
        runs will need anyway, and computes nothing.

        Args:
          names: of the runs' hyperparameters.
          width: how many runs go together.
        """
        state, training, evaluations = self.lowered(names, width)
        held = _size(state) // (self._mesh.runs if self._mesh else 1)
        evaluating = (held + _bytes(one.compile()) for one in evaluations)
        return max(_bytes(training.compile()), *evaluating)

    def lowered(self, names: Sequence[str], width: int) -> tuple[Any, Any, list[Any]]:
        """Shapes of the state, and the programs of training and of each split, not yet compiled."""
        shape = (width,) if self.together else ()
        # Real arrays, whose places belong to the key under which jit finds the program again.
        hyperparams = self.place(dict.fromkeys(names, np.zeros(shape, np.float32)))
        seeds, data = self.place(np.zeros(shape, np.uint32)), self.program.problem.data
        state = jax.eval_shape(self.init, hyperparams, seeds)
        drawn = jax.eval_shape(self._draw, state.step, seeds, data)
        params = jax.eval_shape(self._evaluated, state)
        if self.scans:
            training = self._interval.lower(state, hyperparams, drawn, data)
            return state, training, [f.lower(params, data) for f in self._evaluate.values()]
        training = self._step.lower(state, hyperparams, drawn, 0, data)
        groups = self._evaluate_group.values()
        return state, training, [f.lower(params, data, 0) for f in groups]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RawKey:
    """A PRNG key as numbers: jit compiles again for typed keys that are divided among devices."""

    data: chex.Array
    impl: Any = dataclasses.field(metadata={"static": True})


def _with_raw_keys(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `Program.draw` give its keys as numbers."""

    def raw(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return _RawKey(jax.random.key_data(x), jax.random.key_impl(x))

    @functools.wraps(draw)
    def function(*arguments: Any) -> Any:
        return jax.tree.map(raw, draw(*arguments))

    return function


def _with_typed_keys(advance: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `Program.interval` and `Program.step` take what that gives."""

    def typed(x: Any) -> Any:
        return jax.random.wrap_key_data(x.data, impl=x.impl) if isinstance(x, _RawKey) else x

    @functools.wraps(advance)
    def function(state: RunState, hyperparams: Any, drawn: Any, *others: Any) -> Any:
        drawn = jax.tree.map(typed, drawn, is_leaf=lambda x: isinstance(x, _RawKey))
        return advance(state, hyperparams, drawn, *others)

    return function


def _of_split(function: Callable[..., Any], split: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def of_split(*arguments: Any) -> Any:
        return function(split, *arguments)

    return of_split


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled program, on one device."""
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not count
        return 0
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )

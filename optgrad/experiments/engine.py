"""The training loop: one compiled function that serves every run of a study.

A *study* is a batch of runs of one optimizer: values of hyperparameters × seeds. All runs share
one compilation of the training step, because hyperparameters and seeds are traced. They are either

- ``"vmap"``-ed: all runs advance together in one program (accelerators, where a lone small network
  leaves the hardware idle), or
- ``"map"``-ped: one run after the other through the same compiled function (CPU, where the cores
  are busy with one run already; `benchmarks/vectorization.py` shows the times).

An evaluation interval is one `lax.scan`. There is one exception, which the engine makes itself: on
CPU, XLA runs a convolution inside any loop many times slower than outside, so there a host loop
drives one compiled step.

Initialisation, batches and augmentation are functions of (seed, step) alone: a run gives the same
numbers, up to float rounding, whatever runs beside it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad import registry
from optgrad.core import checks, oracles, transforms
from optgrad.experiments import checkpoint
from optgrad.experiments import features as features_lib
from optgrad.experiments.problems import Problem

VECTORIZE = ("auto", "vmap", "map")
# What every problem has, and what it has if it has a function of that name.
_ALWAYS = ("params", "value", "grad", "value_fn", "per_example_grads", "gradient_variance")
_OPTIONAL = {
    "outputs_fn": "outputs",
    "out_loss_fn": "out_loss",
    "residual_fn": "residuals",
    "kfac_stats": "layer_statistics",
}
PROVIDED = frozenset({*_ALWAYS, *_OPTIONAL})
_LABELS = 2  # folded into a run's key; its initialisation and batches have the two of its split


class Runs(NamedTuple):
    """A batch of R runs: what differs between them."""

    hyperparams: Mapping[str, np.ndarray]  # traced hyperparameters, each of shape [R]
    seeds: np.ndarray  # integers [R]


class RunState(NamedTuple):
    """Where one run stands; under vmap with a leading axis of runs."""

    params: Any
    opt_state: Any
    step: chex.Array  # steps taken, int32 ()
    diverged_at: chex.Array  # first step (from 1) whose loss was not finite, 0 if none, int32 ()


class History(NamedTuple):
    """What R runs did, at E evaluations; NaN from an evaluation's divergence on."""

    steps: np.ndarray  # [E], from 0
    metrics: Mapping[str, np.ndarray]  # each [R, E]; train_loss, test_accuracy, …
    diverged_at: np.ndarray  # [R], 0 for a run that did not diverge
    seconds: float  # wall time of the training, compilation included


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
    ) -> None:
        checks.check_one_of("vectorize", vectorize, VECTORIZE)
        checks.check_in_range("eval_every", eval_every, 1)
        if missing := method.needs - PROVIDED:
            raise ValueError(
                f"{method.name} needs {', '.join(sorted(missing))}, which the harness does not "
                f"compute; accepted: methods that need any of {', '.join(sorted(PROVIDED))}"
            )
        features.check(method)
        self._extras = _extras_for(problem, method)
        # Where the statistics stand in for gradients of the examples, they are of the same labels.
        self._samples_labels = (
            "kfac_stats" in self._extras and "per_example_grads" not in method.needs
        )
        on_cpu = jax.default_backend() == "cpu"
        self.problem, self.method = problem, method
        self.hyperparams = dict(hyperparams or {})
        self.eval_every = eval_every
        self.microbatch_size, self.features = microbatch_size, features
        self.vectorize = ("map" if on_cpu else "vmap") if vectorize == "auto" else vectorize
        self.scans = not (on_cpu and problem.has_convolutions)
        over_runs = jax.vmap if self.vectorize == "vmap" else _not_vectorized
        self._init = jax.jit(over_runs(self._init_run))
        self._batches = jax.jit(over_runs(self._draw_batches, in_axes=(0, 0, None)))
        # Donation lets XLA update parameters and averages in place.
        self._interval = jax.jit(
            over_runs(self._train_interval, in_axes=(0, 0, 0, None)), donate_argnums=0
        )
        self._step = jax.jit(
            over_runs(self._train_step, in_axes=(0, 0, 0, None, None)), donate_argnums=0
        )
        self._evaluate = jax.jit(
            over_runs(self._evaluate_split, in_axes=(0, None, None)), static_argnums=2
        )
        self._evaluate_one = jax.jit(
            over_runs(problem.evaluate, in_axes=(0, None, None, None)), static_argnums=2
        )
        self._width: int | None = None

    @property
    def compilations(self) -> int:
        """How often the training step has been compiled."""
        compiled: Any = self._interval if self.scans else self._step
        return int(compiled._cache_size())

    def check(self, hyperparams: Iterable[str]) -> None:
        """Traces one interval of one run without running it: raises what it would raise.

        Args:
          hyperparams: names of the hyperparameters that the runs will have.
        """
        scalar = jnp.zeros((), jnp.float32)
        seed = jnp.zeros((), jnp.uint32)
        values = dict.fromkeys(hyperparams, scalar)
        state = jax.eval_shape(self._init_run, values, seed)
        drawn = jax.eval_shape(self._draw_batches, state.step, seed, self.problem.data)
        jax.eval_shape(self._train_interval, state, values, drawn, self.problem.data)

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
        self._width = (self._width or count) if vmapped else 1
        records: checkpoint.Records = []
        seconds = 0.0
        waves = waves or checkpoint.Waves()
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
                _replay(found, self.eval_every, report)
            seconds += wave.seconds
            records += found[: count - first]
        evaluations = np.arange(0, steps + 1, self.eval_every)
        names = [name for name in records[0][0] if name != "diverged_at"]
        metrics = {name: np.array([[r[name] for r in run] for run in records]) for name in names}
        diverged_at = np.array([int(run[-1]["diverged_at"]) for run in records])
        return History(evaluations, metrics, diverged_at, seconds)

    # One wave of runs, on the host ------------------------------------------------------------

    def _train_wave(
        self, runs: Runs, steps: int, wave: checkpoint.Wave, on_interval: OnInterval
    ) -> checkpoint.Records:
        hyperparams = {k: jnp.asarray(v, jnp.float32) for k, v in runs.hyperparams.items()}
        seeds = jnp.asarray(runs.seeds, jnp.uint32)
        state = self._init(hyperparams, seeds)
        train_loss = jnp.full(seeds.shape, jnp.nan)
        records: checkpoint.Records = [[] for _ in np.atleast_1d(runs.seeds)]
        if interrupted := wave.load(state):
            state, records = interrupted
            _replay(records, self.eval_every, on_interval)
        for step in range(len(records[0]) * self.eval_every, steps + 1, self.eval_every):
            if step:
                state, train_loss = self._advance(state, hyperparams, seeds)
            evaluated = self.features.evaluated(state.params, state.opt_state)
            metrics = {"train_loss": train_loss, **self._evaluate_all(evaluated)}
            host = {k: np.atleast_1d(np.asarray(v, float)) for k, v in metrics.items()}
            diverged_at = np.atleast_1d(np.asarray(state.diverged_at))
            for row, record in enumerate(records):
                found = {k: float(v[row]) for k, v in host.items()}
                at = int(record[-1]["diverged_at"]) if record else 0
                at = at or int(diverged_at[row])
                if step and not at and not np.isfinite(list(found.values())).all():
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

    def _advance(
        self, state: RunState, hyperparams: Any, seeds: chex.Array
    ) -> tuple[RunState, chex.Array]:
        """One evaluation interval, and the mean training loss over it."""
        drawn = self._batches(state.step, seeds, self.problem.data)
        if self.scans:
            state, train_loss = self._interval(state, hyperparams, drawn, self.problem.data)
            return state, train_loss
        total = jnp.zeros(seeds.shape)
        for index in range(self.eval_every):
            state, loss = self._step(state, hyperparams, drawn, index, self.problem.data)
            total += loss
        return state, total / self.eval_every

    def _evaluate_all(self, params: Any) -> dict[str, chex.Array]:
        metrics: dict[str, chex.Array] = {}
        for split, batches in self.problem.splits.items():
            if self.scans:
                sums = self._evaluate(params, self.problem.data, split)
            else:
                parts = [
                    self._evaluate_one(params, self.problem.data, split, index)
                    for index in range(batches)
                ]
                sums = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts)
            metrics |= {f"{split}_{k}": v / sums["count"] for k, v in sums.items() if k != "count"}
        return metrics

    # One run, inside jit ----------------------------------------------------------------------

    def _optimizer(self, hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        return self.features.optimizer(self.method, {**self.hyperparams, **hyperparams})

    def _init_run(self, hyperparams: Any, seed: chex.Array) -> RunState:
        init_key, _ = jax.random.split(jax.random.key(seed))
        params = self.problem.init(init_key)
        opt_state = self._optimizer(hyperparams).init(params)
        zero = jnp.zeros((), jnp.int32)
        return transforms.strongly_typed(
            RunState(params, opt_state, zero, diverged_at=jnp.zeros_like(zero))
        )

    def _draw_batches(self, first_step: chex.Array, seed: chex.Array, data: Any) -> Any:
        """What identifies the batches of an interval, and a key for each step that needs one."""
        key = jax.random.key(seed)
        _, batch_key = jax.random.split(key)
        drawn = self.problem.batches(data, batch_key, first_step, self.eval_every)
        keys = None
        if self._samples_labels:
            label_key = jax.random.fold_in(key, _LABELS)
            steps = first_step + jnp.arange(self.eval_every)
            keys = jax.vmap(lambda step: jax.random.fold_in(label_key, step))(steps)
        return drawn, keys

    def _train_interval(
        self, state: RunState, hyperparams: Any, drawn: Any, data: Any
    ) -> tuple[RunState, chex.Array]:
        def step(state: RunState, one: Any) -> tuple[RunState, chex.Array]:
            return self._update(state, hyperparams, one, data)

        state, losses = jax.lax.scan(step, state, drawn)
        return state, jnp.mean(losses)

    def _train_step(
        self, state: RunState, hyperparams: Any, drawn: Any, index: chex.Array, data: Any
    ) -> tuple[RunState, chex.Array]:
        one = jax.tree.map(lambda x: x[index], drawn)
        return self._update(state, hyperparams, one, data)

    def _update(
        self, state: RunState, hyperparams: Any, one: Any, data: Any
    ) -> tuple[RunState, chex.Array]:
        drawn, key = one
        value, grad, extra = self._oracles(state.params, self.problem.batch(data, drawn), key)
        updates, opt_state = self._optimizer(hyperparams).update(
            grad, state.opt_state, state.params, **extra
        )
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        is_first = (state.diverged_at == 0) & ~jnp.isfinite(value)
        diverged_at = jnp.where(is_first, step, state.diverged_at)
        return transforms.strongly_typed(RunState(params, opt_state, step, diverged_at)), value

    def _oracles(
        self, params: Any, batch: Any, key: chex.PRNGKey | None
    ) -> tuple[chex.Array, Any, dict[str, Any]]:
        """Loss, gradient, and the extra arguments for the method."""
        problem: Any = self.problem  # whose optional functions were looked for
        variance = None
        if "gradient_variance" in self._extras:
            value, grad, variance = oracles.value_grad_and_variance(
                problem.example_loss, params, batch, microbatch_size=self.microbatch_size
            )
        else:
            value, grad = jax.value_and_grad(problem.loss)(params, batch)
        builders: dict[str, Callable[[], Any]] = {
            "value": lambda: value,
            "grad": lambda: grad,
            "gradient_variance": lambda: variance,
            "value_fn": lambda: lambda p: problem.loss(p, batch),
            "outputs_fn": lambda: lambda p: problem.outputs(p, batch),
            "out_loss_fn": lambda: lambda z: problem.out_loss(z, batch),
            "residual_fn": lambda: lambda p: problem.residuals(p, batch),
            "kfac_stats": lambda: problem.layer_statistics(params, batch, key),
            "per_example_grads": lambda: oracles.per_example_grads(
                problem.example_loss, params, batch, microbatch_size=self.microbatch_size
            ),
        }
        return value, grad, {name: builders[name]() for name in self._extras}

    def _evaluate_split(self, params: Any, data: Any, split: str) -> dict[str, chex.Array]:
        def one(index: chex.Array) -> dict[str, chex.Array]:
            return self.problem.evaluate(params, data, split, index)

        parts = jax.lax.map(one, jnp.arange(self.problem.splits[split]))
        return {name: jnp.sum(values) for name, values in parts.items()}


def _extras_for(problem: Problem, method: registry.Method) -> tuple[str, ...]:
    """The extra arguments that the method is given.

    Those that it needs, and if it is not a baseline (optax's line searches refuse what they do not
    know) the functions that its options may ask for. Of two that a method takes either of, the one
    that is cheaper to hold.

    Raises:
      ValueError: if the problem lacks something that the method needs.
    """
    needs = method.extras(has_layers=problem.layer_statistics is not None)
    lacks = {name for name, field in _OPTIONAL.items() if getattr(problem, field) is None}
    if missing := needs & lacks:
        fields = ", ".join(_OPTIONAL[name] for name in sorted(missing))
        raise ValueError(
            f"{method.name} needs {', '.join(sorted(missing))}, which the problem {problem.name!r} "
            f"does not have; accepted: a Problem with {fields}"
        )
    if method.family != "baselines":
        needs |= {"value", "grad", "value_fn", "outputs_fn", "out_loss_fn"} - lacks
    return tuple(sorted(needs))


def _replay(records: checkpoint.Records, eval_every: int, on_interval: OnInterval) -> None:
    """Reports what was measured before an interruption."""
    for row, run in enumerate(records):
        for index, record in enumerate(run):
            on_interval(row, index * eval_every, record)


def _not_vectorized(function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    del in_axes
    return function

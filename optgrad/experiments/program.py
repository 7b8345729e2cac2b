"""One run, inside jit: its beginning, its batches, its steps and its evaluation."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad import registry
from optgrad.core import transforms
from optgrad.experiments.extras import Extras
from optgrad.experiments.features import Features
from optgrad.experiments.mesh import RunMesh
from optgrad.experiments.problems import Problem, step_keys

_LABELS = 2  # folded into a run's key; its initialisation and batches have the two of its split


class RunState(NamedTuple):
    """Where one run stands; under vmap with a leading axis of runs."""

    params: Any
    opt_state: Any
    step: chex.Array  # steps taken, int32 ()
    # First step (from 1) whose loss was not finite, or a guard gave up, 0 if none; int32 ()
    diverged_at: chex.Array


class Losses(NamedTuple):
    """Training losses of an interval, with all that training adds: regularisation, dropout."""

    mean: chex.Array
    first: chex.Array  # of its first batch, before any update


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a run of one optimizer on one problem computes; pure functions, to be jitted.

    Everything random is a function of (seed, step) alone.

    Attributes:
      problem: what to train on.
      method: the optimizer's record.
      hyperparams: fixed hyperparameters; those of a run come on top, traced.
      eval_every: steps of an interval.
      features: what surrounds the method.
      extras: what its update is given.
      mesh: among whose devices the examples of a batch are divided, if there is one.
    """

    problem: Problem
    method: registry.Method
    hyperparams: Mapping[str, Any]
    eval_every: int
    features: Features
    extras: Extras
    mesh: RunMesh | None = None

    def check(self, hyperparams: Iterable[str]) -> None:
        """Traces one interval without running it: raises what it would raise.

        Args:
          hyperparams: names of those that a run will have.
        """
        seed, data = jnp.zeros((), jnp.uint32), self.problem.data
        values = dict.fromkeys(hyperparams, jnp.zeros((), jnp.float32))
        state = jax.eval_shape(self.init, values, seed)
        drawn = jax.eval_shape(self.draw, state.step, seed, data)
        if self.mesh:

            def first_batch(data: Any, drawn: Any) -> Any:
                return self.problem.batch(data, jax.tree.map(lambda x: x[0], drawn))

            self.mesh.check_batch(jax.eval_shape(first_batch, data, drawn[0]))
        jax.eval_shape(self.interval, state, values, drawn, data)

    def init(self, hyperparams: Any, seed: chex.Array) -> RunState:
        """The state before the first step."""
        init_key, _ = jax.random.split(jax.random.key(seed))
        params = self.problem.init(init_key)
        opt_state = self._optimizer(hyperparams).init(params)
        zero = jnp.zeros((), jnp.int32)
        return transforms.strongly_typed(
            RunState(params, opt_state, zero, diverged_at=jnp.zeros_like(zero))
        )

    def draw(self, first_step: chex.Array, seed: chex.Array, data: Any) -> Any:
        """What identifies the batches of an interval, and a key for each step that needs one."""
        key = jax.random.key(seed)
        _, batch_key = jax.random.split(key)
        drawn = self.problem.batches(data, batch_key, first_step, self.eval_every)
        keys = None
        if self.extras.samples_labels:
            label_key = jax.random.fold_in(key, _LABELS)
            keys = step_keys(label_key, first_step + jnp.arange(self.eval_every))
        return drawn, keys

    def interval(
        self, state: RunState, hyperparams: Any, drawn: Any, data: Any
    ) -> tuple[RunState, Losses]:
        """All steps of an interval."""

        def step(state: RunState, one: Any) -> tuple[RunState, chex.Array]:
            return self._update(state, hyperparams, one, data)

        state, losses = jax.lax.scan(step, state, drawn)
        if not self.features.guard:
            return state, Losses(jnp.mean(losses), losses[0])
        return state, Losses(self.mean(jax.vmap(self.counted)(losses).sum(axis=0)), losses[0])

    def counted(self, loss: chex.Array) -> chex.Array:
        """A step's loss; under a guard the loss and 1, or zeros where it is not finite, (2,)."""
        if not self.features.guard:
            return loss
        return jnp.where(jnp.isfinite(loss), jnp.stack([loss, jnp.ones_like(loss)]), 0)

    def mean(self, total: chex.Array) -> chex.Array:
        """Of an interval's losses, which were `counted` and added up; NaN if none was finite."""
        return total[0] / total[1] if self.features.guard else total / self.eval_every

    def step(
        self, state: RunState, hyperparams: Any, drawn: Any, index: chex.Array, data: Any
    ) -> tuple[RunState, chex.Array]:
        """One step of an interval, and its loss."""
        one = jax.tree.map(lambda x: x[index], drawn)
        return self._update(state, hyperparams, one, data)

    def evaluated(self, state: RunState) -> Any:
        """The parameters that are evaluated."""
        return self.features.evaluated(self.method, state.params, state.opt_state)

    @property
    def computes_evaluated(self) -> bool:
        """Whether `evaluated` computes, for one run, what the state does not hold."""
        return self.method.evaluation_params is not None and not self.features.ema

    def observed(self, state: RunState) -> dict[str, chex.Array]:
        """What guard and monitor tell of the last interval, scalars by name."""
        return self.features.observed(state.opt_state)

    def evaluate(self, split: str, params: Any, data: Any) -> dict[str, chex.Array]:
        """Sums of the metrics over a split."""

        def one(index: chex.Array) -> dict[str, chex.Array]:
            return self.evaluate_group(split, params, data, index)

        parts = jax.lax.map(one, jnp.arange(self.groups(split)))
        return {name: jnp.sum(values) for name, values in parts.items()}

    def groups(self, split: str) -> int:
        """Into how many groups the batches of a split are divided: see `evaluate_group`."""
        return -(-self.problem.splits[split] // (self.mesh.data if self.mesh else 1))

    def evaluate_group(
        self, split: str, params: Any, data: Any, group: chex.Numeric
    ) -> dict[str, chex.Array]:
        """Sums of the metrics over one batch of a split; on a mesh, one batch for each device."""

        def one(index: chex.Numeric) -> dict[str, chex.Array]:
            return self.problem.evaluate(params, data, split, index)

        if not self.mesh or self.mesh.data == 1:
            return one(group)
        indices = group * self.mesh.data + jnp.arange(self.mesh.data)
        last = self.problem.splits[split] - 1
        parts = jax.vmap(one)(self.mesh.divide_examples(jnp.minimum(indices, last)))
        return {k: jnp.sum(jnp.where(indices <= last, v, 0)) for k, v in parts.items()}

    def _update(
        self, state: RunState, hyperparams: Any, one: Any, data: Any
    ) -> tuple[RunState, chex.Array]:
        drawn, key = one
        batch = self.problem.batch(data, drawn)
        if self.mesh:
            batch = self.mesh.divide_examples(batch)
        value, grad, extra = self.extras.build(state.params, batch, key)
        updates, opt_state = self._optimizer(hyperparams).update(
            grad, state.opt_state, state.params, **extra
        )
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        failed = self.features.failed(opt_state) if self.features.guard else ~jnp.isfinite(value)
        is_first = (state.diverged_at == 0) & failed
        diverged_at = jnp.where(is_first, step, state.diverged_at)
        return transforms.strongly_typed(RunState(params, opt_state, step, diverged_at)), value

    def _optimizer(self, hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        return self.features.optimizer(self.method, {**self.hyperparams, **hyperparams})

"""What surrounds a method in training: schedule, weight decay, accumulation, averaged weights.

All of it is wrapped around the optimizer, innermost first, so that the training loop knows nothing
of it:

1. the method, whose learning rate is a schedule of its own updates;
2. decoupled weight decay, by the same learning rate;
3. the moving average of the parameters after each update;
4. the guard, which leaves out updates that are not finite;
5. the monitor of what the method models;
6. gradient accumulation: what is inside is called once in several training steps.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad import registry
from optgrad.core import averages, checks, diagnostics, transforms
from optgrad.wrappers.guard import GuardState, guard
from optgrad.wrappers.monitor import monitor, monitored
from optgrad.wrappers.multi_steps import MultiSteps

LEARNING_RATE = "learning_rate"
MONITOR = "monitor/"  # before the names of what is monitored, among a run's metrics
QUANTILES = (0.05, 0.5, 0.95)
_AVERAGED = ("value", "grad", "gradient_variance")  # over the micro-batches of an update


@dataclasses.dataclass(frozen=True)
class Features:
    """What surrounds the method; the default is nothing.

    Attributes:
      schedule: update number -> factor of the learning rate, or None for a constant one.
      weight_decay: λ ≥ 0, see `with_weight_decay`.
      ema: d in [0, 1), see `with_average`; 0 for none.
      guard: how many updates in a row may be left out because they are not finite (see
        `optgrad.guard`) before a run counts as diverged; 0: none is left out.
      monitor: updates in an interval over which is recorded what the method models (see
        `optgrad.monitor`); 0 for none.
      accumulate: k ≥ 1, training steps (micro-batches) of an update.
      batch_size: examples of a micro-batch, from which the variance of the accumulated gradient
        follows.
    """

    schedule: optax.Schedule | None = None
    weight_decay: float = 0.0
    ema: float = 0.0
    guard: int = 0
    monitor: int = 0
    accumulate: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        checks.check_in_range("weight_decay", self.weight_decay, 0.0, high_open=True)
        checks.check_in_range("ema", self.ema, 0.0, 1.0, high_open=True)
        checks.check_count("guard", self.guard, 0)
        checks.check_count("monitor", self.monitor, 0)
        checks.check_count("accumulate", self.accumulate, 1)

    def check(self, method: registry.Method) -> None:
        """Refuses a method that these features cannot be wrapped around.

        Raises:
          ValueError: naming the field, the method and what is accepted.
        """
        asked = {"schedule": self.schedule is not None, "weight_decay": bool(self.weight_decay)}
        tuned = method.tunes.hyperparameter if method.tunes else "nothing"
        for field in (field for field, is_asked in asked.items() if is_asked):
            if tuned != LEARNING_RATE:
                remedy = " (or l2)" if field == "weight_decay" else ""
                raise ValueError(
                    f"{field}: {method.name} has no learning rate to go by, it tunes {tuned}; "
                    f"accepted: methods that tune {LEARNING_RATE}{remedy}"
                )
        if self.weight_decay and "weight_decay" in method.hyperparameters:
            raise ValueError(
                f"weight_decay = {self.weight_decay}: {method.name} decays the parameters itself; "
                f"accepted: its own hyperparams.weight_decay, or the method without (adam)"
            )
        if self.accumulate > 1 and (whole := self._cannot_accumulate(method)):
            raise ValueError(
                f"accumulate = {self.accumulate}: {method.name} needs {', '.join(whole)} of the "
                "whole batch; accepted: methods that need gradients, their variance or the loss, "
                "or accumulate = 1 with a larger batch_size"
            )

    @staticmethod
    def _cannot_accumulate(method: registry.Method) -> list[str]:
        return sorted(method.extras(has_layers=True) - set(_AVERAGED))

    def optimizer(
        self, method: registry.Method, hyperparams: Mapping[str, Any]
    ) -> optax.GradientTransformationExtraArgs:
        """The method with these hyperparameters, surrounded; the learning rate is the peak."""
        schedule = self.schedule
        given = dict(hyperparams)
        rate = given.get(LEARNING_RATE, _default(method, LEARNING_RATE))
        if schedule is not None:
            peak = rate
            rate = given[LEARNING_RATE] = lambda count: peak * schedule(count)
        optimizer = method.factory(**given)
        if self.weight_decay:
            optimizer = with_weight_decay(optimizer, rate, self.weight_decay)
        if self.ema:
            optimizer = with_average(optimizer, self.ema, method.evaluated)
        if self.guard:
            optimizer = guard(optimizer, max_consecutive=self.guard)
        if self.monitor:
            optimizer = monitor(optimizer, interval=self.monitor, quantiles=QUANTILES)
        if self.accumulate > 1:
            names = {"value", *method.extras(has_layers=True)} & set(_AVERAGED)
            optimizer = _accumulated(optimizer, self.accumulate, names, self.batch_size)
        return optimizer

    def evaluated(self, method: registry.Method, params: Any, opt_state: Any) -> Any:
        """The parameters to evaluate: their average where one is kept, else the method's."""
        if not self.ema:
            return method.evaluated(opt_state, params)
        return diagnostics.states_of(opt_state, AverageState)[0].average

    def failed(self, opt_state: Any) -> chex.Array:
        """Whether the guard has given up; bool, shape ()."""
        failed: chex.Array = diagnostics.states_of(opt_state, GuardState)[0].failed
        return failed

    def observed(self, opt_state: Any) -> dict[str, chex.Array]:
        """Scalars by name: ``rejected_steps``, and ``monitor/<quantity>/<number>``."""
        scalars: dict[str, chex.Array] = {}
        if self.guard:
            scalars["rejected_steps"] = diagnostics.states_of(opt_state, GuardState)[0].rejected
        if self.monitor:
            for name, summary in monitored(opt_state).items():
                low, median, high = jnp.moveaxis(summary.quantiles, -1, 0)
                numbers = {
                    "min": summary.min, "low": low, "median": median, "mean": summary.mean,
                    "high": high, "max": summary.max,
                }  # fmt: skip
                scalars |= {f"{MONITOR}{name}/{key}": x for key, x in numbers.items()}
        return scalars


PLAIN = Features()


class WeightDecayState(NamedTuple):
    """State of `with_weight_decay`."""

    inner_state: Any  # of the optimizer
    count: chex.Array  # updates so far, int32 ()


def with_weight_decay(
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: chex.Numeric,
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay beside an optimizer's update.

    .. math:: \theta \leftarrow \theta + u_t - \alpha_t\,\lambda\,\theta

    on the weights, arrays of two or more axes; biases follow the optimizer alone. With Adam it is
    AdamW. Unlike L2 regularisation, the decay is seen by no average of the optimizer's. Optimizers
    that take their updates to be applied exactly as they are (``csawg`` with ``paper``) misread it.

    Args:
      optimizer: gives u.
      learning_rate: α ≥ 0, the optimizer's: a number, a traced scalar or a schedule.
      weight_decay: λ ≥ 0.

    Returns:
      The transformation; it needs ``params``.

    Examples:
      >>> optimizer = with_weight_decay(optax.with_extra_args_support(optax.sgd(0.5)), 0.5, 0.1)
      >>> params = {"weight": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> zero = optax.tree.zeros_like(params)
      >>> updates, _ = optimizer.update(zero, optimizer.init(params), params)
      >>> print(updates["weight"], updates["bias"] == 0)
      [[-0.05 -0.05]] [ True  True]

    References:
      I. Loshchilov and F. Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """

    def init(params: optax.Params) -> WeightDecayState:
        return WeightDecayState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: WeightDecayState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, WeightDecayState]:
        params = transforms.require_params(params)
        updates, inner = optimizer.update(updates, state.inner_state, params, **extra)
        shrinkage = transforms.hyperparameter_at(learning_rate, state.count) * weight_decay
        updates = jax.tree.map(
            lambda u, p: (u - shrinkage * p).astype(u.dtype) if jnp.ndim(p) > 1 else u,
            updates,
            params,
        )
        return updates, WeightDecayState(inner, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


class AverageState(NamedTuple):
    """State of `with_average`."""

    inner_state: Any  # of the optimizer
    count: chex.Array  # updates so far, int32 ()
    average: optax.Params  # m_t, float32 at least; before the first update the parameters


def with_average(
    optimizer: optax.GradientTransformationExtraArgs,
    decay: chex.Numeric,
    evaluated: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that keeps an exponential moving average of the parameters, for evaluation.

    .. math:: m_t = \frac{1}{1 - d^t} \sum_{i=1}^t (1 - d)\,d^{t-i}\,\theta_i

    over the parameters *after* each update. It is bias-corrected: the weights sum to 1, and the
    initial parameters have none; :math:`m_1 = \theta_1`. The updates are the optimizer's own.

    Args:
      optimizer: to be followed.
      decay: d in [0, 1); about the last 1/(1 − d) updates count.
      evaluated: (state, params) -> the parameters that are averaged, where the optimizer is not
        evaluated at those that it trains; see `registry.Method.evaluated`.

    Returns:
      The transformation; it needs ``params``, and its state has the field ``average``.

    Examples:
      >>> optimizer = with_average(optax.with_extra_args_support(optax.sgd(1.0)), 0.5)
      >>> params = jnp.zeros(())
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # θ = −1, −2; weights 1/3, 2/3
      ...     updates, state = optimizer.update(jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{state.average:.4f}")
      -1.6667
    """

    def init(params: optax.Params) -> AverageState:
        average = jax.tree.map(lambda p: jnp.asarray(p, averages.average_dtype(p)), params)
        return AverageState(optimizer.init(params), jnp.zeros((), jnp.int32), average)

    def update(
        updates: optax.Updates,
        state: AverageState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AverageState]:
        params = transforms.require_params(params)
        updates, inner = optimizer.update(updates, state.inner_state, params, **extra)
        count = optax.safe_increment(state.count)
        moved = optax.apply_updates(params, updates)
        if evaluated is not None:
            moved = evaluated(inner, moved)
        weights = averages.sample_weights(count, decay)
        average = averages.update_mean(state.average, moved, weights)
        return updates, AverageState(inner, count, average)

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulated(
    optimizer: optax.GradientTransformationExtraArgs,
    every_k: int,
    names: set[str],
    num_examples: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient accumulation; of the extra arguments, those of these names are averaged.

    The others are left out: they are offered to options that few use, and belong to a micro-batch.
    """
    accumulation = MultiSteps(optimizer, every_k, average=tuple(sorted(names)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        kept = {name: extra[name] for name in names & extra.keys()}
        new: tuple[optax.Updates, Any] = accumulation.update(
            updates, state, params, num_examples=num_examples, **kept
        )
        return new

    return optax.GradientTransformationExtraArgs(accumulation.init, update)


def _default(method: registry.Method, name: str) -> Any:
    """The default of a hyperparameter, or None if it has none or there is no such one."""
    parameter = method.hyperparameters.get(name)
    is_given = parameter is not None and parameter.default is not inspect.Parameter.empty
    return parameter.default if parameter is not None and is_given else None

"""Runs of any optimizer with everything that it may need, charged in gradient equivalents."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import optgrad
from optgrad.core import transforms

Extras = Callable[[Any, Any], dict[str, Any]]  # (params, batch) -> value, grad and all the others
Array = npt.NDArray[Any]


class Recorded(NamedTuple):
    """T updates of a run; index t: after t + 1 of them."""

    costs: Array  # gradient equivalents spent, shape (T,)
    observed: Any  # what was observed of the parameters, leading axis T
    params: Any  # the last ones


def create(name: str, **hyperparams: Any) -> optax.GradientTransformationExtraArgs:
    """A registered optimizer that may be handed more than it needs."""
    needed = sorted(optgrad.get_method(name).needs - {"params"})
    return optgrad.filter_extra(optgrad.create(name, **hyperparams), needed)


def charged(state: Any, spent: chex.Array) -> chex.Array:
    """Gradient equivalents after a step: as the method counts, else as optax' searches tell.

    Args:
      state: the optimizer's new state.
      spent: what had been spent before the step.
    """
    counted = optgrad.diagnostics(state).get("gradient_equivalents")
    if counted is None:
        evaluations = optax.tree.get_all_with_path(state, "num_linesearch_steps")
        counted = spent + 1.0 + sum(jnp.asarray(number) for _, number in evaluations)
    return jnp.asarray(counted, spent.dtype)


def step_of(optimizer: optax.GradientTransformationExtraArgs, extras: Extras) -> Any:
    """One training step, ((params, state, cost), batch) -> the new carry, to be traced."""

    def step(carry: Any, batch: Any) -> Any:
        params, state, spent = carry
        available = extras(params, batch)
        updates, state = optimizer.update(available["grad"], state, params, **available)
        return (
            optax.apply_updates(params, updates),
            transforms.strongly_typed(state),
            charged(state, spent),
        )

    return step


def start(optimizer: optax.GradientTransformationExtraArgs, params: Any) -> Any:
    """The first carry of `step_of`."""
    return params, transforms.strongly_typed(optimizer.init(params)), jnp.zeros(())


def record(
    optimizer: optax.GradientTransformationExtraArgs,
    extras: Extras,
    params: Any,
    steps: int,
    *,
    observe: Callable[[Any], Any],
    batch: Any = None,
) -> Recorded:
    """A run on one batch, in one compiled scan.

    Args:
      optimizer: takes what ``extras`` gives.
      extras: such as `optgrad.curvature_args` makes.
      params: θ₀.
      steps: number of updates.
      observe: params -> what to keep after each update.
      batch: is handed to ``extras``.
    """
    step = step_of(optimizer, extras)

    def body(carry: Any, _: Any) -> Any:
        carry = step(carry, batch)
        return carry, (carry[2], observe(carry[0]))

    @jax.jit
    def run(params: Any) -> Any:
        return jax.lax.scan(body, start(optimizer, params), None, length=steps)

    (last, _, _), (costs, observed) = run(params)
    return Recorded(np.asarray(costs), jax.tree.map(np.asarray, observed), last)


def within_budget(
    optimizer: optax.GradientTransformationExtraArgs,
    extras: Extras,
    params: Any,
    *,
    draw: Callable[[Any, int], Any],
    budget: float,
    at_once: int,
) -> Iterator[tuple[Any, float]]:
    """Trains on a stream of batches until the budget is spent: (params, cost) after each interval.

    Args:
      optimizer: takes what ``extras`` gives.
      extras: such as `optgrad.curvature_args` makes.
      params: θ₀.
      draw: (first step, number of steps) -> batches with a leading axis of steps, traced.
      budget: gradient equivalents.
      at_once: steps in an interval, which is compiled once.
    """
    step = step_of(optimizer, extras)

    @jax.jit
    def interval(carry: Any, first: Any) -> Any:
        batches = draw(first, at_once)
        return jax.lax.scan(lambda c, batch: (step(c, batch), None), carry, batches)[0]

    carry = jax.jit(lambda p: start(optimizer, p))(params)
    first = 0
    while float(carry[2]) < budget:
        carry = interval(carry, jnp.int32(first))
        first += at_once
        yield carry[0], float(carry[2])
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(carry[0])):
            return


def first_cost(costs: Array, values: Array, bound: float) -> float:
    """What it cost to come to ``bound`` or below; infinite if it never did."""
    reached = np.flatnonzero(values <= bound)
    return float(costs[reached[0]]) if len(reached) else np.inf

"""The deterministic toy problems of the second-order survey, and how many steps a method takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad import diagnostics
from optgrad.core import transforms
from optgrad.experiments import functions


@dataclasses.dataclass(frozen=True)
class Toy:
    """A function with one start, and the value at which it counts as solved.

    Attributes:
      name: as in the tables.
      fn: params -> value.
      start: θ₀, NumPy arrays in float64.
      target: solved at or below.
      target32: the same in float32.
      residual_fn: params -> r with fn = ½Σr², where it is a least-squares problem.
    """

    name: str
    fn: Callable[[Any], chex.Array]
    start: Any
    target: float
    target32: float
    residual_fn: Callable[[Any], Any] | None = None

    def params(self, dtype: Any = None) -> Any:
        """θ₀ in a floating-point type."""
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self.start)

    def extras(self, params: Any) -> dict[str, Any]:
        """Every extra argument that a method may need here, ``value`` and ``grad`` among them."""
        value, grad = jax.value_and_grad(self.fn)(params)
        found = {"value": value, "grad": grad, "value_fn": self.fn}
        if self.residual_fn is None:
            outputs_fn, out_loss_fn = (lambda p: p), self.fn
        else:
            found["residual_fn"] = outputs_fn = self.residual_fn
            out_loss_fn = _half_squares
        return found | {"outputs_fn": outputs_fn, "out_loss_fn": out_loss_fn}


class Solved(NamedTuple):
    """What a run on a `Toy` needed."""

    steps: int | None  # updates until the target, None if it was not reached
    cost: float  # gradient equivalents, NaN where the method does not count them
    value: float  # the last one
    increases: int  # updates after which the value was larger than before
    params: Any  # the last ones


def solve(
    toy: Toy,
    optimizer: optax.GradientTransformation,
    max_steps: int,
    *,
    dtype: Any = None,
) -> Solved:
    """Runs an optimizer until the toy is solved or its budget ends, in one compiled loop.

    Args:
      toy: the problem.
      optimizer: takes the extra arguments of `Toy.extras`.
      max_steps: budget of updates.
      dtype: of the parameters; the default float type if None.
    """
    return compiled(toy, optimizer, max_steps)(toy.params(dtype))


def compiled(
    toy: Toy, optimizer: optax.GradientTransformation, max_steps: int
) -> Callable[[Any], Solved]:
    """`solve` from any start, compiled once for all of them."""
    optimizer = optax.with_extra_args_support(optimizer)

    def run(params: Any) -> Any:
        target = toy.target if _is_double(params) else toy.target32

        def running(carry: Any) -> Any:
            params, _, step, _ = carry
            value = toy.fn(params)
            return (step < max_steps) & ~(value <= target) & jnp.isfinite(value)

        def body(carry: Any) -> Any:
            params, state, step, increases = carry
            extras = toy.extras(params)
            updates, state = optimizer.update(extras["grad"], state, params, **extras)
            params = optax.apply_updates(params, updates)
            rose = toy.fn(params) > extras["value"]
            return params, transforms.strongly_typed(state), step + 1, increases + rose

        zero = jnp.zeros((), jnp.int32)
        first = (params, transforms.strongly_typed(optimizer.init(params)), zero, zero)
        return jax.lax.while_loop(running, body, first)

    run = jax.jit(run)

    def solved(params: Any) -> Solved:
        last, state, steps, increases = run(params)
        value = float(toy.fn(last))
        cost = float(diagnostics(state).get("gradient_equivalents", np.nan))
        target = toy.target if _is_double(params) else toy.target32
        # The loop may have rounded the value that ended it otherwise.
        reached = value <= target or (int(steps) < max_steps and bool(np.isfinite(value)))
        return Solved(int(steps) if reached else None, cost, value, int(increases), last)

    return solved


def _is_double(params: Any) -> bool:
    return bool(jax.tree.leaves(params)[0].dtype == jnp.float64)


def _half_squares(residuals: Any) -> chex.Array:
    return 0.5 * sum(jnp.sum(r * r) for r in jax.tree.leaves(residuals))


def _quadratic() -> Toy:
    """½xᵀHx in 12 dimensions, condition 1000, no axis a principal one, f₀ = 407."""
    generator = np.random.default_rng(0)
    axes, _ = np.linalg.qr(generator.standard_normal((12, 12)))
    root = np.sqrt(np.logspace(0, 3, 12))[:, None] * axes.T  # H = rootᵀ·root
    start = generator.standard_normal(12)
    start *= np.sqrt(407 / (0.5 * np.sum((root @ start) ** 2)))

    def residuals(x: chex.Array) -> chex.Array:
        return jnp.dot(jnp.asarray(root, x.dtype), x, precision=jax.lax.Precision.HIGHEST)

    return Toy("Q", lambda x: _half_squares(residuals(x)), start, 1e-20, 1e-8, residuals)


def _saddle(name: str, y: float) -> Toy:
    """A saddle at 0 between two minima of value −1; y is the distance to its stable manifold."""

    def fn(p: Any) -> chex.Array:
        return functions.saddle_of(p["x"], p["y"])

    start = {"x": np.array(1.0), "y": np.array(y)}
    return Toy(name, fn, start, -1 + 1e-6, -1 + 1e-6)


def _ill_conditioned_saddle() -> Toy:
    def fn(p: Any) -> chex.Array:
        return functions.ill_conditioned_saddle_of(p["x"], p["y"])

    start = {"x": np.array(1.0), "y": np.array(1e-6)}
    return Toy("I", fn, start, -0.01 + 1e-8, -0.01 + 1e-8)


def _rosenbrock(name: str, x: float, y: float) -> Toy:
    def residuals(p: Any) -> chex.Array:
        return jnp.stack([10.0 * (p["y"] - p["x"] ** 2), 1.0 - p["x"]]) * np.sqrt(2.0)

    def fn(p: Any) -> chex.Array:
        return 100.0 * (p["y"] - p["x"] ** 2) ** 2 + (1.0 - p["x"]) ** 2

    start = {"x": np.array(x), "y": np.array(y)}
    return Toy(name, fn, start, 1e-12, 1e-8, residuals)


TOYS = {
    toy.name: toy
    for toy in (
        _quadratic(),
        _saddle("S2", 1e-2),
        _saddle("S6", 1e-6),
        _saddle("S0", 0.0),
        _ill_conditioned_saddle(),
        _rosenbrock("R1", -1.0, 0.0),
        _rosenbrock("R2", -1.2, 1.0),
    )
}

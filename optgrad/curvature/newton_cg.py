"""Truncated Newton as transformations: the direction alone, and steps that are tried."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import linalg, oracles, transforms, trees
from optgrad.curvature import trial
from optgrad.curvature.newton_equation import Solver, Step

MODES = ("trust", "lm", "direction")
LEAST_RADIUS = 1e-15

_LEAST_RATIO = 1e-4  # of a step in a trust region


# --- the direction alone ------------------------------------------------------------------------


class DirectionState(NamedTuple):
    """State of a Newton direction that is not tried."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # directions that were not finite, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    iterations: chex.Array  # of conjugate gradients in the last step, int32, shape ()
    negative_curvature: chex.Array  # whether they ended at negative curvature, bool, shape ()
    previous: Any  # the last direction, a tree like the parameters, () without warm start

    def diagnostics(self) -> dict[str, chex.Array]:
        """Iterations and negative curvature of the last step, costs; scalars."""
        return {
            "cg_iterations": self.iterations,
            "negative_curvature": self.negative_curvature,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def direction(solver: Solver, damping: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation u -> (B + λI)⁻¹u."""

    def init(params: optax.Params) -> DirectionState:
        return DirectionState(
            trial.zero_count(),
            trial.zero_count(),
            trial.scalar(0.0),
            trial.zero_count(),
            jnp.asarray(False),
            linalg.zeros_like(params) if solver.warm else (),
        )

    def update(
        updates: optax.Updates,
        state: DirectionState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], chex.Array] | None = None,
        curvature_fn: Callable[[Any], chex.Array] | None = None,
        outputs_fn: Callable[[Any], Any] | None = None,
        out_loss_fn: Callable[[Any], chex.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, DirectionState]:
        del extra
        params = transforms.require_params(params)
        count = optax.safe_increment(state.count)
        product = solver.product(params, curvature_fn or value_fn, outputs_fn, out_loss_fn)
        if not trees.size(params):
            return updates, state._replace(count=count, cost=state.cost + 1.0)
        step = solver.solve(
            product, updates, transforms.hyperparameter_at(damping, state.count), state.previous
        )
        found, finite = trial.finite_only(step.direction, params)
        return found, DirectionState(
            count,
            trial.counted_unless(finite, state.rejected),
            state.cost + 1.0 + solver.cost(step.iterations),
            step.iterations,
            step.negative_curvature,
            linalg.where(finite, solver.remembered(found), state.previous),
        )

    return transforms.transformation(init, update)


# --- steps that are tried -----------------------------------------------------------------------


class NewtonCGState(NamedTuple):
    """State of Newton's method with a radius or a damping that follows the gain ratio."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    scale: chex.Array  # next radius or damping, as a multiple of its hyperparameter, shape ()
    radius: chex.Array  # of the last step's trust region, 0 if there is none, shape ()
    damping: chex.Array  # λ of the last step, shape ()
    ratio: chex.Array  # actual by predicted decrease of the last step, shape ()
    iterations: chex.Array  # of conjugate gradients in the last step, int32, shape ()
    negative_curvature: chex.Array  # whether they ended at negative curvature, bool, shape ()
    previous: Any  # the last step taken, a tree like the parameters, () without warm start

    def diagnostics(self) -> dict[str, chex.Array]:
        """Radius, damping, gain ratio and iterations of the last step, costs; scalars."""
        return {
            "radius": self.radius,
            "damping": self.damping,
            "gain_ratio": self.ratio,
            "cg_iterations": self.iterations,
            "negative_curvature": self.negative_curvature,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def guarded(
    solver: Solver, damping: Any, *, radius: Any = None, max_radius: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The method θ ← θ − (B + λI)⁻¹u that tries its steps.

    Args:
      solver: poses and solves Newton's equation.
      damping: λ; it follows the gain ratio if there is no radius.
      radius: initial radius of a trust region, which follows the gain ratio then.
      max_radius: its largest value.
    """

    def init(params: optax.Params) -> NewtonCGState:
        return NewtonCGState(
            count=trial.zero_count(),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
            scale=trial.scalar(1.0),
            radius=trial.scalar(0.0),
            damping=trial.scalar(0.0),
            ratio=trial.scalar(0.0),
            iterations=trial.zero_count(),
            negative_curvature=jnp.asarray(False),
            previous=linalg.zeros_like(params) if solver.warm else (),
        )

    def factor(current: chex.Array, step: Step, ratio: chex.Array) -> chex.Array:
        """What the radius or damping is multiplied by."""
        if radius is None:
            return trial.rescaled_damping(current, ratio, up=1.5, down=1.5) / current
        shrunk = 0.25 * jnp.minimum(linalg.norm(step.direction) / current, 1.0)
        grown = jnp.where((ratio > 0.75) & step.hit_boundary, 2.0, 1.0)
        return jnp.where(ratio < 0.25, shrunk, grown)

    def update(
        updates: optax.Updates,
        state: NewtonCGState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], chex.Array] | None = None,
        curvature_fn: Callable[[Any], chex.Array] | None = None,
        outputs_fn: Callable[[Any], Any] | None = None,
        out_loss_fn: Callable[[Any], chex.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NewtonCGState]:
        del extra
        params = transforms.require_params(params)
        value_fn = oracles.require_function("value_fn", value_fn)
        product = solver.product(params, curvature_fn or value_fn, outputs_fn, out_loss_fn)
        count = optax.safe_increment(state.count)
        if not trees.size(params):
            return updates, state._replace(count=count, cost=state.cost + 1.0)
        shift = trial.scalar(transforms.hyperparameter_at(damping, state.count))
        size = None
        if radius is None:
            nominal = shift
            current = shift = jnp.clip(shift * state.scale, trial.LEAST_DAMPING, trial.MOST_DAMPING)
        else:
            nominal = trial.scalar(transforms.hyperparameter_at(radius, state.count))
            most = transforms.hyperparameter_at(max_radius, state.count)
            current = size = jnp.clip(nominal * state.scale, LEAST_RADIUS, most)
        step = solver.solve(product, updates, shift, state.previous, size)
        value = trial.scalar(value_fn(params))
        tried = trial.attempt(
            value_fn,
            params,
            linalg.scale(-1.0, step.direction),
            value,
            step.predicted,
            least_ratio=None if size is None else _LEAST_RATIO,
        )
        # Where there is no number to begin with, the model is not to blame.
        posed = jnp.isfinite(value) & linalg.all_finite(updates)
        change = factor(current, step, tried.ratio)
        change = jnp.where(posed & jnp.isfinite(change), change, 1.0)
        spent = 1.0 + solver.cost(step.iterations) + 2 * oracles.VALUE_COST
        taken = linalg.scale(-1.0, tried.updates)
        return tried.updates, NewtonCGState(
            count=count,
            rejected=trial.counted_unless(tried.accepted, state.rejected),
            cost=state.cost + spent,
            scale=current * change / jnp.where(nominal > 0, nominal, 1.0),
            radius=jnp.zeros_like(shift) if size is None else size,
            damping=shift,
            ratio=tried.ratio,
            iterations=step.iterations,
            negative_curvature=step.negative_curvature,
            previous=solver.remembered(taken),
        )

    return transforms.transformation(init, update)

"""Newton's method with the whole Hessian, for few parameters: what its three variants share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles, transforms, trees
from optgrad.curvature import trial

TYPICAL_COST = 1.0 + 2 * 100  # of a step, in gradient equivalents, for a hundred parameters


class DenseNewtonState(NamedTuple):
    """Counters and what is known of the Hessian; the matrix itself is not kept."""

    count: chex.Array  # number of updates, int32, shape ()
    damping: chex.Array  # λ of the next step if it adapts itself, else of the last one, shape ()
    curvature_min: chex.Array  # smallest eigenvalue of the last Hessian, shape ()
    curvature_max: chex.Array  # largest one, shape ()
    rejected: chex.Array  # number of steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Damping, smallest and largest eigenvalue, steps not taken, gradient equivalents."""
        return {
            "damping": self.damping,
            "curvature_min": self.curvature_min,
            "curvature_max": self.curvature_max,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


class Variant(NamedTuple):
    """How eigenvalues Λ and a damping λ become a step."""

    # (Λ, λ, number of the step) -> what Qᵀg is divided by
    divisor: Callable[[chex.Array, chex.Array, chex.Array], chex.Array]
    curvature: Callable[[chex.Array], chex.Array]  # Λ -> the curvatures of the model of the loss


def dense_newton(
    variant: Variant,
    learning_rate: float | optax.Schedule | None,
    *,
    damping: float | optax.Schedule = 0.0,
    adaptive: bool = False,
    hvp: str = "exact",
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""The step :math:`-\alpha\,Q\,\mathrm{diag}(1/d_i)\,Q^\top g`, with H = QΛQᵀ and d = d(Λ, λ).

    Args:
      variant: what the eigenvalues become.
      learning_rate: α; None is the positive direction, without a sign.
      damping: λ; where it adapts itself, the one of the first step.
      adaptive: whether steps are tried, and λ follows the gain ratio.
      hvp: mode of `oracles.hessian_product`.
      max_size: largest number of parameters.
    """
    if learning_rate is not None:
        checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    checks.check_in_range("damping", damping, 0.0, low_open=adaptive, high_open=True)
    checks.check_one_of("adaptive", adaptive, (False, True))
    checks.check_one_of("hvp", hvp, oracles.HESSIAN_PRODUCT_COST)
    checks.check_count("max_size", max_size, 1)

    def init(params: optax.Params) -> DenseNewtonState:
        if (size := trees.size(params)) > max_size:
            raise ValueError(
                f"params has {size} entries; accepted: at most max_size = {max_size}, since each "
                f"step factorises a matrix of {size} × {size} (lanczos_saddle_free and "
                "truncated_newton have no such limit)"
            )
        count = trial.zero_count()
        return DenseNewtonState(
            count=count,
            damping=trial.scalar(transforms.hyperparameter_at(damping, count)),
            curvature_min=trial.scalar(0.0),
            curvature_max=trial.scalar(0.0),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
        )

    def update(
        updates: optax.Updates,
        state: DenseNewtonState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, DenseNewtonState]:
        del extra
        params = transforms.require_params(params)
        value_fn = oracles.require_function("value_fn", value_fn)
        count = optax.safe_increment(state.count)
        if not (size := trees.size(params)):
            return transforms.cast_like(updates, params), state._replace(count=count)
        value = None if value is None else transforms.require_value(value)
        rate: chex.Numeric = 1.0  # of the direction; else of the step
        if learning_rate is not None:
            rate = -trial.scalar(transforms.hyperparameter_at(learning_rate, state.count))
        used = state.damping
        if not adaptive:
            used = trial.scalar(transforms.hyperparameter_at(damping, state.count))

        product = oracles.hessian_product(value_fn, params, hvp)
        curvatures, step, predicted = _step(
            variant, product, params, updates, damping=used, rate=rate, count=state.count
        )
        cost = 1.0 + size * oracles.HESSIAN_PRODUCT_COST[hvp]
        if adaptive:
            # Without a value, one more is spent on it.
            cost += oracles.VALUE_COST * (1 if value is not None else 2)
            value = transforms.require_value(value_fn(params) if value is None else value)
            tried = trial.attempt(value_fn, params, step, value, predicted)
            found, accepted = tried.updates, tried.accepted
            # What is not finite before the step says nothing about the damping.
            known = jnp.isfinite(value) & linalg.all_finite(updates)
            adapted = trial.rescaled_damping(used, tried.ratio, up=4.0, down=3.0)
            used = jnp.where(known, adapted, used)
        else:
            found, accepted = trial.finite_only(step, params)
            accepted &= True if value is None else jnp.isfinite(value)
            found = trial.taken(accepted, found)
        is_matrix = jnp.all(jnp.isfinite(curvatures))
        least, most = trial.scalar(curvatures[0]), trial.scalar(curvatures[-1])
        new = DenseNewtonState(
            count=count,
            damping=used,
            curvature_min=jnp.where(is_matrix, least, state.curvature_min),
            curvature_max=jnp.where(is_matrix, most, state.curvature_max),
            rejected=trial.counted_unless(accepted, state.rejected),
            cost=state.cost + cost,
        )
        return found, new

    return transforms.transformation(init, update)


def _step(
    variant: Variant,
    product: linalg.Product,
    params: optax.Params,
    updates: optax.Updates,
    *,
    damping: chex.Array,
    rate: chex.Numeric,
    count: chex.Array,
) -> tuple[chex.Array, chex.ArrayTree, chex.Array]:
    """All eigenvalues, the step, and by how much the loss decreases by the model of it."""
    curvatures, axes = linalg.eigh(oracles.dense_matrix(product, params))
    gradient, unravel = trees.ravel(linalg.widened(updates))
    along = _matmul(axes.T, gradient)  # Qᵀg
    divisor = variant.divisor(curvatures, damping.astype(along.dtype), count)
    along_step = jnp.asarray(rate, along.dtype) * _quotient(along, divisor)
    slope = along + 0.5 * variant.curvature(curvatures) * along_step
    return (
        curvatures,
        unravel(_matmul(axes, along_step)),
        trial.scalar(-jnp.sum(slope * along_step)),
    )


def _matmul(matrix: chex.Array, vector: chex.Array) -> chex.Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _quotient(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
    """x/y with 0/0 = 0: along an axis without a gradient there is nothing to do."""
    nothing = numerator == 0
    return jnp.where(nothing, 0.0, numerator / jnp.where(nothing, 1.0, denominator))

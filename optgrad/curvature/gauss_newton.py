"""Gauss–Newton: Newton's method for least squares without second derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import optax

from optgrad.core import oracles, transforms, trees
from optgrad.curvature import least_squares, trial
from optgrad.registry import Method, Tunable, register


class GaussNewtonState(NamedTuple):
    """Counters; the method has no memory."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # directions that were not finite, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    iterations: chex.Array  # of conjugate gradients in the last step, int32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Iterations of the last step, costs; scalars."""
        return {
            "cg_iterations": self.iterations,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def gauss_newton(
    learning_rate: float | optax.Schedule = 1.0,
    *,
    solver: str = "cg",
    maxiter: int = 50,
    tolerance: float | optax.Schedule = 1e-3,
    residual_scale: float | optax.Schedule = 0.5,
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss–Newton for least squares, matrix-free or dense, without damping.

    .. math::
      F = s\,|r(\theta)|^2, \qquad \theta \leftarrow \theta - \alpha\,(2s\,J^\top J)^{-1} u

    with the residuals r, their Jacobian J and the incoming updates u, the gradient
    :math:`2s\,J^\top r` of F: with α = 1 the minimum of the linearised problem.

    It shines near solutions with small residuals, which it reaches quadratically: one step on a
    linear problem, 2 steps on Rosenbrock's function. Elsewhere it may overshoot, diverge or stall,
    since nothing bounds its step where J is close to singular: on a random network it stalls at a
    loss of 0.27. Use `levenberg_marquardt` unless you know better.

    ``solver="cg"`` costs 1 gradient and 2 for each iteration; ``"dense"`` as many gradients as
    there are parameters, and a matrix of residuals by parameters. The state has no vectors.

    Args:
      learning_rate: α ≥ 0; 1 is Gauss–Newton's step.
      solver: ``"cg"``, conjugate gradients, which take the shortest step where J has not full rank;
        or ``"dense"``, a QR factorisation of J with one step of refinement, which does not square
        the condition number, and takes no step where J is singular to working precision.
      maxiter: most iterations of conjugate gradients, ≥ 1.
      tolerance: of conjugate gradients, relative to ‖u‖, in [0, 1).
      residual_scale: s > 0; ½ by default, 1 for a sum of squares, 1/n for their mean.
      max_size: largest number of parameters that ``"dense"`` accepts.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters and ``residual_fn``.
      Steps are not tried: F may increase. A direction that is not finite is a zero update, counted
      in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, for more than ``max_size`` parameters in
        ``init``, and by ``update`` if ``residual_fn`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> residuals = lambda x: jnp.array([x[0] - 1.0, 10 * (x[1] - x[0] ** 2)])
      >>> loss = lambda x: 0.5 * jnp.sum(residuals(x) ** 2)
      >>> optimizer = optgrad.gauss_newton(solver="dense")
      >>> params = jnp.array([-1.2, 1.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     gradient = jax.grad(loss)(params)
      ...     updates, state = optimizer.update(gradient, state, params, residual_fn=residuals)
      ...     params = params + updates
      >>> print([f"{x:.3f}" for x in params])
      ['1.000', '1.000']

    References:
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), p. "Gauss-Newton".
      Å. Björck, "Stability analysis of the method of seminormal equations", 1987: the dense
      solution.

    Deviations from the slides: they print :math:`(J^\top J)^{-1} J f` where :math:`J^\top f` is
    meant.
    """
    direction = scale_by_gauss_newton(
        solver=solver,
        maxiter=maxiter,
        tolerance=tolerance,
        residual_scale=residual_scale,
        max_size=max_size,
    )
    return transforms.with_learning_rate(direction, learning_rate)


def scale_by_gauss_newton(
    *,
    solver: str = "cg",
    maxiter: int = 50,
    tolerance: float | optax.Schedule = 1e-3,
    residual_scale: float | optax.Schedule = 0.5,
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of `gauss_newton`, :math:`(2s\,J^\top J)^{-1}u`, without a learning rate.

    Args:
      solver: ``"cg"`` or ``"dense"``.
      maxiter: most iterations of conjugate gradients, ≥ 1.
      tolerance: of conjugate gradients, relative to ‖u‖, in [0, 1).
      residual_scale: s > 0 of the loss s·Σr².
      max_size: largest number of parameters that ``"dense"`` accepts.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters and ``residual_fn``.

    Raises:
      ValueError: as for `gauss_newton`.
    """
    chosen = least_squares.Solver(solver, "identity", maxiter, tolerance, residual_scale, max_size)

    def init(params: optax.Params) -> GaussNewtonState:
        chosen.check_size(params)
        zero = trial.zero_count
        return GaussNewtonState(zero(), zero(), trial.scalar(0.0), zero())

    def update(
        updates: optax.Updates,
        state: GaussNewtonState,
        params: optax.Params | None = None,
        *,
        residual_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GaussNewtonState]:
        del extra
        params = transforms.require_params(params)
        residual_fn = oracles.require_function(
            "residual_fn", residual_fn, least_squares.RESIDUAL_ARGS
        )
        count = optax.safe_increment(state.count)
        if not trees.size(params):
            return updates, state._replace(count=count, cost=state.cost + 1.0)
        model = least_squares.linearize(residual_fn, params)
        step, cost = chosen.solve(model, updates, trial.scalar(0.0), state.count)
        found, finite = trial.finite_only(step.direction, params)
        return found, GaussNewtonState(
            count,
            trial.counted_unless(finite, state.rejected),
            state.cost + 1.0 + cost,
            step.iterations,
        )

    return transforms.transformation(init, update)


register(
    Method(
        name="gauss_newton",
        factory=gauss_newton,
        scale_by=scale_by_gauss_newton,
        family="curvature",
        title="Gauss-Newton",
        reference=trial.SLIDES,
        equation="Gauss-Newton: θ ← θ − α(2sJᵀJ)⁻¹g",
        needs=frozenset({"params", "residual_fn"}),
        static_args=("solver", "maxiter", "max_size"),
        tunes=Tunable("learning_rate", 1e-3, 1.0),
        # With fewer residuals than parameters nothing but an early end bounds the steps.
        test_hyperparams={"learning_rate": 0.1, "maxiter": 2, "tolerance": 0.1},
        state_size=0,
        cost=20,
    )
)

"""Levenberg–Marquardt: damped Gauss–Newton steps that are tried."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles, transforms, trees
from optgrad.curvature import least_squares, trial
from optgrad.registry import Method, Tunable, register

RULES = ("nielsen", "marquardt", "fixed")
_MOST_GROWTH = 1e12


class LevenbergMarquardtState(NamedTuple):
    """A damping that follows the gain ratio."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    scale: chex.Array  # next damping, as a multiple of its hyperparameter, shape ()
    growth: chex.Array  # ν, what λ is multiplied by at the next failure, shape ()
    damping: chex.Array  # λ of the last step, shape ()
    ratio: chex.Array  # actual by predicted decrease of the last step, shape ()
    iterations: chex.Array  # of conjugate gradients in the last step, int32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Damping, gain ratio and iterations of the last step, costs; scalars."""
        return {
            "damping": self.damping,
            "gain_ratio": self.ratio,
            "cg_iterations": self.iterations,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def levenberg_marquardt(
    damping: float | optax.Schedule = 1e-2,
    *,
    solver: str = "cg",
    scaling: str = "identity",
    rule: str = "nielsen",
    maxiter: int = 50,
    tolerance: float | optax.Schedule = 1e-3,
    residual_scale: float | optax.Schedule = 0.5,
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg–Marquardt for least squares, matrix-free or dense.

    .. math::
      F = s\,|r(\theta)|^2, \qquad (2s\,J^\top J + \lambda D)\,d = -u, \qquad
      \theta \leftarrow \theta + d \quad\text{if}\quad F(\theta + d) \le F(\theta)

    with the residuals r, their Jacobian J, and the incoming updates u (the gradient of F, which is
    :math:`2s\,J^\top r`). The damping λ leads from Gauss–Newton's step to a short one along the
    gradient. By Nielsen's rule it follows the ratio ρ of actual to predicted decrease,

    .. math::
      \rho > 0:\ \lambda \leftarrow \lambda\max\bigl(\tfrac13, 1 - (2\rho - 1)^3\bigr),\ \nu = 2;
      \qquad\text{else}\quad \lambda \leftarrow \nu\lambda,\ \nu \leftarrow 2\nu

    It shines where residuals are small at the solution, which is then reached quadratically:
    Rosenbrock's function from (−1.2, 1) in 21 steps and 70 gradient equivalents (dense) to 10⁻¹², a
    quadratic of condition 10³ in 4 steps. Large residuals leave it as slow as a well scaled
    gradient descent, and JᵀJ sees no negative curvature. On minibatches it fits each batch.

    ``solver="cg"`` costs 1 gradient, 2 for each iteration and ⅓ for the trial, and 5 vectors of
    memory while it solves; ``"dense"`` as many gradients as there are parameters, and a matrix of
    residuals and parameters by parameters. The state has no vectors. It tries its steps, and must
    be the last of a chain, with learning rate 1, and with gradient and residuals of one batch.

    Args:
      damping: λ > 0, its first value, in [1e-12, 1e12] as all later ones; of a schedule, later
        values rescale what was learnt.
      solver: ``"cg"``, conjugate gradients; or ``"dense"``, a QR factorisation of
        :math:`[\sqrt{2s}J; \sqrt{\lambda}D^{1/2}]` with one step of refinement, which does not
        square the condition number.
      scaling: D: ``"identity"`` (Levenberg), or ``"marquardt"`` for the diagonal of 2s·JᵀJ, which
        makes the method independent of the parameters' units; entries below a rounding of the
        largest are raised to it. With ``"cg"`` the diagonal costs one gradient for each residual.
      rule: ``"nielsen"``; ``"marquardt"``, λ/10 after a success and 10·λ after a failure; or
        ``"fixed"``.
      maxiter: most iterations of conjugate gradients, ≥ 1.
      tolerance: of conjugate gradients, relative to ‖u‖, in [0, 1); 1e-3 suffices for training,
        fitting wants 1e-10 in double precision.
      residual_scale: s > 0; ½ by default, 1 for a sum of squares, 1/n for their mean.
      max_size: largest number of parameters that ``"dense"`` accepts.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters and ``residual_fn``.
      F never increases: bad steps are zero updates, counted in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, for more than ``max_size`` parameters in
        ``init``, and by ``update`` if ``residual_fn`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> residuals = lambda x: jnp.array([x[0] - 1.0, 10 * (x[1] - x[0] ** 2)])
      >>> loss = lambda x: 0.5 * jnp.sum(residuals(x) ** 2)
      >>> optimizer = optgrad.levenberg_marquardt(solver="dense")
      >>> params = jnp.array([-1.2, 1.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(25):
      ...     gradient = jax.grad(loss)(params)
      ...     updates, state = optimizer.update(gradient, state, params, residual_fn=residuals)
      ...     params = params + updates
      >>> print([f"{x:.3f}" for x in params])
      ['1.000', '1.000']

    References:
      K. Levenberg, "A method for the solution of certain non-linear problems in least squares",
      1944. D. Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963.
      H. B. Nielsen, "Damping parameter in Marquardt's method", 1999. Å. Björck, "Stability analysis
      of the method of seminormal equations", 1987: the dense solution.
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), p. "Gauss-Newton".

    Deviations from the slides: they print :math:`(J^\top J + \lambda I)^{-1} J f` where
    :math:`J^\top f` is meant.
    """
    chosen = least_squares.Solver(solver, scaling, maxiter, tolerance, residual_scale, max_size)
    checks.check_one_of("rule", rule, RULES)
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)

    def init(params: optax.Params) -> LevenbergMarquardtState:
        chosen.check_size(params)
        return LevenbergMarquardtState(
            count=trial.zero_count(),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
            scale=trial.scalar(1.0),
            growth=trial.scalar(2.0),
            damping=trial.scalar(0.0),
            ratio=trial.scalar(0.0),
            iterations=trial.zero_count(),
        )

    def update(
        updates: optax.Updates,
        state: LevenbergMarquardtState,
        params: optax.Params | None = None,
        *,
        residual_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, LevenbergMarquardtState]:
        del extra
        params = transforms.require_params(params)
        residual_fn = oracles.require_function(
            "residual_fn", residual_fn, least_squares.RESIDUAL_ARGS
        )
        count = optax.safe_increment(state.count)
        if not trees.size(params):
            return updates, state._replace(count=count, cost=state.cost + 1.0)
        nominal = trial.scalar(transforms.hyperparameter_at(damping, state.count))
        used = jnp.clip(nominal * state.scale, trial.LEAST_DAMPING, trial.MOST_DAMPING)
        model = least_squares.linearize(residual_fn, params)
        step, cost = chosen.solve(model, updates, used, state.count)
        scale = chosen.scale(state.count)

        def value_fn(p: Any) -> chex.Array:
            residual = residual_fn(p)
            return scale * linalg.dot(residual, residual)

        value = scale * model.value
        descent = linalg.scale(-1.0, step.direction)
        tried = trial.attempt(value_fn, params, descent, value, step.predicted, least_ratio=0.0)
        # Where there is no number to begin with, the model is not to blame.
        posed = jnp.isfinite(value) & linalg.all_finite(updates)
        change, growth = _rescaled(rule, tried.ratio, state.growth)
        return tried.updates, LevenbergMarquardtState(
            count=count,
            rejected=trial.counted_unless(tried.accepted, state.rejected),
            cost=state.cost + 1.0 + cost + oracles.VALUE_COST,
            scale=jnp.where(
                posed, used * change / jnp.where(nominal > 0, nominal, 1.0), state.scale
            ),
            growth=jnp.where(posed, growth, state.growth),
            damping=used,
            ratio=tried.ratio,
            iterations=step.iterations,
        )

    return transforms.transformation(init, update)


def _rescaled(rule: str, ratio: chex.Array, growth: chex.Array) -> tuple[chex.Array, chex.Array]:
    """What λ is multiplied by, and the next ν."""
    success = ratio > 0
    if rule == "fixed":
        return jnp.ones_like(ratio), growth
    if rule == "marquardt":
        return jnp.where(success, 0.1, 10.0).astype(ratio.dtype), growth
    shrunk = jnp.maximum(1 / 3, 1.0 - (2.0 * ratio - 1.0) ** 3)
    more = jnp.minimum(2.0 * growth, _MOST_GROWTH)
    return jnp.where(success, shrunk, growth), jnp.where(success, 2.0, more)


register(
    Method(
        name="levenberg_marquardt",
        factory=levenberg_marquardt,
        scale_by=None,
        family="curvature",
        title="Levenberg-Marquardt",
        reference=trial.SLIDES,
        equation="Levenberg-Marquardt: θ ← θ − (2sJᵀJ + λD)⁻¹g, λ by the gain ratio",
        needs=frozenset({"params", "residual_fn"}),
        static_args=("solver", "scaling", "rule", "maxiter", "max_size"),
        tunes=Tunable("damping", 1e-6, 1e3),
        test_hyperparams={"damping": 1.0},
        state_size=0,
        cost=20,
    )
)

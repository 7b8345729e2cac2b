"""Online gradient regression with a full Hessian, for few parameters."""

import functools
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, linalg, transforms, trees
from optgrad.online_regression import parabola, subspace, subspace_model
from optgrad.registry import Method, Tunable, register

_RIDGE = 1e-3  # the default


class OGRFullState(NamedTuple):
    """One paraboloid for all D parameters."""

    count: chex.Array  # number of updates, int32, shape ()
    model: parabola.Paraboloid  # means (D,) and covariances (D, D) of positions and gradients
    gradient_covariance: chex.Array | None  # C_gg, shape (D, D), with correlation_one
    momentum: chex.Array  # average gradient with decay γ, shape (D,)
    step_norm: chex.Array  # length of the last update, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled; costs as many eigendecompositions as a step.

        Returns:
          ``curvatures``: eigenvalues of the modelled Hessian (with the default ridge), ascending,
          shape (D,); ``curvature_min`` and ``curvature_max``: the first and the last of them;
          ``step_norm``: length of the last update. All 0 before the second gradient.
        """
        curvatures = jnp.zeros_like(self.momentum)
        if curvatures.size:
            curvatures = jnp.linalg.eigvalsh(_hessian(self.model, self.gradient_covariance, _RIDGE))
        # Without parameters there is nothing to look up.
        ends = curvatures if curvatures.size else jnp.zeros(1, self.step_norm.dtype)
        return {
            "curvatures": curvatures,
            "curvature_min": ends[0],
            "curvature_max": ends[-1],
            "step_norm": self.step_norm,
        }


def ogr_full(
    alpha: float | optax.Schedule | None = None,
    beta: float | optax.Schedule | None = None,
    gamma: float | optax.Schedule | None = None,
    epsilon: float | optax.Schedule | None = None,
    lr_max: float | optax.Schedule | None = None,
    *,
    ridge: float | optax.Schedule | None = None,
    correlation_one: bool = False,
    max_size: int = 1000,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Online gradient regression with the full Hessian (fOGR, cfOGR).

    .. math::
      H &: \; HC + CH = B + B^T, \qquad H = O\,\mathrm{diag}(\lambda)\,O^T \\
      \theta &\leftarrow \theta - O\,\mathrm{diag}\bigl(\min(\alpha/|\lambda_i|,\,
        lr_{max})\bigr)\,O^T m

    C is the covariance of recent positions, B that of gradients and positions, H the symmetric
    matrix that fits the gradients best, and m the momentum: Newton's step with a Hessian that is
    learnt from the gradients alone and repels from saddles. The best of the family on problems of
    a few parameters; its memory and time, :math:`2D^2` numbers and two eigendecompositions of
    D × D per step, forbid it beyond. Along directions that the path has not visited the modelled
    curvature is 0 and ``lr_max`` is the learning rate: it has to suit the problem.

    Args:
      alpha: α > 0, confidence in the model (1/div of the notebooks); default 0.7, paper 1/1.5.
      beta: β in [0, 1), decay of the statistics; default 0.9, paper 0.5.
      gamma: γ in [0, 1), decay of the momentum; default 0.9, paper 0.4.
      epsilon: ε > 0, largest length of an update; default 1, paper infinite.
      lr_max: largest step size along any direction, in (0, ∞) (1/cut of the notebooks); default
        and paper 0.1.
      ridge: r ≥ 0, adds r·tr(C)/D to the eigenvalues of C; default 1e-3, paper 0.
      correlation_one: cfOGR: curvatures without sign from the geometric mean of
        :math:`C^{-1}` and the gradients' covariance, the matrix analogue of σg/σθ. It is enlarged
        by gradient noise and never negative.
      max_size: largest number of parameters that is accepted.
      paper: the notebooks' settings, with means that start at 0 and covariances of positions (and
        gradients) that start at the identity instead of being bias-corrected.

    Returns:
      A `GradientTransformationExtraArgs` without learning rate, whose state holds two D × D
      matrices (three with ``correlation_one``) and three vectors. `optgrad.diagnostics` reads its
      eigenvalues.

    Raises:
      ValueError: for a hyperparameter outside its range, in ``init`` for more than ``max_size``
        parameters, and in ``update`` if ``params`` is None.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> valley = lambda x: 5.0 * (x[0] + x[1]) ** 2 + 0.05 * (x[0] - x[1]) ** 2
      >>> optimizer = optgrad.ogr_full(lr_max=0.5)
      >>> theta = jnp.array([1.0, 0.5])
      >>> state = optimizer.init(theta)
      >>> update = jax.jit(optimizer.update)
      >>> for _ in range(100):
      ...     updates, state = update(jax.grad(valley)(theta), state, theta)
      ...     theta = optax.apply_updates(theta, updates)
      >>> print(state.diagnostics()["curvatures"].round(1), bool(valley(theta) < 1e-6))
      [ 0.2 20. ] True

    References:
      J. Duda, "Improving SGD convergence by online linear regression of gradients in multiple
      statistically relevant directions", 2019, and the author's notebooks of 2022–23 (fOGR); the
      Hessian of d directions: "SGD momentum optimizer with step estimation by online parabola
      model", 2019, Section V.

    Deviations from the paper: by default the averages are bias-corrected, C is regularised by
    ``ridge`` (the first D steps leave it singular) and the update is clipped. On the 3-D Beale
    lattice (50 steps, noise 0.1) ``paper=True`` ends at 0.0045 (geometric mean of 16 noise seeds,
    0.0035 to 0.0053); the author reports 0.00384.
    """
    alpha = _default(alpha, 1 / 1.5 if paper else 0.7)
    beta = _default(beta, 0.5 if paper else 0.9)
    gamma = _default(gamma, 0.4 if paper else 0.9)
    epsilon = _default(epsilon, None if paper else 1.0)
    lr_max = _default(lr_max, 0.1)
    ridge = _default(ridge, 0.0 if paper else _RIDGE)
    checks.check_in_range("alpha", alpha, 0.0, low_open=True, high_open=True)
    checks.check_in_range("beta", beta, 0.0, 1.0, high_open=True)
    checks.check_in_range("gamma", gamma, 0.0, 1.0, high_open=True)
    if epsilon is not None:
        checks.check_in_range("epsilon", epsilon, 0.0, low_open=True, or_infinite=True)
    checks.check_in_range("lr_max", lr_max, 0.0, low_open=True, high_open=True)
    checks.check_in_range("ridge", ridge, 0.0, high_open=True)
    checks.check_count("max_size", max_size, 1)

    def init(params: optax.Params) -> OGRFullState:
        size = trees.size(params)
        if size > max_size:
            raise ValueError(
                f"params has {size} entries; accepted: at most max_size = {max_size}, since the "
                f"state holds matrices of {size} × {size} (ogr_subspace has no such limit)"
            )
        dtype = _ravel(params).dtype
        model = parabola.init_paraboloid(size, dtype)
        prior = jnp.eye(size, dtype=dtype) * (1.0 if paper else 0.0)
        return OGRFullState(
            count=jnp.zeros((), jnp.int32),
            model=model._replace(position_covariance=prior),
            gradient_covariance=jnp.copy(prior) if correlation_one else None,
            momentum=jnp.zeros(size, dtype),
            step_norm=jnp.zeros((), dtype),
        )

    def update(
        updates: optax.Updates,
        state: OGRFullState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OGRFullState]:
        del extra
        params = transforms.require_params(params)
        if not trees.size(params):
            count = optax.safe_increment(state.count)
            return transforms.cast_like(updates, params), state._replace(count=count)
        at = functools.partial(_at, count=state.count)
        count = optax.safe_increment(state.count)
        theta, g = _ravel(params), _ravel(updates)
        weights, momentum_weights = (_weights(count, at(x), paper) for x in (beta, gamma))
        model = parabola.update_paraboloid(state.model, theta, g, weights)
        second = state.gradient_covariance
        if correlation_one:
            second = parabola.update_gradient_covariance(second, g, model.mean_gradient, weights)
        momentum = averages.update_mean(state.momentum, g, momentum_weights)
        curvatures, vectors = linalg.eigh(_hessian(model, second, at(ridge)))
        rates = subspace_model.step_sizes(curvatures, at(alpha), at(lr_max))
        step = -subspace.matmul(vectors, rates * subspace.matmul(vectors.T, momentum))
        norm = jnp.linalg.norm(step)
        if epsilon is not None:
            shrink = jnp.minimum(1.0, at(epsilon) / jnp.where(norm > 0, norm, 1.0))
            step, norm = shrink * step, shrink * norm
        norm = jnp.where(jnp.isfinite(norm), norm, state.step_norm)
        new = OGRFullState(count, model, second, momentum, norm)
        return _unravel(step, params), transforms.cast_like(new, state)

    return transforms.transformation(init, update)


def _hessian(
    model: parabola.Paraboloid, gradient_covariance: chex.Array | None, ridge: chex.Numeric
) -> chex.Array:
    hessian = parabola.hessian(
        model.position_covariance,
        model.covariance,
        gradient_covariance,
        estimator="symmetric_least_squares" if gradient_covariance is None else "geometric_mean",
        ridge=ridge,
    )
    return subspace.symmetric(hessian)


def _at(value: Any, count: chex.Array) -> chex.Array:
    return transforms.hyperparameter_at(value, count)


def _default(value: Any, preset: Any) -> Any:
    return preset if value is None else value


def _weights(count: chex.Array, decay: chex.Numeric, paper: bool) -> averages.SampleWeights:
    """Of the new sample; the notebooks' statistics start as a full prior.

    They add κ·d'd'ᵀ where the exact recursion has κ/(1−κ)·d'd'ᵀ, with d' from the new mean: a
    factor that C and B share, so that only the initial C counts differently.
    """
    if not paper:
        return averages.sample_weights(count, decay)
    weights = averages.constant_sample_weights(decay)
    return weights._replace(deviation=weights.new)


def _ravel(tree: chex.ArrayTree) -> chex.Array:
    """All leaves in one vector: only this method, of few parameters, may do so."""
    return trees.ravel(linalg.widened(tree))[0]


def _unravel(vector: chex.Array, like: chex.ArrayTree) -> chex.ArrayTree:
    return transforms.cast_like(trees.ravel(linalg.widened(like))[1](vector), like)


register(
    Method(
        name="ogr_full",
        factory=ogr_full,
        scale_by=None,
        family="online_regression",
        title="Online gradient regression with the full Hessian (fOGR)",
        reference=parabola.FOLLOW_UP,
        equation="fOGR of the author's notebooks: θ ← θ − O·min(α/|λ|, lr_max)·Oᵀm, "
        "HC + CH = B + Bᵀ, H = O·diag(λ)·Oᵀ",
        needs=frozenset({"params"}),
        static_args=("correlation_one", "max_size", "paper"),
        tunes=Tunable("lr_max", 1e-3, 1e1),
        test_hyperparams={"lr_max": 0.1},
        state_size=lambda size: 3 + 2 * size,
        low_precision="nothing: the matrices have no state_dtype and stay as they are",
        wide_state=(
            "model.mean_position",
            "model.mean_gradient",
            "model.position_covariance",
            "model.covariance",
        ),
    )
)

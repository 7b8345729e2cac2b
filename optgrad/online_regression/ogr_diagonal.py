"""Diagonal online gradient regression: one parabola for each coordinate."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, transforms
from optgrad.online_regression import coordinatewise as cw
from optgrad.online_regression import parabola
from optgrad.registry import Method, Tunable, register


class OGRDiagonalState(NamedTuple):
    """A regression of each coordinate's gradients against its positions."""

    count: chex.Array  # number of updates, int32, shape ()
    position: cw.Position  # mean position, like the parameters; see `coordinatewise`
    mean_gradient: optax.Updates  # ḡ, not bias-corrected, like the parameters
    position_variance: optax.Updates  # v ≥ 0, like the parameters
    covariance: optax.Updates  # c, like the parameters
    momentum: optax.Updates | None  # average with decay γ, not bias-corrected, if γ is given

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled, over the coordinates that have a curvature.

        Returns:
          The scalars of `coordinatewise.curvatures`.
        """
        return cw.curvatures(self.position_variance, self.covariance)

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """Those of `coordinatewise.per_parameter`."""
        return cw.per_parameter(self.position_variance, self.covariance)


def ogr_diagonal(
    alpha: float | optax.Schedule | None = None,
    beta: float | optax.Schedule | None = None,
    gamma: float | optax.Schedule | None = None,
    *,
    lr_min: float | optax.Schedule = 0.0,
    lr_max: float | optax.Schedule | None = None,
    skip_zero_gradients: bool | None = None,
    sigma_theta: float | None = None,
    position: str = "mean",
    state_dtype: Any | None = None,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Diagonal online gradient regression (dOGR): Newton's step per coordinate.

    .. math::
      v &\leftarrow \beta v + \tfrac{1-\beta}{\beta}(\theta-\bar\theta)^2, \quad
      c \leftarrow \beta c + \tfrac{1-\beta}{\beta}(\theta-\bar\theta)(g-\bar g), \quad
      \lambda = c/v \\
      \theta &\leftarrow \theta - m/\max(|\lambda|/\alpha,\; 1/\eta_{max})

    with exponentially weighted means of positions and gradients and m the momentum. It is
    `adaptive_sgd_c` without its confidence level; instead a low cap keeps the steps finite. The
    absolute value repels from saddles.

    Where curvature is well seen (small problems, little noise) the steps are Newton's, and
    short-lived statistics follow it: the defaults reach 4e-5 on a noisy Rosenbrock function and
    .017 on the lattice of Beale's, far above the rates that gradient descent survives there. In
    noisy training of a small network half to two thirds of the coordinates sit at the cap, so that
    this is momentum-SGD of rate ``lr_max`` whose steep minority is slowed down: ``lr_max`` is what
    is to be tuned, best near 1, and then level with tuned SGD. Longer memory (β ≥ 0.9) trains
    networks slightly better, and Rosenbrock's function, where the curvature changes faster, worse
    by orders of magnitude.

    Args:
      alpha: α > 0, confidence in the parabola; default 0.5, with ``paper`` 2/3 (the author's
        ``div`` is 1/α).
      beta: β in (0, 1), decay of all averages; default 0.8, with ``paper`` 0.5.
      gamma: γ in [0, 1), decay of the momentum, a further vector; default None, the momentum is the
        mean gradient of the regression; with ``paper`` 0.4.
      lr_min: δ ≥ 0, floor of the rate.
      lr_max: cap of the rate, in (0, ∞] and at least δ; default 1, with ``paper`` 0.1 (the author's
        ``cut`` is 1/lr_max). It is the rate wherever nothing is known of the curvature.
      skip_zero_gradients: whether a coordinate with a gradient of exactly 0 keeps its position and
        its statistics; default True, with ``paper`` False.
      sigma_theta: σθ⁰ > 0, the initial spread of positions; default 0.01, with ``paper`` 1. The
        first step is one of α√β·σθ⁰ in each coordinate, whatever the gradient's size, since the
        prior curvature is :math:`|g|/(\sqrt\beta\,\sigma_\theta^0)` of its first gradient g; with
        ``paper`` it is 0.
      position: ``"mean"``, ``"displacement"`` or ``"trusted"``, as in `adaptive_sgd`.
      state_dtype: type of the statistics; default the parameter's, but at least float32. The mean
        position is never kept in fewer bits.
      paper: the author's settings for runs of 30 to 50 steps on functions of few variables, where
        the mean position starts at 0 and the momentum is not bias-corrected.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds four vectors of parameter size, one more
      with ``gamma``, one more with ``position="displacement"``. Its ``update`` needs the
      parameters.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given the parameters.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.ogr_diagonal()
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(params)
      >>> for step in range(60):
      ...     updates, state = optimizer.update(curvature * params, state, params)
      ...     params = params + updates
      ...     if step == 0:
      ...         print([f"{u:.3f}" for u in updates])
      ['-0.004', '-0.004']
      >>> print(max(abs(params)) < 1e-3, f"{state.diagnostics()['curvature_max']:.0f}")
      True 97

    References:
      J. Duda, "Improving SGD convergence by online linear regression of gradients in multiple
      statistically relevant directions", 2019, and the notebooks "SGD-OGR-Hessian-estimator", 2022,
      where this is dOGR. (There β is the weight of the new sample, 1 − β here.)

    Deviations from the paper: the prior curvature, without which the first steps are those of
    gradient descent at the cap (with β = 0.5: .17 instead of .005 on Beale's lattice, 7e2 instead
    of 1e-4 on Rosenbrock's function); the bias-corrected momentum; and coordinates without a
    gradient, which are left alone. In exact arithmetic nothing else differs.
    """
    alpha = cw.default(alpha, 1 / 1.5 if paper else 0.5)
    beta = cw.default(beta, 0.5 if paper else 0.8)
    gamma = cw.default(gamma, 0.4 if paper else None)
    lr_max = cw.default(lr_max, 0.1 if paper else 1.0)
    skip = cw.default(skip_zero_gradients, not paper)
    sigma_theta = cw.default(sigma_theta, 1.0 if paper else 1e-2)
    cw.check_common(
        alpha=alpha,
        beta=beta,
        lr_min=lr_min,
        lr_max=lr_max,
        sigma_theta=sigma_theta,
        position=position,
        state_dtype=state_dtype,
    )
    if gamma is not None:
        checks.check_in_range("gamma", gamma, 0.0, 1.0, high_open=True)

    def init(params: optax.Params) -> OGRDiagonalState:
        count = jnp.zeros((), jnp.int32)
        # The author's increments lack the factor 1/β, so that his prior is one of σ²/β here.
        prior = sigma_theta**2 / cw.at(beta, count) if paper else sigma_theta**2

        def zeros() -> chex.ArrayTree:
            return averages.zeros_like_average(params, state_dtype)

        return OGRDiagonalState(
            count=count,
            position=cw.init_position(params, position, state_dtype, at_origin=paper),
            mean_gradient=zeros(),
            position_variance=averages.full_like_average(params, prior, state_dtype),
            covariance=zeros(),
            momentum=None if gamma is None else zeros(),
        )

    def update(
        updates: optax.Updates,
        state: OGRDiagonalState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OGRDiagonalState]:
        del extra
        params = transforms.require_params(params)
        confidence, decay, least, most = (
            cw.at(x, state.count) for x in (alpha, beta, lr_min, lr_max)
        )
        momentum_decay = decay if gamma is None else cw.at(gamma, state.count)
        weights = averages.constant_sample_weights(decay)
        count = optax.safe_increment(state.count)
        total = averages.sample_weights(count, momentum_decay).total
        total = jnp.ones_like(total) if paper else total

        def rule(
            sample: cw.Sample,
            mean: chex.Array,
            v: chex.Array,
            c: chex.Array,
            *momentum: chex.Array,
        ) -> tuple[chex.Array, ...]:
            g, d = sample.gradient, sample.deviation
            mean = sample.mean_gradient(mean, decay)
            v = sample.moment(v, d * d, weights.old, weights.deviation)
            before = c
            c = sample.moment(c, d * (g - mean), weights.old, weights.deviation)
            if not paper:  # a coordinate that has not had a gradient: curvature |g|/σθ
                c = jnp.where(before == 0, cw.root(v) * jnp.abs(g), c)
            momentum = tuple(sample.mean_gradient(m, momentum_decay) for m in momentum)
            steepness = jnp.abs(cw.divide(c, v))
            floor = np.finfo(g.dtype).tiny * 1e3  # so that α over it does not overflow
            rate = jnp.asarray(confidence, g.dtype) / jnp.maximum(steepness, floor)
            along = cw.direction((*momentum, mean)[0], g, total, momentum=True)
            return cw.descend(along, cw.limited(rate, least, most)), mean, v, c, *momentum

        vectors: tuple[Any, ...] = (state.mean_gradient, state.position_variance, state.covariance)
        if gamma is not None:
            vectors = (*vectors, state.momentum)
        updates, moved, vectors = cw.update_coordinates(
            rule, updates, params, state.position, vectors, beta=decay, form=position, skip=skip
        )
        mean, variance, covariance, *momentum = vectors
        last = None if gamma is None else momentum[0]
        return updates, OGRDiagonalState(count, moved, mean, variance, covariance, last)

    return transforms.transformation(init, update)


register(
    Method(
        name="ogr_diagonal",
        factory=ogr_diagonal,
        scale_by=None,
        family="online_regression",
        title="Diagonal online gradient regression (dOGR)",
        reference=parabola.FOLLOW_UP,
        equation="dOGR of the author's notebooks: θ ← θ − m/max(|λ|/α, 1/lr_max), λ = c/v",
        needs=frozenset({"params"}),
        static_args=("skip_zero_gradients", "position", "state_dtype", "paper"),
        tunes=Tunable("lr_max", 1e-3, 1e1),
        test_hyperparams={"lr_max": 1.0},
        state_size=4,
        low_precision=cw.LOW_PRECISION,
        wide_state=("position.stored", "position.previous"),
    )
)

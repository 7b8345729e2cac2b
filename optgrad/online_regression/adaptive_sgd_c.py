"""Adaptive SGD with confidence: one regression and its standard error for each coordinate."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, shards, transforms
from optgrad.online_regression import coordinatewise as cw
from optgrad.online_regression import parabola
from optgrad.registry import Method, Tunable, register

NOISES = ("coordinate", "tensor", "fixed")


class AdaptiveSGDcState(NamedTuple):
    """A regression of each coordinate's gradients against its positions."""

    count: chex.Array  # number of updates, int32, shape ()
    position: cw.Position  # mean position, like the parameters; see `coordinatewise`
    mean_gradient: optax.Updates  # ḡ, not bias-corrected, like the parameters
    position_variance: optax.Updates  # v ≥ 0, like the parameters
    covariance: optax.Updates  # c, like the parameters
    noise_variance: optax.Updates | None  # ν = σ² ≥ 0, like the parameters or one per tensor

    def diagnostics(self) -> dict[str, chex.Array]:
        r"""What is modelled, over the coordinates that have a curvature.

        Returns:
          Scalars, 0 where there is nothing to tell: those of `coordinatewise.curvatures`, and
          ``correlation_mean``, the mean of :math:`|corr| = |c|/\sqrt{c^2 + v\nu}` between
          positions and gradients (absent for fixed σ).
        """
        entries = cw.curvatures(self.position_variance, self.covariance)
        if self.noise_variance is not None:
            correlation = jax.tree.map(
                _correlation, self.position_variance, self.covariance, self.noise_variance
            )
            entries["correlation_mean"] = cw.mean_of(correlation)
        return entries

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """Those of `coordinatewise.per_parameter`."""
        return cw.per_parameter(self.position_variance, self.covariance)


def _correlation(v: chex.Array, c: chex.Array, noise: chex.Array) -> chex.Array:
    v, c, noise = (x.astype(averages.average_dtype(v)) for x in (v, c, noise))
    explained = cw.root(v) * jnp.abs(cw.divide(c, v))  # standard deviation due to the curvature
    # The two deviations are scaled by the larger one, whose square might overflow or vanish.
    remaining = cw.root(noise)
    scale = jnp.maximum(explained, remaining)
    part, rest = cw.divide(explained, scale), cw.divide(remaining, scale)
    return cw.divide(part, cw.root(part * part + rest * rest))


def adaptive_sgd_c(
    alpha: float | optax.Schedule | None = None,
    beta: float | optax.Schedule = 0.9,
    gamma: float | optax.Schedule | None = None,
    *,
    noise: str = "coordinate",
    sigma: float | optax.Schedule | None = None,
    lr_min: float | optax.Schedule = 0.0,
    lr_max: float | optax.Schedule | None = None,
    momentum: bool | None = None,
    skip_zero_gradients: bool | None = None,
    sigma_theta: float | None = None,
    position: str = "mean",
    state_dtype: Any | None = None,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SGD with confidence (ASGDc): Newton's step per coordinate, shortened by doubt.

    .. math::
      \lambda = c/v, \quad
      \nu \leftarrow \beta\nu + (1-\beta)\bigl(g-\bar g-\lambda(\theta-\bar\theta)\bigr)^2 \\
      \eta = \min\Bigl(\max\Bigl(\alpha\Bigl(|\lambda| + \gamma\sqrt{\nu/v}\Bigr)^{-1},
      \delta\Bigr),\,\eta_{max}\Bigr), \quad
      \theta \leftarrow \theta - \eta\odot\bar g/(1-\beta^t)

    with v the variance of positions and c their covariance with the gradients, both exponentially
    weighted with decay β. Unlike σθ/σg (`adaptive_sgd`) the slope λ of a regression is not enlarged
    by gradient noise; γ is the confidence level: λ has a standard error of about
    :math:`\sqrt{\nu/v}\sqrt{(1-\beta)/(1+\beta)}`, which keeps η finite where λ ≈ 0. The
    absolute value repels from saddles.

    It shines on noise-free problems. Under noise it is no better than `adaptive_sgd` at best and
    needs its cap more: on a flat coordinate every adaptation multiplies η by about
    :math:`\alpha/(1.4(1-\beta)+\gamma\sqrt{(1-\beta^2)/\beta})`, which is 0.9 here and 2.7 with
    the printed values, an explosion. On a parabola with noise the printed values settle at
    ηλ = 0.3 … 0.4; the default ones shrink η slowly to 0, which anneals a run and ends it: 3e-3
    after 500 steps at λ = σ = 1. A larger β (0.99: ηλ = 0.1) or a floor keeps it alive.

    Args:
      alpha: α > 0, confidence in the parabola; default 0.25, with ``paper`` 0.5.
      beta: β in (0, 1), decay of all averages.
      gamma: γ ≥ 0, confidence level; default 0.3, with ``paper`` 0.1. It absorbs
        :math:`\sqrt{(1-\beta)/(1+\beta)}`: 0.1 is 0.44 standard errors at β = 0.9 and 1.4 at 0.99.
      noise: σ in γσ/σθ is adapted for each ``"coordinate"`` (√ν), adapted for each ``"tensor"``
        (the mean of its ν, a scalar in the state), or ``"fixed"`` (Eq. 13).
      sigma: σ ≥ 0 if it is fixed, and required then; else its initial value, default 0. A fixed σ
        must fit every coordinate.
      lr_min: δ ≥ 0, floor of η.
      lr_max: cap of η, in (0, ∞] and at least δ; default 10, with ``paper`` ∞.
      momentum: whether to step along the mean gradient instead of the gradient; default True, with
        ``paper`` False.
      skip_zero_gradients: whether a coordinate with a gradient of exactly 0 keeps its position and
        its statistics; default True, with ``paper`` False.
      sigma_theta: σθ⁰ > 0, the initial spread of positions; default 0.01, with ``paper`` 1. The
        first step is one of :math:`\alpha\sigma_\theta^0/(\gamma\sqrt{\beta(1-\beta)})`, the
        default's 0.028, in each coordinate, whatever the gradient's size.
      position: ``"mean"``, ``"displacement"`` or ``"trusted"``, as in `adaptive_sgd`.
      state_dtype: type of the statistics; default the parameter's, but at least float32. The mean
        position is never kept in fewer bits.
      paper: the printed algorithm with central moments, its defaults and none of the guards; under
        gradient noise it blows up.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds five vectors of parameter size, one less
      with one σ per tensor or a fixed one, one more with ``position="displacement"``. Its
      ``update`` needs the parameters.

    Raises:
      ValueError: if an argument is outside its range, if ``sigma`` is missing and fixed, or if
        ``update`` is not given the parameters.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.adaptive_sgd_c()
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(params)
      >>> for step in range(300):
      ...     updates, state = optimizer.update(curvature * params, state, params)
      ...     params = params + updates
      ...     if step == 0:
      ...         print([f"{u:.4f}" for u in updates])
      ['-0.0278', '-0.0278']
      >>> print(max(abs(params)) < 1e-4, f"{state.diagnostics()['curvature_max']:.0f}")
      True 99

    References:
      J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019,
      Algorithm 9 and Eqs. (10)–(13).

    Deviations from the paper: moments are central, since the printed differences of raw averages
    lose all digits by rounding. The default has other α and γ, a step along :math:`\bar g` and a
    cap, and leaves coordinates without a gradient alone: as printed it diverges under noise.
    Where v is 0, λ and its error count as 0.
    """
    alpha = cw.default(alpha, 0.5 if paper else 0.25)
    gamma = cw.default(gamma, 0.1 if paper else 0.3)
    lr_max = cw.default(lr_max, math.inf if paper else 10.0)
    momentum = cw.default(momentum, not paper)
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
    checks.check_in_range("gamma", gamma, 0.0, high_open=True)
    checks.check_one_of("noise", noise, NOISES)
    if noise == "fixed" and sigma is None:
        raise ValueError("sigma = None; noise = 'fixed' needs the standard deviation of a gradient")
    sigma = cw.default(sigma, 0.0)
    checks.check_in_range("sigma", sigma, 0.0, high_open=True)

    def init(params: optax.Params) -> AdaptiveSGDcState:
        count = jnp.zeros((), jnp.int32)
        variance = cw.at(sigma, count) ** 2
        like = {
            "coordinate": params,
            "tensor": jax.tree.map(lambda p: jnp.zeros((), p.dtype), params),
            "fixed": None,
        }[noise]
        return AdaptiveSGDcState(
            count=count,
            position=cw.init_position(params, position, state_dtype),
            mean_gradient=averages.zeros_like_average(params, state_dtype),
            position_variance=averages.full_like_average(params, sigma_theta**2, state_dtype),
            covariance=averages.zeros_like_average(params, state_dtype),
            noise_variance=averages.full_like_average(
                like, variance, None if noise == "tensor" else state_dtype
            ),
        )

    def update(
        updates: optax.Updates,
        state: AdaptiveSGDcState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AdaptiveSGDcState]:
        del extra
        params = transforms.require_params(params)
        values = (alpha, beta, gamma, sigma, lr_min, lr_max)
        confidence, decay, level, fixed, least, most = (cw.at(x, state.count) for x in values)
        weights = averages.constant_sample_weights(decay)
        count = optax.safe_increment(state.count)
        total = averages.sample_weights(count, decay).total

        def rule(
            sample: cw.Sample,
            mean: chex.Array,
            v: chex.Array,
            c: chex.Array,
            *variance: chex.Array,
        ) -> tuple[chex.Array, ...]:
            g, d = sample.gradient, sample.deviation
            mean = sample.mean_gradient(mean, decay)
            v = sample.moment(v, d * d, weights.old, weights.deviation)
            c = sample.moment(c, d * (g - mean), weights.old, weights.deviation)
            deviation = jnp.asarray(fixed, g.dtype)
            if variance:
                # c·(d/v) and not (c/v)·d: a quotient that is used twice would be kept in memory.
                square = jnp.square((mean - g) - c * cw.divide(sample.opposite, v))
                variance = (_adapted(noise, variance[0], square, sample, weights),)
                deviation = cw.root(variance[0])
            doubt = jnp.asarray(level, g.dtype) * cw.divide(deviation, cw.root(v))
            steepness = jnp.abs(cw.divide(c, v)) + doubt
            floor = np.finfo(g.dtype).tiny * 1e3  # so that α over it does not overflow
            rate = jnp.asarray(confidence, g.dtype) / jnp.maximum(steepness, floor)
            step = cw.descend(cw.direction(mean, g, total, momentum), cw.limited(rate, least, most))
            return step, mean, v, c, *variance

        vectors: tuple[Any, ...] = (state.mean_gradient, state.position_variance, state.covariance)
        if state.noise_variance is not None:
            vectors = (*vectors, state.noise_variance)
        updates, moved, vectors = cw.update_coordinates(
            rule, updates, params, state.position, vectors, beta=decay, form=position, skip=skip
        )
        mean, variance, covariance, *adapted = vectors
        last = adapted[0] if adapted else None
        return updates, AdaptiveSGDcState(count, moved, mean, variance, covariance, last)

    return transforms.transformation(init, update)


def _adapted(
    noise: str,
    variance: chex.Array,
    square: chex.Array,
    sample: cw.Sample,
    weights: averages.SampleWeights,
) -> chex.Array:
    """ν after one more squared residual, or after their mean over the coordinates that count."""
    if noise == "coordinate":
        return sample.moment(variance, square, weights.old, weights.new)
    counts = (sample.gradient != 0) if sample.skip else jnp.ones_like(square, bool)
    sums = [jnp.sum(counts, dtype=square.dtype), jnp.sum(jnp.where(counts, square, 0.0))]
    number, whole = shards.total([jnp.stack(sums)])
    mean = whole / jnp.maximum(number, 1.0)
    old, new = weights.old.astype(square.dtype), weights.new.astype(square.dtype)
    return jnp.where(number > 0, old * variance + new * mean, variance)


register(
    Method(
        name="adaptive_sgd_c",
        factory=adaptive_sgd_c,
        scale_by=None,
        family="online_regression",
        title="Adaptive SGD with confidence level (ASGDc)",
        reference=parabola.REFERENCE,
        equation="Algorithm 9, Eq. (13): θ ← θ − α·(|λ| + γσ/σθ)⁻¹⊙g",
        needs=frozenset({"params"}),
        static_args=(
            "noise",
            "momentum",
            "skip_zero_gradients",
            "position",
            "state_dtype",
            "paper",
        ),
        tunes=Tunable("alpha", 1e-2, 1e1),
        test_hyperparams={"alpha": 0.25},
        state_size=5,
        low_precision=cw.LOW_PRECISION,
        wide_state=("position.stored", "position.previous"),
    )
)

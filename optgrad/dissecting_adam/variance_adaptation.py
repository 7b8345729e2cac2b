r"""The variance adaptation that the methods of Balles & Hennig share.

A direction :math:`p` with relative variance :math:`\eta^2` is shortened, coordinate by coordinate,
by :math:`\gamma = (1+\eta^2)^{-1}` (the direction itself, Eq. 16) or by
:math:`(1+\eta^2)^{-1/2} \approx \operatorname{erf}(1/(\sqrt 2\,\eta))` (its sign, Eqs. 6 and 15).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import optax

from optgrad.core import averages, checks, diagnostics, leafwise, oracles, transforms

VARIANCES = ("moving_average", "unbiased")
FACTORS = ("adam", "optimal")

REFERENCE = (
    "L. Balles, P. Hennig, "
    '"Dissecting Adam: The Sign, Magnitude and Variance of Stochastic Gradients", 2018'
)


class MovingMomentsState(NamedTuple):
    """Mean and central variance of the past gradients."""

    count: chex.Array  # number of updates, int32, shape ()
    mean: optax.Updates  # bias-corrected m, like the parameters, at least float32
    variance: optax.Updates  # v − m² ≥ 0, like the parameters, at least float32

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``relative_variance`` η² = (v−m²)/m² of a gradient, ``variance_adaptation`` 1/(1+η²)."""
        return _relative(self.mean, self.variance)


class MinibatchVarianceState(NamedTuple):
    """Momentum, and its variance as estimated within the minibatches."""

    count: chex.Array  # number of updates, int32, shape ()
    momentum: optax.Updates  # r = Σ μˢ g, like the parameters, at least float32
    variance: optax.Updates  # s̄ = Σ μ²ˢ ŝ ≥ 0, like the parameters, at least float32

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``relative_variance`` η² = s̄/r² of the momentum, ``variance_adaptation`` 1/(1+η²)."""
        return _relative(self.momentum, self.variance)


def _relative(mean: chex.ArrayTree, variance: chex.ArrayTree) -> dict[str, chex.ArrayTree]:
    deviations = jax.tree.map(jnp.sqrt, variance)
    relative = jax.tree.map(jnp.square, diagnostics.ratio(deviations, mean))
    return {
        "relative_variance": relative,
        "variance_adaptation": jax.tree.map(lambda x: 1 / (1 + x), relative),
    }


Direction = Callable[[chex.Array, chex.Array, chex.Array, chex.Array], chex.Array]


def init_moving_moments(params: optax.Params, dtype: Any | None) -> MovingMomentsState:
    """Moments before the first gradient."""
    return MovingMomentsState(
        count=jnp.zeros((), jnp.int32),
        mean=averages.zeros_like_average(params, dtype),
        variance=averages.zeros_like_average(params, dtype),
    )


def update_moving_moments(
    state: MovingMomentsState, gradient: optax.Updates, beta: chex.Numeric
) -> tuple[MovingMomentsState, averages.SampleWeights]:
    """Moments after one more gradient, and the weights it was averaged with."""
    count = optax.safe_increment(state.count)
    weights = averages.sample_weights(count, beta)
    mean = averages.update_mean(state.mean, gradient, weights)
    variance = averages.update_variance(state.variance, gradient, mean, weights)
    return MovingMomentsState(count, mean, variance), weights


def variance_multiplier(
    weights: averages.SampleWeights, beta: chex.Numeric, *, momentum: bool, unbiased: bool
) -> chex.Array:
    r"""The scalar that turns :math:`(v-m^2)/m^2` into the relative variance :math:`\eta^2`.

    With :math:`\rho_t = \kappa(\beta, t) = \frac{(1-\beta)(1+\beta^t)}{(1+\beta)(1-\beta^t)}`
    (Eq. 19):

    =============  ====================  =========================
    direction      ``moving_average``    ``unbiased``
    =============  ====================  =========================
    gradient       1                     :math:`1/(1-\rho_t)`
    momentum       :math:`\rho_t`        :math:`\rho_t/(1-\rho_t)`
    =============  ====================  =========================

    In terms of the sum of weights s and the weight κ of the new sample, ρ = κ(2−s)/(1+β) and
    1−ρ = 2(1−κ)/(1+β): nothing cancels. At the first step 1−ρ is 0 and so is the variance; the
    multiplier is then 0, hence γ = 1.

    Args:
      weights: of the last sample.
      beta: β in [0, 1).
      momentum: whether the direction is the momentum term rather than the gradient.
      unbiased: whether the variance is divided by 1 − ρ.
    """
    numerator = weights.new * (2 - weights.total) if momentum else jnp.ones_like(weights.new)
    if not unbiased:
        return numerator / (1 + beta) if momentum else numerator
    numerator = numerator if momentum else numerator * (1 + beta)
    has_past = weights.old > 0
    return jnp.where(has_past, numerator / (2 * jnp.where(has_past, weights.old, 1.0)), 0.0)


def adapt_direction(
    direction: chex.Array, mean: chex.Array, variance: chex.Array, multiplier: chex.Array
) -> chex.Array:
    """γ⊙direction with γ = 1/(1+η²), η² = multiplier·variance/mean²; 0 where the mean is 0."""
    adapted = direction / (1 + _relative_variance(mean, variance, multiplier))
    return jnp.where(_is_zero(mean), 0.0, adapted)


def adapt_sign(
    mean: chex.Array, variance: chex.Array, multiplier: chex.Array, factor: str
) -> chex.Array:
    """γ⊙sign(mean), γ = (1+η²)^(−1/2) (``"adam"``) or erf(1/(√2·η)) (``"optimal"``, Eq. 15)."""
    relative = _relative_variance(mean, variance, multiplier)
    if factor == "adam":
        gamma = jax.lax.rsqrt(1 + relative)
    else:
        certain = relative < 1e-4  # erf is 1 there in every precision
        ratio = jax.lax.rsqrt(2 * jnp.where(certain, 1.0, relative))
        gamma = jnp.where(certain, 1.0, jax.scipy.special.erf(ratio))
    return jnp.where(_is_zero(mean), 0.0, jnp.sign(mean) * gamma)


def _relative_variance(
    mean: chex.Array, variance: chex.Array, multiplier: chex.Array
) -> chex.Array:
    # The ratio of standard deviation and mean is squared, not their squares divided: once a
    # gradient has vanished the mean decays, and its square would underflow to 0/0. (Dividing twice
    # by the mean does not help, XLA rewrites that as a division by the square.) An infinite ratio
    # is right: γ = 0.
    # For derivatives *through* an update (meta-learning), which would overflow on the way, η² is
    # taken as constant where the mean is tiny or the ratio huge; the inner `where`s serve the same.
    info = np.finfo(mean.dtype)
    has_noise = variance != 0  # NaN stays NaN
    deviation = jnp.where(has_noise, jnp.sqrt(jnp.where(has_noise, variance, 1.0)), 0.0)
    size = jnp.abs(mean)
    constant = (size < info.tiny**0.5) | (deviation > size * (info.max**0.5 / 16))
    deviation = jnp.where(constant, jax.lax.stop_gradient(deviation), deviation)
    mean = jnp.where(constant, jax.lax.stop_gradient(mean), mean)
    ratio = deviation / jnp.where(_is_zero(mean), 1.0, mean)
    square = jnp.where(constant, jax.lax.stop_gradient(ratio * ratio), ratio * ratio)
    return multiplier.astype(mean.dtype) * square


def _is_zero(mean: chex.Array) -> chex.Array:
    """Whether the mean is 0, or what is left of one that has decayed.

    Backends flush subnormal numbers to 0 in some operations only. Where they flush products, a mean
    no longer decays once (1−β)·m is subnormal, and its sign would go on making steps.
    """
    info = np.finfo(mean.dtype)
    return jnp.abs(mean) < info.tiny * (2**14 if info.bits >= 32 else 1)


def _directions(
    direction: Direction, multiplier: chex.Array, like: optax.Updates, *trees: optax.Updates
) -> optax.Updates:
    """``direction`` of every leaf, computed in at least float32, in the types of ``like``."""

    def one(*leaves: chex.Array) -> chex.Array:
        dtype = averages.widest_dtype(*leaves[1:])  # that of the averages
        gradient, mean, variance = (leaf.astype(dtype) for leaf in leaves)
        return direction(gradient, mean, variance, multiplier)

    return transforms.cast_like(leafwise.tree_map(one, *trees), like)


def from_moving_moments(
    direction: Direction,
    beta: float | optax.Schedule,
    *,
    momentum: bool,
    variance: str,
    state_dtype: Any | None,
) -> optax.GradientTransformationExtraArgs:
    """A direction whose relative variance comes from moving averages of the past gradients.

    Args:
      direction: (gradient, mean, variance, multiplier) -> update of one leaf.
      beta: decay of both averages.
      momentum: whether the relative variance is that of the momentum term (Eq. 19).
      variance: one of `VARIANCES`.
      state_dtype: type of the averages.
    """
    check_options(beta, variance=variance, state_dtype=state_dtype)

    def init(params: optax.Params) -> MovingMomentsState:
        return init_moving_moments(params, state_dtype)

    def update(
        updates: optax.Updates,
        state: MovingMomentsState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MovingMomentsState]:
        del extra
        decay = transforms.hyperparameter_at(beta, state.count)
        state, weights = update_moving_moments(state, updates, decay)
        multiplier = variance_multiplier(
            weights, decay, momentum=momentum, unbiased=variance == "unbiased"
        )
        like = updates if params is None else params
        return _directions(direction, multiplier, like, updates, state.mean, state.variance), state

    return transforms.transformation(init, update)


def from_minibatch_variance(
    direction: Direction, beta: float | optax.Schedule, *, state_dtype: Any | None
) -> optax.GradientTransformationExtraArgs:
    """A direction whose relative variance comes from the examples of each minibatch (Eq. 48).

    Args:
      direction: (gradient, momentum, its variance, multiplier 1) -> update of one leaf.
      beta: decay of the momentum; its square is that of the variance.
      state_dtype: type of the sums.
    """
    check_options(beta, state_dtype=state_dtype)

    def init(params: optax.Params) -> MinibatchVarianceState:
        return MinibatchVarianceState(
            count=jnp.zeros((), jnp.int32),
            momentum=averages.zeros_like_average(params, state_dtype),
            variance=averages.zeros_like_average(params, state_dtype),
        )

    def update(
        updates: optax.Updates,
        state: MinibatchVarianceState,
        params: optax.Params | None = None,
        *,
        per_example_grads: optax.Updates | None = None,
        gradient_variance: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MinibatchVarianceState]:
        del extra
        estimate = _minibatch_variance(updates, per_example_grads, gradient_variance)
        decay = transforms.hyperparameter_at(beta, state.count)
        momentum = averages.update_sum(state.momentum, updates, decay)
        variance = averages.update_sum(state.variance, estimate, decay * decay)
        one = jnp.ones((), averages.scalar_dtype())
        state = MinibatchVarianceState(optax.safe_increment(state.count), momentum, variance)
        like = updates if params is None else params
        return _directions(direction, one, like, updates, momentum, variance), state

    return transforms.transformation(init, update)


def _minibatch_variance(
    gradient: optax.Updates,
    per_example_grads: optax.Updates | None,
    gradient_variance: optax.Updates | None,
) -> optax.Updates:
    """The variance that was handed over, or that of the per-example gradients; refuses neither."""
    if gradient_variance is None and per_example_grads is None:
        raise ValueError(
            "update needs the extra argument gradient_variance or per_example_grads, got neither; "
            "optgrad.value_grad_and_variance and optgrad.per_example_grads compute them"
        )
    if gradient_variance is not None:
        estimate, name, source = gradient_variance, "gradient_variance", gradient_variance
    else:
        estimate, name, source = (
            oracles.gradient_variance(per_example_grads),
            "per_example_grads",
            per_example_grads,
        )
    found, wanted = str(jax.tree.structure(estimate)), str(jax.tree.structure(gradient))
    shapes = [jnp.shape(x) for x in jax.tree.leaves(estimate)]
    expected = [jnp.shape(x) for x in jax.tree.leaves(gradient)]
    if found != wanted or shapes != expected:
        raise ValueError(
            f"{name} has leaves of shapes {[jnp.shape(x) for x in jax.tree.leaves(source)][:4]} in "
            f"{found}; accepted: the structure of the gradient, {wanted}, with "
            f"leaves of shapes {expected[:4]}"
            + (", each with a leading batch axis" if gradient_variance is None else "")
        )
    return estimate


def check_options(
    beta: Any,
    *,
    variance: str = VARIANCES[0],
    factor: str = FACTORS[0],
    state_dtype: Any | None = None,
) -> None:
    """Refuses a β outside [0, 1) and unknown options."""
    checks.check_in_range("beta", beta, 0.0, 1.0, high_open=True)
    checks.check_one_of("variance", variance, VARIANCES)
    checks.check_one_of("factor", factor, FACTORS)
    checks.check_float_dtype("state_dtype", state_dtype)

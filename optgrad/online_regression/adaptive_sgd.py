"""Adaptive SGD: a learning rate σθ/σg for each coordinate."""

import math
import numbers
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, diagnostics, transforms
from optgrad.online_regression import coordinatewise as cw
from optgrad.online_regression import parabola
from optgrad.registry import Method, Tunable, register


class AdaptiveSGDState(NamedTuple):
    """Mean and spread of each coordinate's positions and gradients."""

    count: chex.Array  # number of updates, int32, shape ()
    position: cw.Position  # mean position, like the parameters; see `coordinatewise`
    mean_gradient: optax.Updates  # ḡ, not bias-corrected, like the parameters
    position_variance: optax.Updates  # vθ ≥ 0, like the parameters
    gradient_variance: optax.Updates  # vg ≥ 0, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled, over the coordinates whose positions and gradients have a spread.

        Returns:
          ``step_size_geomean``, ``step_size_min``, ``step_size_max``: geometric mean, smallest and
          largest σθ/σg, before α, ε, floor and cap; scalars, 0 before the first gradient.
        """
        step_size = diagnostics.summarize(self.position_variance, self.gradient_variance)
        return {f"step_size_{name}": jnp.sqrt(x) for name, x in step_size._asdict().items()}

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``step_size`` σθ/σg and ``curvature`` σg/σθ, before α, ε, floor and cap."""
        square = diagnostics.ratio(self.position_variance, self.gradient_variance)
        step_size = jax.tree.map(jnp.sqrt, square)
        return {"step_size": step_size, "curvature": jax.tree.map(lambda x: 1 / x, step_size)}


def adaptive_sgd(
    alpha: float | optax.Schedule | None = None,
    beta: float | optax.Schedule = 0.9,
    *,
    beta_variance: float | optax.Schedule | None = None,
    epsilon: float | optax.Schedule = 0.0,
    lr_min: float | optax.Schedule = 0.0,
    lr_max: float | optax.Schedule | None = None,
    momentum: bool | None = None,
    skip_zero_gradients: bool | None = None,
    sigma_theta: float | None = None,
    sigma_gradient: float | None = None,
    initial_step: float | None = None,
    position: str = "mean",
    state_dtype: Any | None = None,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SGD (ASGD): each coordinate's learning rate is its own σθ/σg.

    .. math::
      \bar\theta &\leftarrow \beta\bar\theta + (1-\beta)\theta, \quad
      \bar g \leftarrow \beta\bar g + (1-\beta)g \\
      v_\theta &\leftarrow \beta' v_\theta + (1-\beta')(\theta-\bar\theta)^2, \quad
      v_g \leftarrow \beta' v_g + (1-\beta')(g-\bar g)^2 \\
      \eta &= \min\bigl(\max\bigl(\sqrt{v_\theta/(v_g+\epsilon)},\,\delta\bigr),\,
      \eta_{max}\bigr), \quad
      \theta \leftarrow \theta - \alpha\,\eta\odot\bar g/(1-\beta^t)

    Along a parabola positions and gradients spread in the ratio 1 : λ, so that σθ/σg is
    :math:`1/|\lambda|`, a Newton step in every coordinate and always downhill. There is no learning
    rate to tune, and the first step is one of ``initial_step`` in each coordinate, whatever the
    gradient's size.

    It shines under gradient noise at one untuned setting: level with or ahead of tuned SGD,
    momentum and Adam on a noisy Rosenbrock function and on the training loss of small networks.
    It is behind them on short deterministic problems (there β = β' = 0.9 is better), and it fails
    where its own noise starves it. θ moves because η > 0, and η is estimated from that motion:
    under noise η collapses to 0 if (without momentum, β' = β)

    .. math:: \alpha^2 \le 2(1-\beta), \quad\text{and otherwise}\quad
       \alpha\,\eta\,\lambda \approx (\alpha^2 - 2(1-\beta))/(1+\beta).

    The paper's α = 0.5 with β = 0.9 collapses; that anneals a short run and ends a long one. The
    default stays alive; lower α below the threshold, to 0.4 or less, for the last part of a run to
    anneal it. A factor behind this method in a chain is a change of α. On a slope without curvature
    η grows until ``lr_max`` stops it: the cap is a learning rate for such coordinates.

    Args:
      alpha: α > 0, confidence in the parabola; default 0.7, with ``paper`` 0.5.
      beta: β in (0, 1), decay of both means.
      beta_variance: β' in (0, 1), decay of both variances; default 0.99. With ``paper`` the default
        is β, and the variances are those of Eq. (3) exactly,
        :math:`v \leftarrow \beta v + \frac{1-\beta}{\beta}(\theta-\bar\theta)^2`.
      epsilon: ε, of either sign, added to the variance of the gradients; −σ² removes the share of a
        known noise, and then ``lr_max`` must be finite.
      lr_min: δ ≥ 0, floor of η (not of α·η); 10⁻³ … 10⁻² keeps a collapsing setting alive.
      lr_max: cap of η, in (0, ∞] and at least δ; default 10, with ``paper`` ∞.
      momentum: whether to step along the mean gradient instead of the gradient; default True, with
        ``paper`` False.
      skip_zero_gradients: whether a coordinate with a gradient of exactly 0 (an embedding row that
        the batch does not have, a dead input) keeps its position and its statistics; default True,
        with ``paper`` False.
      sigma_theta: σθ⁰ > 0, the initial spread of positions; default 0.01, with ``paper`` 1.
      sigma_gradient: σg⁰ ≥ 0, the initial spread of gradients; default 0, with ``paper`` 1.
      initial_step: length > 0 of the first step in each coordinate, from which σθ⁰ follows if σg⁰
        is 0; instead of ``sigma_theta``. The default σθ⁰ gives 0.077. Where α begins with 0, the
        length that α = 1 would give.
      position: ``"mean"`` stores the mean position; ``"displacement"`` the distance from it and the
        previous parameters (one vector more; exact where θ moves by less than 10⁻⁵ of its size);
        ``"trusted"`` the distance only, right if updates are applied as they are. Parameters that
        were edited between steps count as one long step in the first two forms (η grows up to its
        cap until that is forgotten), and are not noticed by the third.
      state_dtype: type of the statistics; default the parameter's, but at least float32. The mean
        position is never kept in fewer bits. For bfloat16 keep β' ≤ 0.99.
      paper: the printed algorithm with central variances, its defaults and none of the guards. It
        may diverge on slopes, and its σθ⁰ = σg⁰ = 1 take ln(1/σ²)/(1−β) steps to be forgotten.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds four vectors of parameter size, with
      ``position="displacement"`` five. Its ``update`` needs the parameters.

    Raises:
      ValueError: if an argument is outside its range, if both ``sigma_theta`` and ``initial_step``
        are given, if ε is negative and ``lr_max`` infinite, or if ``update`` is not given the
        parameters.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.adaptive_sgd(initial_step=0.1)
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(params)
      >>> for step in range(300):
      ...     updates, state = optimizer.update(curvature * params, state, params)
      ...     params = params + updates
      ...     if step == 0:
      ...         print([f"{u:.3f}" for u in updates])
      ['-0.100', '-0.100']
      >>> print(max(abs(params)) < 1e-4, f"{state.diagnostics()['step_size_min']:.3f}")
      True 0.012

    References:
      J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019,
      Algorithm 8 and Section IV-A.

    Deviations from the paper: variances are central, since the printed differences of raw averages
    become negative by rounding (NaN, in float64 too). The default has the remark's own rate β', a
    step along :math:`\bar g`, a cap, no spread of gradients to begin with, and leaves coordinates
    without a gradient alone: as printed, α = 0.5 collapses or diverges. If :math:`v_g` is 0,
    η = δ.
    """
    alpha = cw.default(alpha, 0.5 if paper else 0.7)
    lr_max = cw.default(lr_max, math.inf if paper else 10.0)
    momentum = cw.default(momentum, not paper)
    skip = cw.default(skip_zero_gradients, not paper)
    sigma_gradient = cw.default(sigma_gradient, 1.0 if paper else 0.0)
    exact = beta_variance is None and paper  # one rate for all: the recursion of Eq. (3)
    beta_variance = cw.default(beta_variance, beta if paper else 0.99)
    if sigma_theta is not None and initial_step is not None:
        raise ValueError(
            f"sigma_theta = {sigma_theta} and initial_step = {initial_step}; "
            "accepted: one of the two, the other follows from it"
        )
    if initial_step is not None:
        checks.check_in_range("initial_step", initial_step, 0.0, low_open=True, high_open=True)
    elif sigma_theta is None:
        sigma_theta = 1.0 if paper else 1e-2
    cw.check_common(
        alpha=alpha,
        beta=beta,
        lr_min=lr_min,
        lr_max=lr_max,
        sigma_theta=initial_step if sigma_theta is None else sigma_theta,
        position=position,
        state_dtype=state_dtype,
    )
    checks.check_in_range("beta_variance", beta_variance, 0.0, 1.0, low_open=True, high_open=True)
    _check_epsilon(epsilon, lr_max)
    checks.check_in_range("sigma_gradient", sigma_gradient, 0.0, high_open=True)

    def moment_weights(count: chex.Array) -> tuple[chex.Numeric, chex.Numeric]:
        """The coefficients of a variance and of the square of a deviation from the new mean."""
        if exact:
            weights = averages.constant_sample_weights(cw.at(beta, count))
            return weights.old, weights.deviation
        decay = cw.at(beta_variance, count)
        return decay, 1 - decay

    def init(params: optax.Params) -> AdaptiveSGDState:
        count = jnp.zeros((), jnp.int32)
        deviation = sigma_theta
        if deviation is None:  # |first step| = α·σθ0·√(old/new)/β, whatever the gradient
            old, new = moment_weights(count)
            confidence = cw.at(alpha, count)
            confidence = jnp.where(confidence > 0, confidence, 1.0)  # of a warm-up from 0
            length = confidence * jnp.sqrt(old / new) / cw.at(beta, count)
            deviation = initial_step / length
        return AdaptiveSGDState(
            count=count,
            position=cw.init_position(params, position, state_dtype),
            mean_gradient=averages.zeros_like_average(params, state_dtype),
            position_variance=averages.full_like_average(params, deviation**2, state_dtype),
            gradient_variance=averages.full_like_average(params, sigma_gradient**2, state_dtype),
        )

    def update(
        updates: optax.Updates,
        state: AdaptiveSGDState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AdaptiveSGDState]:
        del extra
        params = transforms.require_params(params)
        values = (alpha, beta, epsilon, lr_min, lr_max)
        confidence, decay, added, least, most = (cw.at(x, state.count) for x in values)
        old, new = moment_weights(state.count)
        count = optax.safe_increment(state.count)
        total = averages.sample_weights(count, decay).total

        def rule(
            sample: cw.Sample, mean: chex.Array, vx: chex.Array, vg: chex.Array
        ) -> tuple[chex.Array, ...]:
            mean = sample.mean_gradient(mean, decay)
            vx = sample.moment(vx, jnp.square(sample.deviation), old, new)
            vg = sample.moment(vg, jnp.square(sample.gradient - mean), old, new)
            rate = _step_size(vx, vg, added, least, most)
            rate = jnp.asarray(confidence, rate.dtype) * rate
            return (
                cw.descend(cw.direction(mean, sample.gradient, total, momentum), rate),
                mean,
                vx,
                vg,
            )

        vectors = (state.mean_gradient, state.position_variance, state.gradient_variance)
        updates, moved, vectors = cw.update_coordinates(
            rule, updates, params, state.position, vectors, beta=decay, form=position, skip=skip
        )
        return updates, AdaptiveSGDState(count, moved, *vectors)

    return transforms.transformation(init, update)


def _check_epsilon(epsilon: Any, lr_max: Any) -> None:
    checks.check_in_range("epsilon", epsilon, -math.inf, math.inf)
    both = all(isinstance(x, numbers.Real) for x in (epsilon, lr_max))
    if both and epsilon < 0 and lr_max == math.inf:
        raise ValueError(
            f"epsilon = {epsilon} and lr_max = inf; accepted: a finite lr_max where epsilon is "
            "negative, for the denominator may vanish"
        )


def _step_size(
    position_variance: chex.Array,
    gradient_variance: chex.Array,
    epsilon: chex.Numeric,
    lr_min: chex.Numeric,
    lr_max: chex.Numeric,
) -> chex.Array:
    """σθ/σg within its limits; the floor where the gradient has no variance."""
    tiny = np.finfo(gradient_variance.dtype).tiny
    variance = gradient_variance + jnp.asarray(epsilon, gradient_variance.dtype)
    positive = variance > tiny
    # Two roots, since the quotient of the variances may underflow.
    ratio = cw.root(position_variance) / jnp.sqrt(jnp.where(positive, variance, 1.0))
    ratio = jnp.where(positive, ratio, jnp.inf)
    return cw.limited(jnp.where(gradient_variance > tiny, ratio, 0.0), lr_min, lr_max)


register(
    Method(
        name="adaptive_sgd",
        factory=adaptive_sgd,
        scale_by=None,
        family="online_regression",
        title="Adaptive SGD (ASGD): learning rate σθ/σg per coordinate",
        reference=parabola.REFERENCE,
        equation="Algorithm 8: θ ← θ − α·(σθ/σg)⊙g",
        needs=frozenset({"params"}),
        static_args=("momentum", "skip_zero_gradients", "position", "state_dtype", "paper"),
        tunes=Tunable("alpha", 1e-2, 1e1),
        test_hyperparams={"alpha": 0.7},
        state_size=4,
        low_precision=cw.LOW_PRECISION,
        wide_state=("position.stored", "position.previous"),
    )
)

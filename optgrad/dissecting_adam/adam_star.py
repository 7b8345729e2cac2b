"""Adam with the variance of its momentum term."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_adam_star(
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `adam_star`: γ^½⊙sign(m). Arguments as there."""
    va.check_options(beta, factor=factor)
    return va.from_moving_moments(
        lambda _, m, v, multiplier: va.adapt_sign(m, v, multiplier, factor),
        beta,
        momentum=True,
        variance=variance,
        state_dtype=state_dtype,
    )


def adam_star(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam* (variance of the momentum term).

    .. math::
      \theta \leftarrow \theta - \alpha\,(1+\eta^2)^{-1/2}\odot\operatorname{sign}(m), \qquad
      \eta^2 = \kappa(\mu,t)\frac{v-m^2}{m^2}

    with m and v the bias-corrected moving averages of g and g². Adam adapts the sign of its
    momentum to the variance of a single gradient; this method uses the variance of the momentum
    term itself. The paper found it hardly different from Adam in practice.

    Args:
      learning_rate: α ≥ 0, the largest step of a coordinate; a number, a traced scalar or
        a schedule.
      beta: μ in [0, 1), for both averages; a number, a traced scalar or a schedule.
      factor: ``"adam"`` for :math:`(1+\eta^2)^{-1/2}`, or ``"optimal"`` for
        :math:`\operatorname{erf}(1/(\sqrt2\,\eta))`, the best factor for Gaussian noise (Eq. 15).
      variance: ``"moving_average"``, the paper's :math:`v-m^2`, or ``"unbiased"``, which divides
        it by :math:`1-\kappa(\mu,t)` as the authors' published implementation does.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32. In 16 bits averages with β above 0.99 stand still, and squares of gradients must
        fit the type's range.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size.

    Raises:
      ValueError: if ``learning_rate`` is negative or not finite, ``beta`` is not in [0, 1), or
        an option is unknown.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.adam_star(0.1, beta=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 2.0]), jnp.array([1.0, -2.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> print([f"{u:.4f}" for u in updates])
      ['-0.1000', '0.0429']

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Algorithm 4.

    Deviations from the paper: none; where :math:`m_i = 0` the update is 0.
    """
    direction = scale_by_adam_star(beta, factor=factor, variance=variance, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="adam_star",
        factory=adam_star,
        scale_by=scale_by_adam_star,
        family="dissecting_adam",
        title="Adam* (variance of the momentum term)",
        reference=va.REFERENCE,
        equation="Algorithm 4: θ ← θ − α·(1 + κ(μ,t)(v − m²)/m²)^(−1/2)⊙sign(m)",
        static_args=("factor", "variance", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

"""Adam in the paper's form: a sign and a variance adaptation."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_adam_sign(
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `adam_sign`: (1+η²)^(−½)⊙sign(m). Arguments as there."""
    va.check_options(beta, factor=factor)
    return va.from_moving_moments(
        lambda _, m, v, multiplier: va.adapt_sign(m, v, multiplier, factor),
        beta,
        momentum=False,
        variance=variance,
        state_dtype=state_dtype,
    )


def adam_sign(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam as sign and variance adaptation.

    .. math::
      \theta \leftarrow \theta - \alpha\,(1+\hat\eta^2)^{-1/2}\odot\operatorname{sign}(m), \qquad
      \hat\eta^2 = \frac{v-m^2}{m^2}

    with m and v the bias-corrected moving averages of g and g². It is
    ``optax.adam(learning_rate, b1=beta, b2=beta, eps=0)`` written so that the factor can be
    exchanged, and free of the 0/0 that Adam without ε has at a zero gradient.

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
      >>> import jax.numpy as jnp, optgrad, optax
      >>> ours, adam = optgrad.adam_sign(0.1), optax.adam(0.1, b1=0.9, b2=0.9, eps=0.0)
      >>> s, z = ours.init(jnp.zeros(2)), adam.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 2.0]), jnp.array([1.0, -0.5])):
      ...     u, s = ours.update(gradient, s)
      ...     a, z = adam.update(gradient, z)
      >>> print([f"{x:.4f}" for x in (*u, *a)])
      ['-0.1000', '-0.0481', '-0.1000', '-0.0481']

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Eqs. (6) and (7).

    Deviations from the paper: one decay for both averages, as Section 3.3 of the paper
    argues; where :math:`m_i = 0` the update is 0.
    """
    direction = scale_by_adam_sign(beta, factor=factor, variance=variance, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="adam_sign",
        factory=adam_sign,
        scale_by=scale_by_adam_sign,
        family="dissecting_adam",
        title="Adam as sign and variance adaptation",
        reference=va.REFERENCE,
        equation="Eq. (6): θ ← θ − α·(1 + (v − m²)/m²)^(−1/2)⊙sign(m)",
        static_args=("factor", "variance", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

"""Stochastic variance-adapted gradient."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_svag(
    beta: float | optax.Schedule = 0.9,
    *,
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `svag`: γ⊙g. Arguments as there."""
    return va.from_moving_moments(
        va.adapt_direction,
        beta,
        momentum=False,
        variance=variance,
        state_dtype=state_dtype,
    )


def svag(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic variance-adapted gradient (SVAG).

    .. math::
      \theta \leftarrow \theta - \alpha\,\gamma\odot g, \qquad
      \gamma = \frac{m^2}{m^2 + \hat s}, \quad \hat s = v - m^2

    with m and v the bias-corrected moving averages of g and g². With the exact relative variance
    and α = 1/L it converges as O(1/t) without decreasing α (Theorem 1); with estimated variances
    that guarantee is gone, and `m_svag` is nearly always the better choice.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      beta: μ in [0, 1), for both averages; a number, a traced scalar or a schedule.
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
      >>> optimizer = optgrad.svag(1.0, beta=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 2.0]), jnp.array([1.0, -2.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> print([f"{u:.4f}" for u in updates])
      ['-1.0000', '0.2222']

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Section 3.2, Eq. (16), with the variance estimate of Section 3.3.

    Deviations from the paper: none; the paper leaves :math:`m_i = 0` open here, the update
    is then 0 as in its Algorithm 2.
    """
    direction = scale_by_svag(beta, variance=variance, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="svag",
        factory=svag,
        scale_by=scale_by_svag,
        family="dissecting_adam",
        title="Stochastic variance-adapted gradient (SVAG)",
        reference=va.REFERENCE,
        equation="Section 3.2, Eq. (16): θ ← θ − α·γ⊙g, γ = m²/(m² + (v − m²))",
        static_args=("variance", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

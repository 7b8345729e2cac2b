"""Stochastic variance-adapted gradient with momentum."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_m_svag(
    beta: float | optax.Schedule = 0.9,
    *,
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `m_svag`: γ⊙m. Arguments as there."""
    return va.from_moving_moments(
        lambda _, m, v, multiplier: va.adapt_direction(m, m, v, multiplier),
        beta,
        momentum=True,
        variance=variance,
        state_dtype=state_dtype,
    )


def m_svag(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    variance: str = "moving_average",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic variance-adapted gradient with momentum (M-SVAG).

    .. math::
      \tilde m &\leftarrow \mu\tilde m + (1-\mu)g, \quad
      \tilde v \leftarrow \mu\tilde v + (1-\mu)g^2 \\
      m &= \tilde m/(1-\mu^t), \quad v = \tilde v/(1-\mu^t) \\
      \eta^2 &= \kappa(\mu, t)\,\frac{v - m^2}{m^2}, \quad
      \kappa(\mu,t) = \frac{(1-\mu)(1+\mu^t)}{(1+\mu)(1-\mu^t)} \\
      \theta &\leftarrow \theta - \alpha\,\gamma\odot m, \quad \gamma = (1+\eta^2)^{-1}

    Momentum-SGD whose noisy coordinates are shortened: Adam's variance adaptation without its
    sign. It shines where SGD beats Adam and gradients are noisy; learning rates are those of
    momentum-SGD divided by 1−μ, since m is an average. Where badly scaled coordinates are what
    hurts (the paper's MNIST problem), the sign methods remain ahead of it. With constant gradients
    it is gradient descent; what changes along the path counts as variance, too.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      beta: μ in [0, 1), for momentum and averages alike; a number, a traced scalar or a schedule.
      variance: ``"moving_average"``, the paper's :math:`v-m^2`, or ``"unbiased"``, which divides
        it by :math:`1-\kappa(\mu,t)` as the authors' published implementation does.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32. In 16 bits averages with β above 0.99 stand still, and squares of gradients must
        fit the type's range.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size.

    Raises:
      ValueError: if ``learning_rate`` is negative or not finite, ``beta`` is not in [0, 1), or
        ``variance`` is unknown.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.m_svag(1.0)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -0.8])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> print([f"{u:.4f}" for u in updates])
      ['-1.0000', '-0.0004']

    The steady coordinate moves fully, the noisy one hardly.

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Algorithm 2 and Eq. (19).

    Deviations from the paper: none in exact arithmetic. :math:`v-m^2` is carried as a central
    second moment, so that it neither cancels nor becomes negative. Where :math:`m_i = 0` the
    update is 0, as the paper says.
    """
    direction = scale_by_m_svag(beta, variance=variance, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="m_svag",
        factory=m_svag,
        scale_by=scale_by_m_svag,
        family="dissecting_adam",
        title="Stochastic variance-adapted gradient with momentum (M-SVAG)",
        reference=va.REFERENCE,
        equation="Algorithm 2, Eq. (19): θ ← θ − α·γ⊙m, γ = m²/(m² + κ(μ,t)(v − m²))",
        static_args=("variance", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

"""M-SVAG with the variance within the minibatch."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_m_svag_mb(
    beta: float | optax.Schedule = 0.9,
    *,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `m_svag_mb`: γ⊙r. Arguments as there."""
    return va.from_minibatch_variance(
        lambda _, r, s, one: va.adapt_direction(r, r, s, one), beta, state_dtype=state_dtype
    )


def m_svag_mb(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""M-SVAG with minibatch variance estimates (M-SVAG-mb).

    .. math::
      r &\leftarrow \mu r + g, \quad \bar s \leftarrow \mu^2\bar s + \hat s \\
      \theta &\leftarrow \theta - \alpha\,\gamma\odot r, \quad
      \gamma = \frac{r^2}{r^2 + \bar s}

    `m_svag` with the variance estimated from the examples of each minibatch instead of from past
    gradients: the estimate is local and unbiased, but costs per-example gradients. The paper found
    both to behave alike. The momentum is a sum here, so learning rates are those of momentum-SGD.

    ``update`` takes one of two extra arguments: ``gradient_variance``, the estimated variance
    :math:`\hat s` of the *minibatch mean* gradient (see `optgrad.value_grad_and_variance`), or
    ``per_example_grads``, the gradients of the B ≥ 2 examples with a leading batch axis on every
    leaf. Where both are given, ``gradient_variance`` is used.

    The variance must be that of the gradient that ``update`` sees: a clip or scale ahead in the
    chain changes the one and not the other, and `optax.MultiSteps` passes the last micro-batch's
    variance on with the mean of several gradients. `optax.masked` and `optax.partition` need
    ``mask_compatible_extra_args=True``.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      beta: μ in [0, 1), the momentum; a number, a traced scalar or a schedule.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32. In 16 bits averages with β above 0.99 stand still, and squares of gradients must
        fit the type's range.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size.

    Raises:
      ValueError: if ``learning_rate`` is negative or not finite, ``beta`` is not in [0, 1), or
        an option is unknown; by ``update``, if both extra arguments are missing, B is 1, or
        shapes do not fit the gradient.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.m_svag_mb(1.0)
      >>> grads = jnp.array([[1.0, 1.0], [1.0, 3.0]])  # two examples
      >>> updates, _ = optimizer.update(
      ...     grads.mean(0), optimizer.init(jnp.zeros(2)), per_example_grads=grads)
      >>> print(updates)
      [-1.  -1.6]

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Algorithm 3 and Eq. (48).

    Deviations from the paper: Eq. (44) as printed is not the unbiased variance that it is called;
    the unbiased one is used, see `optgrad.gradient_variance`. Where :math:`r_i = 0` the update
    is 0.
    """
    direction = scale_by_m_svag_mb(beta, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="m_svag_mb",
        factory=m_svag_mb,
        scale_by=scale_by_m_svag_mb,
        family="dissecting_adam",
        title="M-SVAG with minibatch variance estimates (M-SVAG-mb)",
        reference=va.REFERENCE,
        equation="Algorithm 3, Eq. (48): θ ← θ − α·γ⊙r, γ = r²/(r² + s̄)",
        needs=frozenset({"gradient_variance", "per_example_grads"}),
        static_args=("state_dtype",),
        tunes=Tunable("learning_rate", 1e-5, 1.0),
        test_hyperparams={"learning_rate": 0.01},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

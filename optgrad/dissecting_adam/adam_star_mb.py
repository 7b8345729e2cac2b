"""Adam* with the variance within the minibatch."""

from typing import Any

import optax

from optgrad.core import averages, transforms
from optgrad.dissecting_adam import variance_adaptation as va
from optgrad.registry import Method, Tunable, register


def scale_by_adam_star_mb(
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `adam_star_mb`: γ^½⊙sign(r). Arguments as there."""
    va.check_options(beta, factor=factor)
    return va.from_minibatch_variance(
        lambda _, r, s, one: va.adapt_sign(r, s, one, factor), beta, state_dtype=state_dtype
    )


def adam_star_mb(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    factor: str = "adam",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam* with minibatch variance estimates (Adam*-mb).

    .. math::
      r &\leftarrow \mu r + g, \quad \bar s \leftarrow \mu^2\bar s + \hat s \\
      \theta &\leftarrow \theta - \alpha\,(1+\eta^2)^{-1/2}\odot\operatorname{sign}(r), \quad
      \eta^2 = \bar s/r^2

    `adam_star` with the variance estimated from the examples of each minibatch instead of from
    past gradients. The paper found both to behave alike.

    ``update`` takes one of two extra arguments: ``gradient_variance``, the estimated variance
    :math:`\hat s` of the *minibatch mean* gradient (see `optgrad.value_grad_and_variance`), or
    ``per_example_grads``, the gradients of the B ≥ 2 examples with a leading batch axis on every
    leaf. Where both are given, ``gradient_variance`` is used.

    The variance must be that of the gradient that ``update`` sees: a clip or scale ahead in the
    chain changes the one and not the other, and `optax.MultiSteps` passes the last micro-batch's
    variance on with the mean of several gradients. `optax.masked` and `optax.partition` need
    ``mask_compatible_extra_args=True``.

    Args:
      learning_rate: α ≥ 0, the largest step of a coordinate; a number, a traced scalar or
        a schedule.
      beta: μ in [0, 1), the momentum; a number, a traced scalar or a schedule.
      factor: ``"adam"`` for :math:`(1+\eta^2)^{-1/2}`, or ``"optimal"`` for
        :math:`\operatorname{erf}(1/(\sqrt2\,\eta))`, the best factor for Gaussian noise (Eq. 15).
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
      >>> optimizer = optgrad.adam_star_mb(0.1)
      >>> grads = jnp.array([[1.0, 1.0], [1.0, 3.0]])  # two examples
      >>> updates, _ = optimizer.update(
      ...     grads.mean(0), optimizer.init(jnp.zeros(2)), per_example_grads=grads)
      >>> print([f"{u:.4f}" for u in updates])
      ['-0.1000', '-0.0894']

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Algorithm 5 and Eq. (48).

    Deviations from the paper: Eq. (44) as printed is not the unbiased variance that it is called;
    the unbiased one is used, see `optgrad.gradient_variance`. Where :math:`r_i = 0` the update
    is 0.
    """
    direction = scale_by_adam_star_mb(beta, factor=factor, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="adam_star_mb",
        factory=adam_star_mb,
        scale_by=scale_by_adam_star_mb,
        family="dissecting_adam",
        title="Adam* with minibatch variance estimates (Adam*-mb)",
        reference=va.REFERENCE,
        equation="Algorithm 5: θ ← θ − α·(1 + s̄/r²)^(−1/2)⊙sign(r)",
        needs=frozenset({"gradient_variance", "per_example_grads"}),
        static_args=(
            "factor",
            "state_dtype",
        ),
        tunes=Tunable("learning_rate", 1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

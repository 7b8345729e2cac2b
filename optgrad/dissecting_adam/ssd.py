"""Stochastic sign descent."""

from typing import Any

import jax.numpy as jnp
import optax

from optgrad.core import leafwise, transforms
from optgrad.dissecting_adam import variance_adaptation
from optgrad.registry import Method, Tunable, register


def scale_by_ssd() -> optax.GradientTransformationExtraArgs:
    """The direction of `ssd`: the sign of the gradient."""

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra
        sign = leafwise.tree_map(jnp.sign, updates)
        return transforms.cast_like(sign, updates if params is None else params), state

    return transforms.transformation(optax.init_empty_state, update)


def ssd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic sign descent.

    .. math::
      \theta \leftarrow \theta - \alpha\,\operatorname{sign}(g), \qquad \operatorname{sign}(0) = 0

    It shines where gradients are noisy and the curvature is badly conditioned but axis-aligned;
    every coordinate moves by exactly α, so it needs a decreasing α to converge. The same as
    `optax.sign_sgd`.

    Args:
      learning_rate: α ≥ 0, the length of the step in every coordinate; a number, a traced scalar
        or a schedule.

    Returns:
      A `GradientTransformationExtraArgs` without averages.

    Raises:
      ValueError: if ``learning_rate`` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.ssd(0.1)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, _ = optimizer.update(jnp.array([5.0, 0.0, -0.2]), optimizer.init(params), params)
      >>> print(updates)
      [-0.1 -0.   0.1]

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Table 1 and Section 2.
    """
    return transforms.with_learning_rate(scale_by_ssd(), learning_rate)


register(
    Method(
        name="ssd",
        factory=ssd,
        scale_by=scale_by_ssd,
        family="dissecting_adam",
        title="Stochastic sign descent (SSD)",
        reference=variance_adaptation.REFERENCE,
        equation="Table 1: θ ← θ − α·sign(g)",
        tunes=Tunable("learning_rate", 1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=0,
    )
)

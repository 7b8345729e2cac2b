"""Stochastic sign descent with momentum."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, leafwise, transforms
from optgrad.dissecting_adam import variance_adaptation
from optgrad.registry import Method, Tunable, register


class ScaleByMSsdState(NamedTuple):
    """State of `scale_by_m_ssd`."""

    count: chex.Array  # number of updates, int32, shape ()
    momentum: optax.Updates  # m = Σ μˢ g, like the parameters, at least float32


def scale_by_m_ssd(
    beta: float | optax.Schedule = 0.9, *, state_dtype: Any | None = None
) -> optax.GradientTransformationExtraArgs:
    """The direction of `m_ssd`: the sign of the momentum term. Arguments as there."""
    variance_adaptation.check_options(beta, state_dtype=state_dtype)

    def init(params: optax.Params) -> ScaleByMSsdState:
        momentum = averages.zeros_like_average(params, state_dtype)
        return ScaleByMSsdState(jnp.zeros((), jnp.int32), momentum)

    def update(
        updates: optax.Updates,
        state: ScaleByMSsdState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleByMSsdState]:
        del extra
        decay = transforms.hyperparameter_at(beta, state.count)
        momentum = averages.update_sum(state.momentum, updates, decay)
        sign = leafwise.tree_map(jnp.sign, momentum)
        state = ScaleByMSsdState(optax.safe_increment(state.count), momentum)
        return transforms.cast_like(sign, updates if params is None else params), state

    return transforms.transformation(init, update)


def m_ssd(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | optax.Schedule = 0.9,
    *,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic sign descent with momentum (M-SSD).

    .. math::
      m \leftarrow \mu m + g, \qquad \theta \leftarrow \theta - \alpha\,\operatorname{sign}(m)

    Adam's sign without its variance adaptation. It is level with Adam where signs are what helps
    (the paper's MNIST and CIFAR-10 problems) and fails where Adam fails. The same as
    `optax.signum` except that the momentum is kept in float32 for low-precision parameters.

    Args:
      learning_rate: α ≥ 0, the length of the step in every coordinate; a number, a traced scalar
        or a schedule.
      beta: μ in [0, 1), the momentum; a number, a traced scalar or a schedule.
      state_dtype: type of the momentum; default the parameter's, but at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size.

    Raises:
      ValueError: if ``learning_rate`` is negative or not finite, or ``beta`` is not in [0, 1).

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.m_ssd(0.1, beta=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 4.0]), jnp.array([-1.0, -1.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> print(updates)
      [ 0.1 -0.1]

    References:
      L. Balles, P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients", 2018, Algorithm 1.
    """
    direction = scale_by_m_ssd(beta, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="m_ssd",
        factory=m_ssd,
        scale_by=scale_by_m_ssd,
        family="dissecting_adam",
        title="Stochastic sign descent with momentum (M-SSD)",
        reference=variance_adaptation.REFERENCE,
        equation="Algorithm 1: m ← μm + g; θ ← θ − α·sign(m)",
        static_args=("state_dtype",),
        tunes=Tunable("learning_rate", 1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=1,
        low_precision=averages.LOW_PRECISION,
    )
)

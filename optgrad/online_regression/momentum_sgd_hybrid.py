"""Frequent small steps of SGD, rare large ones along the mean gradient."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, transforms
from optgrad.online_regression import parabola
from optgrad.registry import Method, Tunable, register


class MomentumSGDHybridState(NamedTuple):
    """The gradients since the last large step."""

    count: chex.Array  # number of updates, int32, shape ()
    mean_gradient: optax.Updates  # of the gradients since then, like the parameters


def scale_by_momentum_sgd_hybrid(
    large: float | optax.Schedule = 5.0, *, period: int = 10, state_dtype: Any | None = None
) -> optax.GradientTransformationExtraArgs:
    """The direction of `momentum_sgd_hybrid`: g, and at every k-th step g + Λ·m."""
    checks.check_in_range("large", large, 0.0, high_open=True)
    checks.check_count("period", period, 1)
    checks.check_float_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> MomentumSGDHybridState:
        zeros = averages.zeros_like_average(params, state_dtype)
        return MomentumSGDHybridState(jnp.zeros((), jnp.int32), zeros)

    def update(
        updates: optax.Updates,
        state: MomentumSGDHybridState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MomentumSGDHybridState]:
        del extra
        number = state.count % period + 1  # of the gradient since the last large step
        share = 1.0 / number.astype(averages.scalar_dtype())
        amount = transforms.hyperparameter_at(large, state.count)
        amount = jnp.where(number == period, amount, 0.0)

        def mean(m: chex.Array, g: chex.Array) -> chex.Array:
            old = m.astype(averages.average_dtype(m))
            gradient = g.astype(old.dtype)
            # The first gradient of a period replaces the mean, whatever that was.
            apart = jnp.where(number == 1, 0.0, old - gradient)
            return (gradient + (1 - share).astype(old.dtype) * apart).astype(m.dtype)

        def direction(g: chex.Array, m: chex.Array) -> chex.Array:
            wide = g.astype(averages.average_dtype(g))
            return wide + amount.astype(wide.dtype) * m.astype(wide.dtype)

        means = leafwise.tree_map(mean, state.mean_gradient, updates)
        directions = leafwise.tree_map(direction, updates, means)
        new = MomentumSGDHybridState(optax.safe_increment(state.count), means)
        return transforms.cast_like(directions, updates if params is None else params), new

    return transforms.transformation(init, update)


def momentum_sgd_hybrid(
    learning_rate: optax.ScalarOrSchedule,
    large: float | optax.Schedule = 5.0,
    *,
    period: int = 10,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum–SGD hybrid: small steps all the time, a large one along the mean every k steps.

    .. math::
      \theta \leftarrow \theta - \alpha\,g_t \qquad\text{and where } k \mid t\text{:}\quad
      \theta \leftarrow \theta - \alpha\,\Lambda\,\frac1k\sum_{i=t-k+1}^{t} g_i

    The idea of the paper's conclusions, "rare large certain steps interleaved with frequent small
    noisy steps". The large step is taken along a mean whose noise is k times smaller in variance.
    It is here for completeness: no gain over SGD was found, with or without noise (a quadratic
    problem: 0.0014 against 0.0003 of SGD without noise, 0.055 for both with noise). With Λ = k it
    is SGD with twice the rate and half of it delayed.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      large: Λ ≥ 0, length of the large step relative to the small ones; 0 is SGD.
      period: k ≥ 1, steps from one large step to the next.
      state_dtype: type of the mean; default the parameter's, but at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size.

    Raises:
      ValueError: if ``learning_rate`` or ``large`` is negative or not finite, or ``period`` < 1.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.momentum_sgd_hybrid(0.1, 2.0, period=2)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for gradient in (1.0, 3.0, 1.0):
      ...     updates, state = optimizer.update(jnp.array([gradient]), state)
      ...     print(f"{updates[0]:.2f}")
      -0.10
      -0.70
      -0.10

    References:
      J. Duda, "SGD momentum optimizer with step estimation by online parabola model", 2019,
      Section V (one sentence; the form is ours).
    """
    direction = scale_by_momentum_sgd_hybrid(large, period=period, state_dtype=state_dtype)
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="momentum_sgd_hybrid",
        factory=momentum_sgd_hybrid,
        scale_by=scale_by_momentum_sgd_hybrid,
        family="online_regression",
        title="Momentum–SGD hybrid",
        reference=parabola.REFERENCE,
        equation="Section V: θ ← θ − α·g, every k steps also θ ← θ − α·Λ·mean(g)",
        static_args=("period", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=1,
        low_precision=averages.LOW_PRECISION,
    )
)

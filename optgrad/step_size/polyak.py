"""Gradient descent with Polyak's step size."""

import math

import chex
import jax.numpy as jnp
import optax

from optgrad.core import checks, transforms
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import loss_based


def polyak(
    f_min: float | optax.Schedule = 0.0,
    *,
    scaling: float | optax.Schedule = 1.0,
    max_learning_rate: float | optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Polyak's step size: as far as the tangent needs to fall from the loss to its minimum.

    .. math::
      \theta \leftarrow \theta - s\,
      \min\Bigl(\frac{\max(f - f^*, 0)}{\lVert g\rVert^2},\, \gamma_{max}\Bigr)\, g

    On a convex function, with the right :math:`f^*` and s = 1, no step increases the distance from
    a minimum. It shines where :math:`f^*` is known, as in interpolation, where it is 0: with it
    full-batch least squares and Rosenbrock's function are solved to rounding, and no learning rate
    is tuned. It fails where :math:`f^*` is too low (noise, regularisation): steps grow without
    bound as the gradient vanishes. On least squares with label noise (start 1.03 above the minimum
    of 0.12), told :math:`f^* = 0`, it ends 0.05 above the minimum with batches of 1 or 20, where
    SGD at a rate of 0.1 ends at 0.04 and 0.0015, and on all examples it is thrown to losses of 10⁴
    again and again. ``max_learning_rate`` is the remedy, see also `sps`. On an isotropic quadratic
    a step is half of the optimal one; s = 2 reaches the minimum at once.

    Args:
      f_min: :math:`f^*`, the least value of the loss, or a lower bound of it.
      scaling: s ≥ 0, factor of every step, the capped ones included.
      max_learning_rate: :math:`\gamma_{max}` > 0, cap of the step size before s; None is no cap.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds scalars only. Its ``update`` needs
      ``value``, the loss. Where the loss or :math:`\lVert g\rVert^2` is not finite, nothing moves
      and a counter of the state tells so.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given ``value``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: jnp.sum(x**2) + 3.0
      >>> optimizer = optgrad.polyak(f_min=3.0)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     value, gradient = jax.value_and_grad(loss)(params)
      ...     updates, state = optimizer.update(gradient, state, params, value=value)
      ...     params = params + updates
      ...     print(params, state.diagnostics()["step_size"])
      [0.5 1. ] 0.25
      [0.25 0.5 ] 0.25
      [0.125 0.25 ] 0.25

    References:
      B. T. Polyak, "Introduction to Optimization", 1987; in H. Yao, "Learning to
      Accelerate by the Methods of Step-size Planning", 2022, Eq. (1).

    Deviations from the book: s, the cap, and a step of 0 where the loss is below :math:`f^*` or the
    gradient is 0. `optax.polyak_sgd` (here the baseline ``polyak_sgd``) multiplies the gradient by
    s before it is squared, so that its s acts as 1/s wherever the cap is inactive, goes uphill
    where the loss is below :math:`f^*`, and stops where :math:`\lVert g\rVert < 1.5\cdot10^{-8}`,
    in float64 too.
    """
    checks.check_in_range("f_min", f_min, -math.inf, high_open=True)
    checks.check_in_range("scaling", scaling, 0.0, high_open=True)
    if max_learning_rate is not None:
        checks.check_in_range("max_learning_rate", max_learning_rate, 0.0, low_open=True)

    def rule(
        value: chex.Array, size: chex.Array, state: loss_based.GradientStepState
    ) -> chex.Array:
        least = transforms.hyperparameter_at(f_min, state.count)
        step = loss_based.quotient(jnp.maximum(value - least, 0.0), size)
        if max_learning_rate is not None:
            cap = transforms.hyperparameter_at(max_learning_rate, state.count)
            step = jnp.minimum(step, cap)
        factor = transforms.hyperparameter_at(scaling, state.count)
        return jnp.minimum(factor * step, loss_based.LARGEST)

    return loss_based.along_gradient(rule)


register(
    Method(
        name="polyak",
        factory=polyak,
        scale_by=None,
        family="step_size",
        title="Gradient descent with the Polyak step size",
        reference=loss_based.POLYAK,
        equation="θ ← θ − s·min(max(f − f*, 0)/‖g‖², γ_max)·g",
        needs=frozenset({"value"}),
        tunes=Tunable("max_learning_rate", 1e-3, 1e2),
        test_hyperparams={"max_learning_rate": 1.0},
        state_size=0,
    )
)

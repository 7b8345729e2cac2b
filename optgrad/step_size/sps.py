"""Stochastic Polyak step size."""

import math

import chex
import jax.numpy as jnp
import optax

from optgrad.core import checks, transforms
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import loss_based


def sps(
    max_learning_rate: float | optax.Schedule = 1.0,
    *,
    c: float | optax.Schedule = 0.5,
    lower_bound: float | optax.Schedule = 0.0,
    tau: float | optax.Schedule | None = None,
    batch_share: float | optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic Polyak step size: Polyak's rule on the minibatch's loss, with a cap.

    .. math::
      \theta \leftarrow \theta - \gamma_k\, g, \quad
      \gamma_k = \min\Bigl(\frac{\max(f - \ell^*, 0)}{c\,\lVert g\rVert^2},\,\gamma_{b,k}\Bigr),
      \quad \gamma_{b,k} = \gamma_b \quad\text{or}\quad \tau^{b/N}\gamma_{k-1}

    f is the loss of the batch and :math:`\ell^*` a lower bound of it, 0 for most losses. The second
    form of the cap, smoothing, lets the step size grow by a factor τ per epoch at most.

    It shines where the model can fit every batch. Elsewhere :math:`f/\lVert g\rVert^2` is large at
    the minimum of the mean loss, and the cap is the learning rate: on least squares with label
    noise (start 1.03 above the minimum) it ends where SGD ends at :math:`\gamma_b = 0.1` (0.04 with
    batches of 1, 0.0015 with 20), and worse, 0.2 above the minimum with either, with a cap of 10.
    Smoothing recovers slowly from one batch with a small loss, and is no cap: the step size still
    grows without bound. c = ½ is the optimal step on an isotropic quadratic; c < ½ overshoots, and
    c = 0.2, which is used for networks, diverges on a full-batch quadratic.

    Args:
      max_learning_rate: :math:`\gamma_b` > 0, the cap, 1 to 10 in the paper; with smoothing
        :math:`\gamma_0`, and no cap otherwise.
      c: c > 0; ½ or more in the convex theory.
      lower_bound: :math:`\ell^*`, lower bound of the loss of any batch.
      tau: τ ≥ 1, growth of the cap in one epoch, 2 in the paper; None is no smoothing.
      batch_share: b/N in (0, 1], size of a batch relative to the data; with ``tau`` only.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds scalars only. Its ``update`` needs
      ``value``, the loss of the batch. Where the loss or :math:`\lVert g\rVert^2` is not finite,
      nothing moves and a counter of the state tells so.

    Raises:
      ValueError: if an argument is outside its range, if only one of ``tau`` and ``batch_share`` is
        given, or if ``update`` is not given ``value``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: jnp.sum(x**2)
      >>> optimizer = optgrad.sps(max_learning_rate=0.3)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> value, gradient = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(gradient, state, params, value=value)
      >>> print(f"{state.step_size:.2f}", [f"{u:.2f}" for u in updates])
      0.30 ['-0.60', '-1.20']

    References:
      N. Loizou, S. Vaswani, I. Laradji, S. Lacoste-Julien, "Stochastic Polyak Step-size for SGD: An
      Adaptive Learning Rate for Fast Convergence", 2021: SPS_max, and the smoothing of its
      experiments.

    Deviations from the paper: a loss below :math:`\ell^*` gives a step of 0 instead of an uphill
    one, and smoothing remembers the last step size that was not 0, since the paper's recursion
    never leaves 0 again. The authors' code adds 10⁻⁸ to the denominator.
    """
    checks.check_in_range("max_learning_rate", max_learning_rate, 0.0, low_open=True)
    checks.check_in_range("c", c, 0.0, low_open=True, high_open=True)
    checks.check_in_range("lower_bound", lower_bound, -math.inf, high_open=True)
    if tau is None or batch_share is None:
        _check_absent(tau, batch_share)
    else:
        checks.check_in_range("tau", tau, 1.0, high_open=True)
        checks.check_in_range("batch_share", batch_share, 0.0, 1.0, low_open=True)

    def cap(state: loss_based.GradientStepState) -> chex.Numeric:
        first = transforms.hyperparameter_at(max_learning_rate, state.count)
        if tau is None or batch_share is None:
            return first
        growth = jnp.power(
            transforms.hyperparameter_at(tau, state.count),
            transforms.hyperparameter_at(batch_share, state.count),
        )
        return growth * jnp.where(state.step_size > 0, state.step_size, first)

    def rule(
        value: chex.Array, size: chex.Array, state: loss_based.GradientStepState
    ) -> chex.Array:
        least = transforms.hyperparameter_at(lower_bound, state.count)
        step = loss_based.quotient(jnp.maximum(value - least, 0.0), size)
        step = step / transforms.hyperparameter_at(c, state.count)
        return jnp.minimum(jnp.minimum(step, cap(state)), loss_based.LARGEST)

    return loss_based.along_gradient(rule)


def _check_absent(tau: object, batch_share: object) -> None:
    if (tau is None) != (batch_share is None):
        raise ValueError(
            f"tau = {tau} and batch_share = {batch_share}; accepted: both, for a cap that grows "
            "by tau per epoch, or neither"
        )


register(
    Method(
        name="sps",
        factory=sps,
        scale_by=None,
        family="step_size",
        title="Stochastic Polyak step size (SPS_max)",
        reference=loss_based.SPS,
        equation="SPS_max: θ ← θ − min((f − ℓ*)/(c‖g‖²), γ_b)·g",
        needs=frozenset({"value"}),
        tunes=Tunable("max_learning_rate", 1e-3, 1e2),
        test_hyperparams={"max_learning_rate": 1.0},
        state_size=0,
    )
)

"""L4 along the mean gradient."""

from typing import Any

import optax

from optgrad.core import averages
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import linearized_loss as ll
from optgrad.step_size import loss_based


def l4_momentum(
    fraction: float | optax.Schedule = 0.15,
    *,
    beta: float | optax.Schedule = 0.9,
    f_min: float | optax.Schedule = 0.0,
    min_loss_factor: float | optax.Schedule = 0.9,
    initial_factor: float | optax.Schedule = 0.75,
    forget_time: float | optax.Schedule = 1000.0,
    epsilon: float | optax.Schedule = 1e-12,
    max_learning_rate: float | optax.Schedule | None = None,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""L4 with momentum (L4Mom): a step along the mean gradient, as long as the loss says.

    .. math::
      L_{min} &\leftarrow \min(L_{min}, f) \quad(\gamma_0 f\text{ at the first step}), \quad
      m \leftarrow \beta m + (1-\beta) g, \quad \hat m = m/(1-\beta^t) \\
      \theta &\leftarrow \theta - \eta\,\hat m, \quad
      \eta = \alpha\,\frac{f - \gamma L_{min}}{\lVert\hat m\rVert^2 + \epsilon}, \quad
      L_{min} \leftarrow (1 + 1/\tau)\,L_{min}

    Polyak's step with an estimate of the minimum: a share of the lowest loss seen, forgotten slowly
    since one batch may be lucky.

    It shines where the loss can reach ``f_min``, with nothing to tune; it falls by about
    α(1 − γ) = 1.5 % per step there. It fails where the loss cannot: the target
    :math:`\gamma L_{min}` stays below the minimum, :math:`\lVert\hat m\rVert` vanishes near it, η
    grows without bound, and the loss stalls above its minimum or is thrown far away. On least
    squares with label noise (start 1.03 above the minimum of 0.12) it ends 0.2 above the minimum
    with batches of 1, 0.13 with 20 and 0.02 with all examples; with α = 0.05 it is 0.03 with
    batches of 1. ``max_learning_rate`` or a good ``f_min`` is the remedy.

    Args:
      fraction: α ≥ 0, share of the way to the target.
      beta: β in [0, 1), decay of the mean gradient; 1 − β is the inverse of the paper's time of 10.
      f_min: a lower bound of the loss; f above stands for the loss minus it, and for 0 where the
        loss is below.
      min_loss_factor: γ in [0, 1], share of the lowest loss that is the target.
      initial_factor: :math:`\gamma_0` in [0, 1], the lowest loss at the start, relative to the
        first loss.
      forget_time: τ in (0, ∞], steps in which the lowest loss is relaxed e-fold.
      epsilon: ϵ ≥ 0.
      max_learning_rate: cap of η, above 0; None is no cap.
      state_dtype: type of the mean gradient; default the parameter's, but at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size. Its
      ``update`` needs ``value``, the loss. Where the loss or the mean gradient is not finite the
      step is skipped: nothing changes but a counter.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given ``value``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: jnp.sum(x**2)
      >>> optimizer = optgrad.l4_momentum(0.2)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> value, gradient = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(gradient, state, params, value=value)
      >>> print([f"{u:.4f}" for u in updates])  # 0.2·(1 − 0.9·0.75)·5/20 times (2, 4)
      ['-0.0325', '-0.0650']
      >>> print({name: f"{x:.5f}" for name, x in state.diagnostics().items()})
      {'step_size': '0.01625', 'min_loss': '3.75375', 'skipped_steps': '0.00000'}

    References:
      M. Rolinek, G. Martius, "L4: Practical loss-based stepsize adaptation for deep learning",
      2018, Algorithm 1 with momentum for both g and v, in the order of the authors' code.

    Deviations from the paper: ``f_min``, since with a negative loss the factors of
    :math:`L_{min}` act the wrong way, and the cap.
    """
    rule = ll.StepRule(
        fraction=fraction,
        beta=beta,
        f_min=f_min,
        min_loss_factor=min_loss_factor,
        initial_factor=initial_factor,
        forget_time=forget_time,
        epsilon=epsilon,
        max_learning_rate=max_learning_rate,
        state_dtype=state_dtype,
    )
    mean_itself = ll.Direction(lambda gradient: (), lambda mean, state: mean)
    return ll.along(lambda sample, _: mean_itself, lambda _: (), rule)


register(
    Method(
        name="l4_momentum",
        factory=l4_momentum,
        scale_by=None,
        family="step_size",
        title="L4 with momentum (L4Mom)",
        reference=loss_based.L4,
        equation="Algorithm 1: θ ← θ − α(f − γL_min)/(‖m̂‖² + ϵ)·m̂",
        needs=frozenset({"value"}),
        static_args=("state_dtype",),
        tunes=Tunable("fraction", 1e-3, 1e0),
        test_hyperparams={"fraction": 0.3, "max_learning_rate": 0.5},
        state_size=1,
        low_precision=averages.LOW_PRECISION,
    )
)

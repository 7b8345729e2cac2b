"""L4 along Adam's direction."""

from typing import Any

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, transforms, trees
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import linearized_loss as ll
from optgrad.step_size import loss_based


def l4_adam(
    fraction: float | optax.Schedule = 0.15,
    *,
    beta: float | optax.Schedule = 0.9,
    beta_variance: float | optax.Schedule = 0.999,
    epsilon_root: float | optax.Schedule = 1e-4,
    f_min: float | optax.Schedule = 0.0,
    min_loss_factor: float | optax.Schedule = 0.9,
    initial_factor: float | optax.Schedule = 0.75,
    forget_time: float | optax.Schedule = 1000.0,
    epsilon: float | optax.Schedule = 1e-12,
    max_learning_rate: float | optax.Schedule | None = None,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""L4 with Adam's direction (L4Adam): its length is what the loss says.

    .. math::
      L_{min} &\leftarrow \min(L_{min}, f) \quad(\gamma_0 f\text{ at the first step}) \\
      m &\leftarrow \beta m + (1-\beta) g, \quad \hat m = m/(1-\beta^t), \quad
      v \leftarrow \beta' v + (1-\beta') g^2, \quad \hat v = v/(1-\beta'^t) \\
      d &= \hat m/(\sqrt{\hat v} + \epsilon'), \quad
      \theta \leftarrow \theta - \eta\,d, \quad
      \eta = \alpha\,\frac{f - \gamma L_{min}}{\langle\hat m, d\rangle + \epsilon}, \quad
      L_{min} \leftarrow (1 + 1/\tau)\,L_{min}

    Adam without a learning rate. It shines and fails where `l4_momentum` does: with nothing to tune
    where the loss can reach ``f_min``, and stalling above the minimum where it cannot, since η
    grows without bound as :math:`\hat m` vanishes. On least squares with label noise (start 1.03
    above the minimum of 0.12) it ends 0.2 above the minimum with batches of 1, 0.13 with 20 and
    0.02 with all examples; with α = 0.05 it is 0.03 with batches of 1. Cap η with
    ``max_learning_rate`` there, as if it were Adam's learning rate.

    Args:
      fraction: α ≥ 0, share of the way to the target.
      beta: β in [0, 1), decay of the mean gradient; 1 − β is the inverse of the paper's time of 10.
      beta_variance: β' in [0, 1), decay of the mean square; the paper's time is 1000.
      epsilon_root: ϵ' ≥ 0, added to the root of the mean square.
      f_min: a lower bound of the loss; f above stands for the loss minus it, and for 0 where the
        loss is below.
      min_loss_factor: γ in [0, 1], share of the lowest loss that is the target.
      initial_factor: :math:`\gamma_0` in [0, 1], the lowest loss at the start, relative to the
        first loss.
      forget_time: τ in (0, ∞], steps in which the lowest loss is relaxed e-fold.
      epsilon: ϵ ≥ 0.
      max_learning_rate: cap of η, above 0; None is no cap.
      state_dtype: type of the averages; default the parameter's, but at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size. Its
      ``update`` needs ``value``, the loss. Where the loss or the gradient is not finite the step
      is skipped: nothing changes but a counter; where only the inner product overflows, it is 0.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given ``value``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: jnp.sum(x**2)
      >>> optimizer = optgrad.l4_adam()
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> value, gradient = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(gradient, state, params, value=value)
      >>> print([f"{u:.4f}" for u in updates])  # 0.15·(1 − 0.9·0.75)·5/6 times the signs
      ['-0.0406', '-0.0406']

    References:
      M. Rolinek, G. Martius, "L4: Practical loss-based stepsize adaptation for deep learning",
      2018, Algorithm 1 with momentum for g and Adam for v, in the order of the authors' code.

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
    checks.check_in_range("beta_variance", beta_variance, 0.0, 1.0, high_open=True)
    checks.check_in_range("epsilon_root", epsilon_root, 0.0, high_open=True)

    def direction(sample: ll.Sample, state: ll.L4State) -> ll.Direction:
        decay, added = (
            transforms.hyperparameter_at(x, state.count) for x in (beta_variance, epsilon_root)
        )
        weights = averages.sample_weights(optax.safe_increment(state.count), decay)

        def vector(mean: optax.Updates, squares: optax.Updates) -> optax.Updates:
            return leafwise.tree_map(lambda m, v: _ratio(m, v, added), mean, squares)

        def mean_squares(gradient: optax.Updates) -> optax.Updates:
            squares = leafwise.tree_map(lambda g: jnp.square(trees.wide(g)), gradient)
            return averages.update_mean(state.direction, squares, weights)

        return ll.Direction(mean_squares, vector)

    def init_direction(params: optax.Params) -> optax.Updates:
        return averages.zeros_like_average(params, state_dtype)

    return ll.along(direction, init_direction, rule)


def _ratio(mean: chex.Array, square: chex.Array, added: chex.Numeric) -> chex.Array:
    """m/(√v + ϵ'), 0 where that is 0/0."""
    mean = trees.wide(mean)
    size = jnp.sqrt(trees.wide(square)) + jnp.asarray(added, mean.dtype)
    positive = size > 0
    return jnp.where(positive, mean / jnp.where(positive, size, 1.0), 0.0)


register(
    Method(
        name="l4_adam",
        factory=l4_adam,
        scale_by=None,
        family="step_size",
        title="L4 with Adam (L4Adam)",
        reference=loss_based.L4,
        equation="Algorithm 1: θ ← θ − η·d, η = α(f − γL_min)/(⟨m̂, d⟩ + ϵ), d = m̂/(√v̂ + ϵ')",
        needs=frozenset({"value"}),
        static_args=("state_dtype",),
        tunes=Tunable("fraction", 1e-3, 1e0),
        test_hyperparams={"fraction": 0.3, "max_learning_rate": 0.1},
        state_size=2,
        low_precision=averages.LOW_PRECISION,
    )
)

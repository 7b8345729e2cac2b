"""L4's step size along any direction."""

from typing import Any

import optax

from optgrad.step_size import linearized_loss as ll


def l4(
    direction: optax.GradientTransformation,
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
    r"""L4's step size for any direction v, such as `optax.scale_by_adam`'s.

    .. math::
      L_{min} &\leftarrow \min(L_{min}, f) \quad(\gamma_0 f\text{ at the first step}), \quad
      \hat m \leftarrow \text{bias-corrected average of } g \\
      \theta &\leftarrow \theta - \eta v, \quad
      \eta = \alpha\,\frac{f - \gamma L_{min}}{\langle \hat m, v\rangle + \epsilon}, \quad
      L_{min} \leftarrow (1 + 1/\tau)\,L_{min}

    η v would lower the linearised loss by the fraction α of its distance from the target
    :math:`\gamma L_{min}`. No learning rate is tuned; the scale of v does not matter, and that of
    the loss neither. See `l4_momentum` for where it shines and fails.

    Args:
      direction: a transformation that gives a positive direction of descent (``scale_by_…``); one
        that ends with a multiplication by −learning_rate never moves. Its ``update`` receives all
        extra arguments, ``value`` included.
      fraction: α ≥ 0, share of the way to the target.
      beta: decay in [0, 1) of the mean gradient.
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
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size and the
      direction's state. Its ``update`` needs ``value``, the loss, and what the direction needs.
      Where the loss or the gradient is not finite the step is skipped, the direction's too; where
      only the inner product overflows, the step is 0.

    Raises:
      TypeError: if ``direction`` is not a transformation.
      ValueError: if an argument is outside its range, or if ``update`` is not given ``value``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> params = jnp.array([1.0, 2.0])
      >>> value, gradient = jax.value_and_grad(lambda x: jnp.sum(x**2))(params)
      >>> for direction in (optax.scale_by_sign(), optax.scale_by_rss(initial_accumulator_value=0)):
      ...     optimizer = optgrad.l4(direction, 0.2)
      ...     state = optimizer.init(params)
      ...     updates, state = optimizer.update(gradient, state, params, value=value)
      ...     print([f"{u:.4f}" for u in updates])  # 0.2·(1 − 0.9·0.75)·5/6 times the signs
      ['-0.0542', '-0.0542']
      ['-0.0542', '-0.0542']

    References:
      M. Rolinek, G. Martius, "L4: Practical loss-based stepsize adaptation for deep learning",
      2018, Algorithm 1.

    Deviations from the paper: where the inner product is not positive (v is not the mean gradient
    times something positive) the step is 0, not one uphill along v; ``f_min``, since with a
    negative loss the factors of :math:`L_{min}` act the wrong way; the cap.
    """
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction = {direction!r} is not a transformation; accepted: an "
            "optax.GradientTransformation such as optax.scale_by_adam()"
        )
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
    transformation = optax.with_extra_args_support(direction)

    def apply(sample: ll.Sample, state: ll.L4State) -> ll.Direction:
        vector, inner = transformation.update(
            sample.gradient, state.direction, sample.params, **sample.extra
        )
        return ll.Direction(lambda gradient: inner, lambda mean, state: vector)

    return ll.along(apply, transformation.init, rule)

"""Small pieces that every family's transformations are assembled from."""

from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise

_Tree = TypeVar("_Tree")


def transformation(
    init: optax.TransformInitFn, update: optax.TransformUpdateExtraArgsFn
) -> optax.GradientTransformationExtraArgs:
    """A method's transformation: ``init`` refuses parameters that are not real numbers.

    Raises:
      TypeError: by ``init``, for integers, bools and complex numbers; it names the leaf.
    """

    def checked(params: optax.Params) -> optax.OptState:
        checks.check_real_leaves("params", params)
        return init(params)

    return optax.GradientTransformationExtraArgs(checked, update)


def with_learning_rate(
    direction: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The optimizer θ ← θ − α·direction, as a chain of two.

    Unlike `optax.scale_by_learning_rate`, a traced or injected float32 rate leaves the updates in
    the type that the direction gave them.

    Args:
      direction: the positive direction.
      learning_rate: α ≥ 0, a number, a traced scalar or a schedule.

    Raises:
      ValueError: for a negative or non-finite rate.
    """
    checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    scale = optax.scale_by_learning_rate(learning_rate)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        scaled, state = scale.update(updates, state, params)
        return cast_like(scaled, updates), state

    return optax.chain(direction, optax.GradientTransformation(scale.init, update))


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """``tree`` with each floating-point leaf in the type of its counterpart in ``like``."""

    def cast(x: chex.Array, y: chex.Array) -> chex.Array:
        is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, jnp.result_type(y)) if is_float else x

    return leafwise.tree_map(cast, tree, like)


def strongly_typed(tree: _Tree) -> _Tree:
    """The tree without weak types, which some optax states gain or lose: each would recompile."""

    def strong(x: Any) -> chex.Array:
        x = jnp.asarray(x)
        return jax.lax.convert_element_type(x, x.dtype)

    typed: _Tree = jax.tree.map(strong, tree)
    return typed


def hyperparameter_at(value: Any, count: chex.Array) -> chex.Array:
    """The value of a hyperparameter at step ``count``: schedules are called, numbers are kept.

    In at least float32, so that a decay near 1 survives low-precision parameters.
    """
    value = value(count) if callable(value) else value
    if isinstance(value, jax.Array):
        return value.astype(averages.scalar_dtype())
    return value


def require_params(params: optax.Params | None) -> optax.Params:
    """``params``, refused if they are missing.

    Raises:
      ValueError: for ``None``.
    """
    if params is None:
        raise ValueError(
            "params = None; accepted: the parameters at which the gradient was evaluated, "
            "optimizer.update(gradient, state, params)"
        )
    return params


def require_value(value: Any) -> chex.Array:
    """The loss as a scalar of at least float32.

    Raises:
      ValueError: if it is missing, or is not one number.
    """
    if value is None:
        raise ValueError(
            "value = None; accepted: the loss at params, a scalar, "
            "optimizer.update(gradient, state, params, value=loss)"
        )
    value = jnp.asarray(value, averages.scalar_dtype())
    if value.shape:
        raise ValueError(
            f"value has the shape {value.shape}; accepted: a scalar, the mean loss of the batch"
        )
    return value

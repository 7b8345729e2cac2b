"""The diagonal of the Gauss–Newton matrix of any model and loss."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, oracles, transforms, trees

ModelFn = Callable[[Any, Any], Any]
OutputLossFn = Callable[[Any, Any], chex.Array]


def gauss_newton_diagonal(
    model_fn: ModelFn,
    loss_fn: OutputLossFn,
    params: optax.Params,
    inputs: chex.ArrayTree,
    targets: chex.ArrayTree,
    *,
    microbatch_size: int | None = None,
) -> optax.Updates:
    r"""The exact diagonal of the Gauss–Newton matrix of a mean loss, as ``curvature_diagonal``.

    .. math::
      \operatorname{diag}\Big(\frac1B\sum_{k=1}^B J_k^\top H_k J_k\Big)
      = \frac1B\sum_{k=1}^B\sum_{c=1}^C \big(J_k^\top s_{kc}\big)^2, \qquad
      H_k = \sum_c s_{kc}s_{kc}^\top

    with the Jacobian :math:`J_k` of the C outputs for one example and the C × C Hessian
    :math:`H_k` of its loss in these, factorised by its eigenvectors. It is the diagonal of the
    Hessian without the curvature of the model itself: never negative, exact for linear models, and
    for the losses of exponential families (squared loss, cross-entropy of logits) equal to that of
    the Fisher matrix. The cost is that of C gradients of every example.

    Args:
      model_fn: ``(params, input) -> outputs`` for *one* example; outputs may be any pytree. A
        model that wants a batch is handed one of size 1, ``lambda p, x: apply(p, x[None])[0]``.
      loss_fn: ``(outputs, target) -> loss`` of one example, a scalar, convex in the outputs;
        where it is not, negative eigenvalues of :math:`H_k` count as 0.
      params: θ, a pytree of floating-point arrays.
      inputs: B inputs, stacked along the leading axis of every leaf.
      targets: B targets, likewise.
      microbatch_size: examples whose C gradients are held at once (microbatch_size × C × D numbers
        for D parameters); it need not divide B. Default: all.

    Returns:
      A tree like ``params``, at least float32, with entries ≥ 0.

    Raises:
      ValueError: for an empty batch, leaves of different batch sizes or a bad microbatch size.

    Examples:
      A linear model with half the squared error, whose curvature is the mean squared input:

      >>> inputs = jnp.array([[1.0, 3.0], [1.0, -1.0]])
      >>> squared = lambda output, target: 0.5 * (output - target) ** 2
      >>> print(gauss_newton_diagonal(jnp.dot, squared, jnp.zeros(2), inputs, jnp.ones(2)))
      [1. 5.]
    """
    size = oracles.batch_size((inputs, targets), "(inputs, targets)")
    chunk = oracles.examples_at_once(microbatch_size, size)

    def sum_over(examples: tuple[Any, Any]) -> optax.Updates:
        squares = jax.vmap(lambda example: _diagonal(model_fn, loss_fn, params, *example))(examples)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), squares)

    whole = size - size % chunk
    examples = (inputs, targets)
    if whole == chunk:  # no loop: XLA on CPU is slow at convolutions in one
        total = sum_over(jax.tree.map(lambda x: x[:chunk], examples))
    else:
        head = jax.tree.map(
            lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), examples
        )
        zeros = averages.zeros_like_average(params)
        total = jax.lax.scan(lambda sums, part: (_add(sums, sum_over(part)), None), zeros, head)[0]
    if whole < size:
        total = _add(total, sum_over(jax.tree.map(lambda x: x[whole:], examples)))
    return jax.tree.map(lambda x: x / size, total)


def _add(x: optax.Updates, y: optax.Updates) -> optax.Updates:
    return jax.tree.map(jnp.add, x, y)


def _diagonal(
    model_fn: ModelFn, loss_fn: OutputLossFn, params: optax.Params, example: Any, target: Any
) -> optax.Updates:
    """Of one example: the sum of the squared gradients along the factor of H."""
    outputs, pull_back = jax.vjp(lambda p: model_fn(p, example), params)
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(trees.wide, outputs))
    factor = _factor(jax.hessian(lambda flat: loss_fn(unravel(flat), target))(flat))

    def gradient_along(direction: chex.Array) -> optax.Updates:
        return pull_back(transforms.cast_like(unravel(direction), outputs))[0]

    rows = jax.vmap(gradient_along)(factor.T)
    return jax.tree.map(lambda row: jnp.sum(jnp.square(trees.wide(row)), axis=0), rows)


def _factor(hessian: chex.Array) -> chex.Array:
    """S with S·Sᵀ = H, for a matrix that may be singular (that of a softmax is)."""
    values, vectors = linalg.eigh(hessian)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))

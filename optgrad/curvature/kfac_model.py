"""The quadratic model of the loss along a few directions, and the step that minimises it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import linalg, transforms


class ModelStep(NamedTuple):
    """The minimum of a model m of the loss along some directions."""

    coefficients: chex.Array  # of all directions, shape (k,)
    decrease: chex.Array  # −m at that minimum, shape ()


def minimize(
    outputs_fn: Callable[[Any], Any],
    out_loss_fn: Callable[[Any], chex.Array],
    params: optax.Params,
    grad: optax.Updates,
    directions: Sequence[chex.ArrayTree],
    *,
    damping: chex.Array,
    has_update: bool,
) -> ModelStep:
    r"""The best combination of some directions in the damped Gauss–Newton model of the loss.

    .. math::
      m(c) = \sum_i c_i\langle g, d_i\rangle
        + \tfrac12 \sum_{ij} c_i c_j \langle d_i, (J^\top L J + \lambda I) d_j\rangle

    One forward derivative of the outputs for each direction, no backward pass.

    Args:
      outputs_fn: params -> z.
      out_loss_fn: z -> loss, convex.
      params: θ.
      grad: g.
      directions: trees like the parameters; zero ones get the coefficient 0.
      damping: λ.
      has_update: whether the last direction is an update, of which no more than all is taken: its
        coefficient is sought in [0, 1].
    """
    outputs, push = jax.linearize(outputs_fn, params)
    out_grad = jax.grad(out_loss_fn)
    images = [push(transforms.cast_like(d, params)) for d in directions]
    curved = [jax.jvp(out_grad, (outputs,), (image,))[1] for image in images]
    curvature = jnp.stack([jnp.stack([linalg.dot(x, y) for y in curved]) for x in images])
    gram = jnp.stack([jnp.stack([linalg.dot(x, y) for y in directions]) for x in directions])
    slopes = jnp.stack([linalg.dot(grad, d) for d in directions])
    curvature = 0.5 * (curvature + curvature.T)
    damped = curvature + damping.astype(gram.dtype) * gram
    found = -_solve(damped, slopes)
    if has_update:  # along it the model is convex: the bound that the minimum violates is active
        share = jnp.clip(found[-1], 0.0, 1.0)
        rest = -_solve(damped[:-1, :-1], slopes[:-1] + share * damped[:-1, -1])
        found = jnp.append(rest, share)
    bent = jnp.sum(found[:, None] * found[None] * damped)
    return ModelStep(found, -(jnp.sum(slopes * found) + 0.5 * bent))


def _solve(matrix: chex.Array, right: chex.Array) -> chex.Array:
    """M⁻¹b for a small positive semidefinite matrix; 0 along directions that it does not know."""
    sizes = jnp.sqrt(jnp.diagonal(matrix))
    known = sizes > 0
    sizes = jnp.where(known, sizes, 1.0)
    values, vectors = linalg.eigh(matrix / sizes[:, None] / sizes[None])
    least = 10.0 * linalg.epsilon() * values[-1]
    inverse = jnp.where(values > least, 1.0 / jnp.where(values > least, values, 1.0), 0.0)
    precision = jax.lax.Precision.HIGHEST
    along = jnp.matmul(vectors.T, jnp.where(known, right / sizes, 0.0), precision=precision)
    return jnp.matmul(vectors, inverse * along, precision=precision) / sizes

"""A network small enough that its exact Hessian can be watched while it is trained.

64-32-10 with tanh on scikit-learn's digits, 2,410 parameters: products with the Hessian of the
whole training loss cost milliseconds, its leading eigenvectors less than a second.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from optgrad.experiments import data

_SIZES = (64, 32, 10)


class Digits(NamedTuple):
    """The training images, on the device."""

    images: chex.Array  # float32 [N, 64], in [0, 1]
    labels: chex.Array  # int32 [N]


def load_digits(data_dir: Path | None = None) -> Digits:
    """The training part of scikit-learn's digits."""
    train = data.load("digits", data_dir).train
    images = np.asarray(train.images, np.float32).reshape(len(train.labels), -1) / 16
    return Digits(jnp.asarray(images), jnp.asarray(train.labels))


def init_params(key: chex.PRNGKey) -> dict[str, chex.Array]:
    """Weights N(0, 1/inputs), biases 0."""
    params = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(_SIZES)):
        key, drawn = jax.random.split(key)
        params[f"weight_{layer}"] = jax.random.normal(drawn, (inputs, outputs)) / inputs**0.5
        params[f"bias_{layer}"] = jnp.zeros(outputs)
    return params


def loss(params: Any, examples: Digits) -> chex.Array:
    """Mean cross-entropy."""
    hidden = jnp.tanh(examples.images @ params["weight_0"] + params["bias_0"])
    logits = hidden @ params["weight_1"] + params["bias_1"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels))


def minibatches(key: chex.PRNGKey, count: int, steps: int, size: int) -> chex.Array:
    """Rows [steps, size] of the training set: one permutation after the other."""
    per_epoch = count // size
    keys = jax.random.split(key, -(-steps // per_epoch))
    orders = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)
    return orders[:, : per_epoch * size].reshape(-1, size)[:steps]


# (state after the step, parameters before it) -> what to record
Record = Callable[[Any, Any], Any]


def train(
    optimizer: optax.GradientTransformationExtraArgs,
    carry: tuple[Any, Any],
    examples: Digits,
    rows: chex.Array,
    record: Record,
) -> tuple[tuple[Any, Any], Any]:
    """Trains on the given minibatches; to be used inside `jax.jit`.

    Args:
      optimizer: needs no more than gradients and parameters.
      carry: parameters and the optimizer's state.
      examples: the training set.
      rows: of each minibatch, shape (steps, batch size).
      record: what to keep of every step, beside the minibatch's loss.

    Returns:
      The new carry, and (losses, records) with leading axis: steps.
    """

    def step(carry: tuple[Any, Any], chosen: chex.Array) -> tuple[Any, Any]:
        params, state = carry
        batch = Digits(examples.images[chosen], examples.labels[chosen])
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (value, record(state, params))

    return jax.lax.scan(step, carry, rows)


def curvature_along(params: Any, direction: Any, examples: Digits) -> chex.Array:
    """v̂ᵀHv̂ with the Hessian of the loss over all ``examples``, by one product with H."""
    gradient = jax.grad(lambda p: loss(p, examples))
    _, product = jax.jvp(gradient, (params,), (direction,))
    return optax.tree.vdot(direction, product)


class Eigenspace(NamedTuple):
    """Leading eigenvalues and eigenvectors, and the gradient, of the whole training loss."""

    values: np.ndarray[Any, Any]  # shape (k,), ascending
    vectors: np.ndarray[Any, Any]  # shape (D, k)
    gradient: np.ndarray[Any, Any]  # shape (D,)


def leading_eigenspace(params: Any, examples: Digits, k: int = 10) -> Eigenspace:
    """The k algebraically largest eigenvalues of the Hessian, by Lanczos iteration."""
    flat, unravel = ravel_pytree(params)

    def product(v: Any) -> Any:
        return np.asarray(_hessian_product(params, unravel(jnp.asarray(v, flat.dtype)), examples))

    operator = scipy.sparse.linalg.LinearOperator((flat.size,) * 2, product, dtype=np.float32)
    start = np.random.default_rng(0).normal(size=flat.size)  # else the result is not repeatable
    values, vectors = scipy.sparse.linalg.eigsh(operator, k, which="LA", v0=start, tol=1e-3)
    gradient = ravel_pytree(jax.grad(loss)(params, examples))[0]
    return Eigenspace(values, vectors, np.asarray(gradient))


@jax.jit
def _hessian_product(params: Any, vector: Any, examples: Digits) -> chex.Array:
    _, product = jax.jvp(jax.grad(lambda p: loss(p, examples)), (params,), (vector,))
    return ravel_pytree(product)[0]


def orthonormal_span(rows: Any, rank: int) -> np.ndarray[Any, Any]:
    """Orthonormal columns [D, rank] that span the rows of a tree with a leading axis."""
    flat = np.asarray(jax.vmap(lambda row: ravel_pytree(row)[0])(rows), np.float64)
    _, singular, vectors = np.linalg.svd(flat, full_matrices=False)
    kept = min(rank, int(np.sum(singular > 1e-5 * max(singular[0], 1e-30))))
    return vectors[:kept].T

"""Logistic regression on features of which most are rare."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import checks
from optgrad.experiments.problems import Problem, epoch_indices
from optgrad.experiments.scores import LOSS

_MOST_COMMON = 0.5  # share of the examples that have the most frequent feature


def sparse_logistic(
    *,
    batch_size: int = 1,
    dimension: int = 500,
    examples: int = 4000,
    scale: float = 2.0,
    l2: float = 1e-4,
    seed: int = 0,
) -> Problem:
    r"""Logistic regression on binary features whose frequencies follow Zipf's law.

    .. math::
      \ell(w, b; x, y) = \log\bigl(1 + e^{-y(w^\top x + b)}\bigr) + \tfrac{\lambda}{2}\|w\|^2,
      \qquad P(x_j = 1) = \frac{1}{2j}

    with labels y = ±1 that are drawn from the same model with random weights. The gradients of a
    feature that the batch does not have are (but for the L2 term) 0.

    Args:
      batch_size: B ≥ 1 examples a step.
      dimension: d ≥ 1 features.
      examples: of training; half as many are held out for validation, and as many for the test.
      scale: standard deviation of the true weights, ≥ 0.
      l2: λ ≥ 0.
      seed: of the data, which are the same in all runs.

    Returns:
      The problem, judged by its test loss (without the L2 term); it also has an ``accuracy``.

    Raises:
      TypeError, ValueError: for an argument outside its range.
    """
    for name, count in (("batch_size", batch_size), ("dimension", dimension)):
        checks.check_count(name, count, 1)
    checks.check_count("examples", examples, 2)
    checks.check_in_range("scale", scale, 0.0, high_open=True)
    checks.check_in_range("l2", l2, 0.0, high_open=True)
    if batch_size > examples:
        raise ValueError(f"batch_size = {batch_size} is outside its range [1, {examples}]")
    sizes = {"train": examples, "validation": examples // 2, "test": examples // 2}
    data = _draw(sizes, dimension, scale, seed)

    def batches(
        data: Any, key: chex.PRNGKey, first_step: chex.Numeric, num_steps: int
    ) -> chex.Array:
        steps = first_step + jnp.arange(num_steps)
        return epoch_indices(key, steps, num_steps, examples, batch_size)

    def outputs(params: Any, batch: Any) -> tuple[chex.Array, chex.Array]:
        """Margins w·x + b, and the weights, whose L2 term belongs to the curvature."""
        return batch[0] @ params["w"] + params["b"], params["w"]

    def out_loss(z: tuple[chex.Array, chex.Array], batch: Any) -> chex.Array:
        return jnp.mean(_losses(z[0], batch[1])) + 0.5 * l2 * jnp.sum(z[1] ** 2)

    def loss(params: Any, batch: Any) -> chex.Array:
        return out_loss(outputs(params, batch), batch)

    def evaluate(params: Any, data: Any, split: str, index: chex.Numeric) -> dict[str, chex.Array]:
        margins, labels = outputs(params, data[split])[0], data[split][1]
        return {
            "loss": jnp.sum(_losses(margins, labels)),
            "accuracy": jnp.sum((margins * labels > 0).astype(margins.dtype)),
            "count": jnp.full((), len(labels), margins.dtype),
        }

    return Problem(
        name=f"logistic regression, {dimension} sparse features",
        data=data,
        init=lambda key: {"w": jnp.zeros(dimension), "b": jnp.zeros(())},
        batches=batches,
        batch=lambda data, rows: tuple(x[rows] for x in data["train"]),
        loss=loss,
        example_loss=lambda params, example: loss(params, tuple(x[None] for x in example)),
        splits={"validation": 1, "test": 1},
        evaluate=evaluate,
        outputs=outputs,
        out_loss=out_loss,
        score=LOSS,
    )


def _losses(margins: chex.Array, labels: chex.Array) -> chex.Array:
    return jnp.asarray(optax.losses.sigmoid_binary_cross_entropy(margins, 0.5 * (labels + 1)))


def _draw(sizes: dict[str, int], dimension: int, scale: float, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    frequencies = _MOST_COMMON / np.arange(1, dimension + 1)
    weights = scale * generator.standard_normal(dimension)
    bias = -float(frequencies @ weights)  # about as many labels of either sign
    found = {}
    for name, count in sizes.items():
        x = (generator.random((count, dimension)) < frequencies).astype(np.float32)
        chances = 1 / (1 + np.exp(-(x @ weights + bias)))
        labels = np.where(generator.random(count) < chances, 1.0, -1.0).astype(np.float32)
        found[name] = (jnp.asarray(x), jnp.asarray(labels))
    return found

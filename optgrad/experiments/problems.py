"""What the engine trains: a `Problem` is data on the device and pure functions of it.

The engine never looks inside: it draws ``batches``, builds each ``batch``, differentiates ``loss``
and sums up ``evaluate``. All of them run inside jit and under vmap.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optgrad.core import checks
from optgrad.experiments import data as data_lib
from optgrad.experiments import models, scores
from optgrad.experiments.augmentation import AUGMENTATIONS, augment_images, distort_colours
from optgrad.experiments.classification import (
    AnyBatch,
    Batch,
    Classifier,
    DropoutBatch,
    cross_entropy,
)

_COLOUR, _DROPOUT = 2, 3  # folded into a batch's key; shifts and reflections have its split


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training problem.

    Attributes:
      name: for reports.
      data: pytree of arrays, handed to every function below (never a compiled-in constant).
      init: key -> parameters.
      batches: (data, key, first_step, num_steps) -> what identifies the batches of those steps, a
        pytree with leading axis num_steps; a function of key and step alone.
      batch: (data, one of these) -> the batch itself, leading axis B on every leaf.
      loss: (parameters, batch) -> mean loss.
      example_loss: (parameters, one example of a batch) -> its loss; ``loss`` is the mean of these.
      splits: evaluation split -> number of batches in which it is evaluated.
      evaluate: (parameters, data, split, index) -> sums over one evaluation batch, by metric (one
        of them ``"loss"``), and under ``"count"`` the number of examples.
      has_convolutions: whether the loss convolves: some backends are then slow under vmap.
      outputs: (parameters, batch) -> outputs z, any pytree, for methods that need ``outputs_fn``.
      out_loss: (z, batch) -> mean loss, convex in z; of ``outputs`` it is ``loss``.
      residuals: (parameters, batch) -> r, any pytree, with ``loss`` = ½ Σ r² over all of them.
      layer_statistics: (parameters, batch, key) -> ``kfac_stats``, with labels that the key samples
        from the model, or without a key those of the batch.
      score: by which metric runs are judged; ``evaluate`` gives it for the split ``"test"``.
    """

    name: str
    data: Any
    init: Callable[[chex.PRNGKey], Any]
    batches: Callable[[Any, chex.PRNGKey, chex.Numeric, int], Any]
    batch: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], chex.Array]
    example_loss: Callable[[Any, Any], chex.Array]
    splits: Mapping[str, int]
    evaluate: Callable[[Any, Any, str, chex.Numeric], dict[str, chex.Array]]
    has_convolutions: bool = False
    outputs: Callable[[Any, Any], Any] | None = None
    out_loss: Callable[[Any, Any], chex.Array] | None = None
    residuals: Callable[[Any, Any], Any] | None = None
    layer_statistics: Callable[[Any, Any, chex.PRNGKey | None], Any] | None = None
    score: scores.Score = scores.LOSS


def image_classification(
    dataset: data_lib.Dataset,
    model: str,
    *,
    batch_size: int,
    augment: Sequence[str] = (),
    l2: float = 0.0,
    label_smoothing: float = 0.0,
    precision: str = "float32",
    model_options: Mapping[str, Any] | None = None,
    evaluation_batch: int = 1000,
) -> Problem:
    r"""Cross-entropy of a network on images, with L2 regularisation of the weights.

    .. math::
      L(\theta) = \frac1B\sum_k -\log p_\theta(y_k | x_k) + \frac{\lambda}{2}\sum_{W}\|W\|^2

    over the weights W (arrays of two or more axes), not the biases. The images stay uint8 on the
    device; each batch is gathered, normalised to zero mean and unit variance per channel, and
    augmented inside the compiled step. Every epoch is a new permutation of the training images,
    of which the last incomplete batch is left out.

    Args:
      dataset: with or without a validation split; without one, only ``"test"`` is evaluated.
      model: a name from `models.models`.
      batch_size: examples per step, at most the number of training images.
      augment: any of ``"crop"`` (random crop after padding by 4 pixels), ``"mirror"``, ``"colour"``
        (see `augmentation`).
      l2: λ ≥ 0.
      label_smoothing: ε in [0, 1), of the training loss; see `Classifier`.
      precision: ``"float32"`` or ``"bfloat16"``, in training; the evaluation is in float32.
      model_options: further arguments of the network.
      evaluation_batch: images evaluated at once.

    Returns:
      The problem; its metrics are ``loss`` (cross-entropy without the L2 term and label smoothing)
      and ``accuracy``, without dropout and augmentation.
    """
    count = len(dataset.train.labels)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size = {batch_size} is outside its range [1, {count}]")
    for name in augment:
        checks.check_one_of("augment", name, AUGMENTATIONS)

    def build(key: chex.PRNGKey) -> nnx.Module:
        return models.create_model(
            model,
            dataset.image_shape,
            dataset.num_classes,
            nnx.Rngs(key),
            **dict(model_options or {}),
        )

    # The structure alone, without drawing weights; options that do not fit are refused here.
    network = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graph, _ = nnx.split(network, nnx.Param)
    drops_out = any(getattr(network, "dropout", ()))
    classifier = Classifier(graph, dataset.num_classes, l2, label_smoothing, precision)
    splits = {
        name: (jnp.asarray(examples.images), jnp.asarray(examples.labels))
        for name, examples in (("validation", dataset.validation), ("test", dataset.test))
        if len(examples.labels)
    }
    device_data = {
        "train": (jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)),
        "mean": jnp.asarray(dataset.mean),
        "scale": jnp.asarray(1 / np.maximum(dataset.std, 1e-6)),
        **splits,
    }

    def normalise(data: Any, images: chex.Array) -> chex.Array:
        return (images.astype(jnp.float32) - data["mean"]) * data["scale"]

    def batches(
        data: Any, key: chex.PRNGKey, first_step: chex.Numeric, num_steps: int
    ) -> tuple[chex.Array, chex.PRNGKey]:
        order_key, augment_key = jax.random.split(key)
        steps = first_step + jnp.arange(num_steps)
        indices = epoch_indices(order_key, steps, num_steps, count, batch_size)
        return indices, step_keys(augment_key, steps)

    def batch(data: Any, drawn: tuple[chex.Array, chex.PRNGKey]) -> AnyBatch:
        indices, key = drawn
        images, labels = (array[indices] for array in data["train"])
        if "colour" in augment:
            images = distort_colours(jax.random.fold_in(key, _COLOUR), images)
        images = augment_images(key, normalise(data, images), augment)
        if not drops_out:
            return Batch(images, labels)
        keys = jax.random.split(jax.random.fold_in(key, _DROPOUT), len(labels))
        return DropoutBatch(images, labels, keys)

    def evaluate(params: Any, data: Any, split: str, index: chex.Numeric) -> dict[str, chex.Array]:
        images, labels = data[split]
        rows = index * evaluation_batch + jnp.arange(evaluation_batch)
        inside = rows < len(labels)  # the last batch repeats the last image with weight 0
        rows = jnp.minimum(rows, len(labels) - 1)
        examples = Batch(normalise(data, images[rows]), labels[rows])
        logits = classifier.logits(params, examples.images)
        losses = cross_entropy(logits, examples.labels)
        correct = jnp.argmax(logits, axis=-1) == examples.labels
        return {
            "loss": jnp.sum(jnp.where(inside, losses, 0.0)),
            "accuracy": jnp.sum(jnp.where(inside, correct, False).astype(jnp.float32)),
            "count": jnp.sum(inside).astype(jnp.float32),
        }

    return Problem(
        name=f"{model} on {dataset.name}",
        score=scores.ACCURACY,
        data=device_data,
        init=lambda key: nnx.split(build(key), nnx.Param)[1],
        batches=batches,
        batch=batch,
        loss=classifier.loss,
        example_loss=classifier.example_loss,
        splits={k: -(-len(labels) // evaluation_batch) for k, (_, labels) in splits.items()},
        evaluate=evaluate,
        has_convolutions=models.models()[model].has_convolutions,
        outputs=classifier.outputs,
        out_loss=classifier.out_loss,
        layer_statistics=classifier.layer_statistics,
    )


def step_keys(key: chex.PRNGKey, steps: chex.Array) -> chex.PRNGKey:
    """A key for each step, shape (steps,): a function of the run's key and the step alone."""
    return jax.vmap(lambda step: jax.random.fold_in(key, step))(steps)


def epoch_indices(
    key: chex.PRNGKey, steps: chex.Array, num_steps: int, count: int, batch_size: int
) -> chex.Array:
    """Rows [num_steps, batch_size] of the training set for consecutive steps.

    Each epoch is a permutation that depends on the key and the epoch's number alone, so the rows
    of a step do not depend on the interval that asks for them.
    """
    per_epoch = count // batch_size
    first_epoch = steps[0] // per_epoch
    num_epochs = (num_steps - 1) // per_epoch + 2  # an interval may begin inside an epoch

    def permutation(epoch: chex.Array) -> chex.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), count)

    def order(epoch: chex.Array) -> chex.Array:  # shuffling takes as long as several steps
        is_reached = epoch <= steps[-1] // per_epoch
        return jax.lax.cond(is_reached, permutation, lambda _: jnp.arange(count), epoch)

    orders = jax.lax.map(order, first_epoch + jnp.arange(num_epochs))
    columns = (steps % per_epoch)[:, None] * batch_size + jnp.arange(batch_size)
    return orders[(steps // per_epoch - first_epoch)[:, None], columns]

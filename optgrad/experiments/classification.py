"""The training loss of a network that classifies images."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optgrad.core import checks, taps
from optgrad.core import layer_statistics as layers

PRECISIONS = ("float32", "bfloat16")


class Batch(NamedTuple):
    """A minibatch of examples, normalised."""

    images: chex.Array  # float32 [B, H, W, C]
    labels: chex.Array  # int32 [B]


class DropoutBatch(NamedTuple):
    """A minibatch with a PRNG key for the dropout of each example.

    The keys make the loss on a batch one function of the parameters, whoever evaluates it:
    gradient, line search, single examples, products with the curvature all see the same masks.
    """

    images: chex.Array  # float32 [B, H, W, C]
    labels: chex.Array  # int32 [B]
    keys: chex.PRNGKey  # [B]


AnyBatch = Batch | DropoutBatch


@dataclasses.dataclass(frozen=True)
class Classifier:
    r"""Cross-entropy of a network, with L2 regularisation of its weights.

    .. math::
      L(\theta) = \frac1B\sum_k -\log p_\theta(y_k | x_k) + \frac{\lambda}{2}\sum_{W}\|W\|^2

    Attributes:
      graph: of the network, which holds parameters only.
      num_classes: C.
      l2: λ ≥ 0, on the weights W, arrays of two or more axes.
      label_smoothing: ε in [0, 1): the targets are the probabilities (1 − ε)·[c = y] + ε/C.
      precision: of the network's forward and backward passes in training. Parameters, gradients,
        the loss of given logits and the L2 term are float32 either way.
    """

    graph: Any
    num_classes: int
    l2: float = 0.0
    label_smoothing: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        checks.check_in_range("l2", self.l2, 0.0, high_open=True)
        checks.check_in_range("label_smoothing", self.label_smoothing, 0.0, 1.0, high_open=True)
        checks.check_one_of("precision", self.precision, PRECISIONS)

    def logits(self, params: Any, *inputs: chex.Array) -> chex.Array:
        """Those of images, in the parameters' precision; with PRNG keys, under dropout."""
        logits: chex.Array = nnx.merge(self.graph, params)(*inputs)
        return logits

    def outputs(self, params: Any, batch: AnyBatch) -> tuple[chex.Array, list[chex.Array]]:
        """Logits in training, and the weights that the L2 term needs.

        With the weights among the outputs, the Gauss-Newton matrix contains the L2 term.
        """
        weights = [w for w in jax.tree.leaves(params) if w.ndim > 1] if self.l2 else []
        logits = self.logits(self._lowered(params), *self._inputs(batch))
        return self._raised(logits), weights

    def out_loss(self, outputs: tuple[chex.Array, list[chex.Array]], batch: AnyBatch) -> chex.Array:
        """The mean loss of `outputs`."""
        logits, weights = outputs
        value = jnp.mean(cross_entropy(logits, self._targets(batch)))
        if weights:
            value += 0.5 * self.l2 * sum(jnp.sum(w * w) for w in weights)
        return value

    def loss(self, params: Any, batch: AnyBatch) -> chex.Array:
        """The mean loss of a batch."""
        return self.out_loss(self.outputs(params, batch), batch)

    def example_loss(self, params: Any, example: AnyBatch) -> chex.Array:
        """The loss of one example, of which `loss` is the mean."""
        return self.loss(params, jax.tree.map(lambda x: x[None], example))

    def layer_statistics(self, params: Any, batch: AnyBatch, key: chex.PRNGKey | None) -> Any:
        """``kfac_stats``, of labels from the model, or without a key of the batch's."""
        found = layers.layer_statistics(
            taps.tapped_nnx(
                lambda params: nnx.merge(self.graph, params), lambda network, x: network(*x)
            ),
            self._lowered(params),
            self._inputs(batch),
            self._targets(batch),
            key,
            labels="data" if key is None else "model",
        )
        return self._raised(found)

    def _inputs(self, batch: AnyBatch) -> tuple[chex.Array, ...]:
        keys = (batch.keys,) if isinstance(batch, DropoutBatch) else ()
        return self._lowered(batch.images), *keys

    def _targets(self, batch: AnyBatch) -> chex.Array:
        if not self.label_smoothing:
            return batch.labels
        classes = jax.nn.one_hot(batch.labels, self.num_classes)
        return jnp.asarray(optax.smooth_labels(classes, self.label_smoothing))

    def _lowered(self, tree: Any) -> Any:
        return tree if self.precision == "float32" else _cast(tree, self.precision)

    def _raised(self, tree: Any) -> Any:
        return tree if self.precision == "float32" else _cast(tree, "float32")


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def cross_entropy(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Of each example [B]; the targets are class numbers [B] or probabilities [B, C].

    Examples:
      >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(3))  # log 4
      [1.386]
    """
    if targets.ndim == logits.ndim:
        return jnp.asarray(optax.softmax_cross_entropy(logits, targets))
    return jnp.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

"""What each layer saw and what its outputs did to the loss, for every example of a batch.

A *tap* is a zero that is added to a layer's outputs before its nonlinearity. The gradient with
respect to it is that of the outputs, so that one backward pass through the activations gives them
for all layers at once. ``optgrad.core.taps`` adds them to the layers of Flax models; flax itself is
never imported here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optgrad.core import averages, checks, oracles, taps, trees


class LayerStatistics(NamedTuple):
    """Of one layer: ``kfac_stats`` is a dictionary from the layer's path to it."""

    activations: chex.Array  # [n, *positions, in]; of a convolution its patches, in = kh·kw·cin
    gradients: chex.Array  # [n, *positions, out], of each example's own loss by the layer's outputs


class Likelihood(NamedTuple):
    """How a model's outputs are read as a distribution of targets; of one example."""

    sample: Callable[[chex.PRNGKey, chex.Array], chex.Array]  # (key, outputs) -> targets
    loss: Callable[[chex.Array, chex.Array], chex.Array]  # (outputs, targets) -> −log p, summed


def layer_statistics(
    model: Any,
    params: Any,
    inputs: chex.ArrayTree,
    targets: chex.Array | None = None,
    key: chex.PRNGKey | None = None,
    *,
    likelihood: str = "softmax",
    labels: str = "model",
    microbatch_size: int | None = None,
) -> dict[str, LayerStatistics]:
    r"""Activations and pre-activation gradients of the layers of a model, as ``kfac_stats``.

    For a layer :math:`s = \tilde a W` with :math:`\tilde a = (a, 1)` the gradient of the loss of
    example i with respect to its parameters is

    .. math::
      \nabla_W \ell_i = \sum_t \tilde a_{it}\, g_{it}^\top, \qquad
      g_{it} = \frac{\partial \ell_i}{\partial s_{it}}

    over the positions t of the example (one for a dense layer on a vector, the pixels of the
    outputs for a convolution). It costs about one gradient: a forward pass, and a backward pass
    that stops at the layers' outputs. Examples may not depend on each other: batch normalisation
    has to run with its stored averages. What is stored is the activations of all layers, those of
    a convolution kh·kw times.

    Args:
      model: a Linen module; an NNX module, or its graph definition if it holds parameters only; or
        a function ``(params, inputs, taps) -> (outputs, activations)``, which adds ``taps[path]``
        to the pre-activations of the layer at ``path`` (``a @ W + b + taps["hidden"]``) and returns
        a dictionary from the same paths to that layer's inputs a. ``optgrad.core.taps`` makes such
        functions of Flax models that are called in another way.
      params: θ; for a Linen module its ``"params"`` collection or all of its variables, for an
        NNX module its state of ``nnx.Param``.
      inputs: n inputs, stacked along the leading axis of every leaf.
      targets: n targets: class numbers or probabilities for ``"softmax"``, like the outputs for
        ``"squared"``. Used with ``labels="data"`` only.
      key: a PRNG key, for ``labels="model"``.
      likelihood: ``"softmax"``, cross-entropy of logits along the last axis; ``"squared"``, half
        the squared distance to the targets. Either is summed over all other axes of an example.
      labels: ``"model"`` samples the targets from the model's own distribution, which makes the
        second moments of these gradients estimates of the Fisher matrix; ``"data"`` takes the
        given ones, which is the empirical Fisher matrix: not a curvature far from the optimum.
      microbatch_size: examples that pass through the model at once; it need not divide n. The
        result is the same.

    Returns:
      A dictionary from the layers' paths, keys joined by ``"/"`` as in the parameters, to their
      `LayerStatistics`; rows of the patches are in the order of ``kernel.reshape(-1, cout)``. Of
      Flax models, the dense and the 2-d convolution layers; without those that are grouped,
      masked, transposed, or have no batch axis first. Uses of one layer at several places are
      further positions.

    Raises:
      ValueError: for an unknown option, a missing key or missing targets, or a bad batch.

    Examples:
      >>> def apply(params, x, taps):
      ...     return x @ params["kernel"] + taps["out"], {"out": x}
      >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
      >>> x, y = jnp.array([[1.0, 5.0], [2.0, 6.0]]), jnp.array([[1.0], [1.0]])
      >>> found = layer_statistics(apply, params, x, y, likelihood="squared", labels="data")
      >>> print(found["out"].gradients)
      [[1.]
       [3.]]

    References:
      J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature", 2015, Section 5: labels of the model. R. Grosse, J. Martens, "A
      Kronecker-factored approximate Fisher matrix for convolution layers", 2016.
    """
    checks.check_one_of("likelihood", likelihood, LIKELIHOODS)
    checks.check_one_of("labels", labels, ("model", "data"))
    size = oracles.batch_size(inputs, "inputs")
    chunk = oracles.examples_at_once(microbatch_size, size)
    apply = taps.tapped(model)
    if labels == "model":
        if key is None:
            raise ValueError(
                'key = None; accepted: a PRNG key, from which labels="model" samples the targets'
            )
        given: chex.Array = jax.random.split(key, size)  # of each example: the same in any chunks
    else:
        if targets is None:
            raise ValueError('targets = None; accepted: those of the batch, for labels="data"')
        given = jnp.asarray(targets)
        oracles.batch_size((inputs, given), "(inputs, targets)")

    model_of_targets = LIKELIHOODS[likelihood]

    def loss(outputs: chex.Array, given: chex.Array) -> chex.Array:
        outputs = trees.wide(outputs)
        if labels == "model":
            given = model_of_targets.sample(given, jax.lax.stop_gradient(outputs))
        return model_of_targets.loss(outputs, given)

    def of(examples: tuple[Any, chex.Array]) -> dict[str, LayerStatistics]:
        return _of_batch(apply, loss, params, *examples)

    examples = (inputs, given)
    if chunk == size:
        return of(examples)
    whole = size - size % chunk
    head = jax.tree.map(lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), examples)
    parts = [
        jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(of, head)),
        *([of(jax.tree.map(lambda x: x[whole:], examples))] if whole < size else []),
    ]
    together: dict[str, LayerStatistics] = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return together


def _of_batch(
    apply: taps.TappedApply,
    loss: Callable[[chex.Array, chex.Array], chex.Array],
    params: Any,
    inputs: chex.ArrayTree,
    given: chex.Array,
) -> dict[str, LayerStatistics]:
    """Of examples that pass through the model together; ``loss`` is that of one."""

    def total(zeros: Mapping[str, chex.Array]) -> tuple[chex.Array, dict[str, chex.Array]]:
        outputs, activations = apply(params, inputs, zeros)
        return jnp.sum(jax.vmap(loss)(outputs, given)), activations

    zeros = taps.zeros(apply, params, inputs)
    gradients, activations = jax.grad(total, has_aux=True)(zeros)
    uses: dict[str, list[LayerStatistics]] = {}
    for path, gradient in gradients.items():
        found = LayerStatistics(activations[path], gradient)
        uses.setdefault(taps.layer_of(path), []).append(found)
    return {path: _together(found) for path, found in uses.items()}


def _together(uses: list[LayerStatistics]) -> LayerStatistics:
    """All uses of one layer, with the positions of all of them along one axis."""
    if len(uses) == 1:
        return uses[0]
    flat = [jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), use) for use in uses]
    together: LayerStatistics = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *flat)
    return together


def _categorical(key: chex.PRNGKey, logits: chex.Array) -> chex.Array:
    return jax.random.categorical(key, logits)


def _cross_entropy(logits: chex.Array, target: chex.Array) -> chex.Array:
    logarithms = jax.nn.log_softmax(logits)
    if jnp.issubdtype(target.dtype, jnp.integer):
        target = jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
    if target.shape != logits.shape:
        raise ValueError(
            f"targets have the shape {target.shape} for one example, its logits {logits.shape}; "
            "accepted: integers without the last axis of the logits, or probabilities like them"
        )
    return -jnp.sum(logarithms * target)


def _normal(key: chex.PRNGKey, outputs: chex.Array) -> chex.Array:
    return outputs + jax.random.normal(key, outputs.shape, averages.average_dtype(outputs))


def _half_squares(outputs: chex.Array, target: chex.Array) -> chex.Array:
    if target.shape != outputs.shape:
        raise ValueError(
            f"targets have the shape {target.shape} for one example; "
            f"accepted: that of its outputs, {outputs.shape}"
        )
    return 0.5 * jnp.sum(jnp.square(outputs - target))


LIKELIHOODS = {
    "softmax": Likelihood(_categorical, _cross_entropy),
    "squared": Likelihood(_normal, _half_squares),
}

"""Problems that no constant of `optgrad.auto` was chosen on: other models, losses and noise.

They were written when the method was finished, each for a property that the studies of this folder
do not have; held_out/ has their budgets, the first that came to mind.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets
from small_cifar10 import halved

from optgrad.experiments import data as data_lib
from optgrad.experiments import problems, scores

EXCESS = scores.Score("excess")
VALIDATION, TEST = 2000, 2000  # images
Arrays = Any  # pytree of arrays whose leading axis is that of the examples
ExampleLoss = Callable[[Any, Any, chex.PRNGKey], chex.Array]  # parameters, example, key
Metrics = Callable[[Any, Any], Mapping[str, chex.Array]]  # parameters, examples -> of each


def autoencoder(*, batch_size: int) -> problems.Problem:
    """Images of 14x14 through four numbers: deep, a narrow neck, saturating units, squared loss."""
    images, _ = _images("mnist")
    network = _Network(lambda rngs: _Layers([196, 64, 24, 4, 24, 64, 196], nnx.tanh, rngs))

    def loss(params: Any, image: chex.Array, key: chex.PRNGKey) -> chex.Array:
        del key
        return jnp.mean(jnp.square(network(params, image) - image))

    return _problem("autoencoder", network.init, loss, images, batch_size)


def recurrent(*, batch_size: int) -> problems.Problem:
    """Which digit it is, from its rows read one after the other: gradients through time."""
    images, labels = _images("mnist")

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.List([nnx.GRUCell(14, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)])

    def apply(parts: Any, rows: chex.Array) -> chex.Array:
        last, _ = jax.lax.scan(parts[0], jnp.zeros(32), rows)
        logits: chex.Array = parts[1](last)
        return logits

    network = _Network(build, apply)
    rows = {part: x.reshape(-1, 14, 14) for part, x in images.items()}
    return _classification("recurrent", network, rows, labels, batch_size)


def deep(*, batch_size: int) -> problems.Problem:
    """A hundred classes of CIFAR-100 by six residual blocks: many tensors, far from an end."""
    images, labels = _images("cifar100")

    def build(rngs: nnx.Rngs) -> nnx.Module:
        blocks = [
            nnx.Sequential(
                nnx.LayerNorm(48, rngs=rngs), nnx.Linear(48, 48, rngs=rngs), nnx.relu,
                nnx.Linear(48, 48, rngs=rngs),
            )
            for _ in range(6)
        ]  # fmt: skip
        first, last = nnx.Linear(768, 48, rngs=rngs), nnx.Linear(48, 100, rngs=rngs)
        return nnx.List([first, *blocks, last])

    def apply(parts: Any, image: chex.Array) -> chex.Array:
        x = parts[0](image)
        for i in range(1, 7):
            x = x + parts[i](x)
        logits: chex.Array = parts[7](x)
        return logits

    return _classification("deep", _Network(build, apply), images, labels, batch_size)


def factorization(*, batch_size: int) -> problems.Problem:
    """A matrix of rank 5 from some noisy entries: a product, with a saddle near its start.

    It is judged by the entries that were left out, without noise.
    """
    random = np.random.default_rng(0)
    left, right = random.standard_normal((2, 100, 5))
    entries = random.permutation(100 * 100)
    rows, columns = np.divmod(entries, 100)
    values = np.sum(left[rows] * right[columns], axis=1)
    noisy = values + 0.5 * random.standard_normal(len(values))
    known = (rows, columns, np.where(np.arange(len(values)) < 5000, noisy, values))

    def init(key: chex.PRNGKey) -> dict[str, chex.Array]:
        keys = jax.random.split(key)
        return {
            name: 0.1 * jax.random.normal(k, (100, 5))
            for name, k in zip(("left", "right"), keys, strict=True)
        }

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        row, column, value = example
        found = jnp.sum(params["left"][row] * params["right"][column], axis=-1)
        return jnp.square(found - value)

    parts = _parts(known, 5000, 2500)
    return _problem("factorization", init, loss, parts, batch_size)


def raw_features(*, batch_size: int) -> problems.Problem:
    """Logistic regression on features as they were measured: their scales differ by 10^5."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    examples = (x[order].astype(np.float32), y[order].astype(np.float32))

    def init(key: chex.PRNGKey) -> dict[str, chex.Array]:
        del key
        return {"w": jnp.zeros(x.shape[1]), "b": jnp.zeros(())}

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        margin = example[0] @ params["w"] + params["b"]
        return optax.losses.sigmoid_binary_cross_entropy(margin, example[1])

    return _problem("raw features", init, loss, _parts(examples, 285, 142), batch_size)


def equation(*, batch_size: int) -> problems.Problem:
    """A network u that vanishes at the ends, u'' − 25 u = f at random points: derivatives."""
    network = _Network(lambda rngs: _Layers([1, 24, 24, 1], nnx.tanh, rngs))

    def solution(x: chex.Array) -> chex.Array:
        return jnp.sin(jnp.pi * x) + 0.2 * jnp.sin(4 * jnp.pi * x)

    def value(params: Any, x: chex.Array) -> chex.Array:
        found: chex.Array = x * (1 - x) * network(params, x[None])[0]
        return found

    def residual(u: Callable[[chex.Array], chex.Array], x: chex.Array) -> chex.Array:
        return jax.grad(jax.grad(u))(x) - 25 * u(x)

    def loss(params: Any, x: chex.Array, key: chex.PRNGKey) -> chex.Array:
        del key
        here = residual(lambda x: value(params, x), x)
        return jnp.square(here - residual(solution, x))

    def metrics(params: Any, x: chex.Array) -> Mapping[str, chex.Array]:
        found = jax.vmap(lambda x: jnp.square(value(params, x) - solution(x)))(x)
        losses = jax.vmap(lambda x: loss(params, x, jax.random.key(0)))(x)
        return {"excess": found, "loss": losses}

    points = np.random.default_rng(0).random(8000).astype(np.float32)
    parts = _parts(points, 6000, 1000)
    return _problem(
        "equation", network.init, loss, parts, batch_size, metrics=metrics, score=EXCESS
    )


def student(*, batch_size: int) -> problems.Problem:
    """Regression on the outputs of another network and noise; judged without the noise."""
    network = _Network(lambda rngs: _Layers([20, 64, 64, 1], nnx.relu, rngs))
    teacher = _Network(lambda rngs: _Layers([20, 16, 1], nnx.tanh, rngs))
    random = np.random.default_rng(0)
    x = random.standard_normal((24000, 20)).astype(np.float32)
    true = np.asarray(2 * teacher(teacher.init(jax.random.key(1)), jnp.asarray(x))[:, 0])
    noisy = true + 0.3 * random.standard_normal(len(true)).astype(np.float32)

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        return jnp.square(network(params, example[0])[0] - example[1])

    def metrics(params: Any, examples: Any) -> Mapping[str, chex.Array]:
        inputs, noisy, true = examples
        outputs = network(params, inputs)[:, 0]
        return {"excess": jnp.square(outputs - true), "loss": jnp.square(outputs - noisy)}

    parts = _parts((x, noisy, true), 20000, 2000)
    return _problem("student", network.init, loss, parts, batch_size, metrics=metrics, score=EXCESS)


def variational(*, batch_size: int) -> problems.Problem:
    """A variational autoencoder of digits, with noise of its own.

    It is judged by the evidence bound, up to a constant and with one draw of the code.
    """
    images, _ = _images("digits")
    encoder = _Network(lambda rngs: _Layers([64, 48, 12], nnx.relu, rngs))
    decoder = _Network(lambda rngs: _Layers([6, 48, 64], nnx.relu, rngs))

    def init(key: chex.PRNGKey) -> Any:
        keys = jax.random.split(key)
        return {"encoder": encoder.init(keys[0]), "decoder": decoder.init(keys[1])}

    def loss(params: Any, image: chex.Array, key: chex.PRNGKey) -> chex.Array:
        mean, log_deviation = jnp.split(encoder(params["encoder"], image), 2)
        code = mean + jnp.exp(log_deviation) * jax.random.normal(key, mean.shape)
        unlikely = jnp.sum(jnp.square(decoder(params["decoder"], code) - image)) / 0.2
        squares = jnp.square(mean) + jnp.exp(2 * log_deviation)
        return unlikely + 0.5 * jnp.sum(squares - 1 - 2 * log_deviation)

    return _problem("variational", init, loss, images, batch_size)


def bandit(*, batch_size: int) -> problems.Problem:
    """A digit is shown, a label drawn from the model; only whether it was right is told.

    The gradient is that of REINFORCE, without a baseline: mostly noise, and far from where it ends.
    """
    images, labels = _images("digits")
    network = _Network(lambda rngs: _Layers([64, 32, 10], nnx.relu, rngs))

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        logits = nnx.log_softmax(network(params, example[0]))
        guess = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        reward = jnp.where(guess == example[1], 1.0, 0.0)
        return -reward * logits[guess]

    return _problem(
        "bandit", network.init, loss, _paired(images, labels), batch_size,
        metrics=_accuracy(network), score=scores.ACCURACY,
    )  # fmt: skip


def heavy_tails(*, batch_size: int) -> problems.Problem:
    """Linear regression whose noise is Student's t with 2.5 degrees of freedom.

    The scales of the inputs go from 1 to 30, the curvatures from 1 to 900.
    """
    random = np.random.default_rng(0)
    scales = np.geomspace(1, 30, 30)
    x = (random.standard_normal((22000, 30)) * scales).astype(np.float32)
    weights = (random.standard_normal(30) / scales).astype(np.float32)
    y = (x @ weights + random.standard_t(2.5, len(x))).astype(np.float32)

    def init(key: chex.PRNGKey) -> chex.Array:
        del key
        return jnp.zeros(30)

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        return 0.5 * jnp.square(example[0] @ params - example[1])

    def metrics(params: Any, examples: Any) -> Mapping[str, chex.Array]:
        inputs, y = examples
        return {
            "excess": 0.5 * jnp.square(inputs @ (params - weights)),
            "loss": 0.5 * jnp.square(inputs @ params - y),
        }

    parts = _parts((x, y), 20000, 1000)
    return _problem("heavy tails", init, loss, parts, batch_size, metrics=metrics, score=EXCESS)


def full_batch(*, batch_size: int) -> problems.Problem:
    """Convex, and no noise at all: regularised softmax regression, all digits in each step.

    It is the objective itself by which it is judged.
    """
    images, labels = _images("digits")
    examples = tuple(np.concatenate([part[k] for part in _paired(images, labels).values()])
                     for k in range(2))  # fmt: skip
    if batch_size != len(examples[1]):
        raise ValueError(f"batch_size = {batch_size}; accepted: {len(examples[1])}")
    network = _Network(lambda rngs: _Layers([64, 10], nnx.relu, rngs))

    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        logits = network(params, example[0])
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        one = optax.losses.softmax_cross_entropy_with_integer_labels(logits, example[1])
        return one + 0.5e-3 * squares

    exact = scores.Score("loss", is_exact=True)
    parts = {"train": examples, "test": examples}
    return _problem("full batch", network.init, loss, parts, batch_size, score=exact)


# Parts of problems ------------------------------------------------------------------------------


class _Layers(nnx.Module):
    """Linear layers of these widths, and a function between them."""

    def __init__(
        self, widths: list[int], between: Callable[[chex.Array], chex.Array], rngs: nnx.Rngs
    ) -> None:
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])
        self.between = between

    def __call__(self, x: chex.Array) -> chex.Array:
        for layer in self.layers[:-1]:
            x = self.between(layer(x))
        found: chex.Array = self.layers[-1](x)
        return found


class _Network:
    """A module as a function of its parameters and an input."""

    def __init__(
        self,
        build: Callable[[nnx.Rngs], Any],
        apply: Callable[[Any, chex.Array], chex.Array] = lambda module, x: module(x),
    ) -> None:
        self._build, self._apply = build, apply
        self._graph, _, self._rest = nnx.split(build(nnx.Rngs(0)), nnx.Param, ...)

    def init(self, key: chex.PRNGKey) -> Any:
        return nnx.split(self._build(nnx.Rngs(key)), nnx.Param, ...)[1]

    def __call__(self, params: Any, x: chex.Array) -> chex.Array:
        return self._apply(nnx.merge(self._graph, params, self._rest), x)


def _problem(
    name: str,
    init: Callable[[chex.PRNGKey], Any],
    loss: ExampleLoss,
    parts: Mapping[str, Arrays],
    batch_size: int,
    *,
    metrics: Metrics | None = None,
    score: scores.Score = scores.LOSS,
) -> problems.Problem:
    """A problem of examples, of which each epoch is a permutation; keys are drawn for all.

    Args:
      name: what it is called.
      init: key -> parameters.
      loss: of one example, with a key for what it draws itself.
      parts: ``train`` and ``test``, perhaps ``validation``.
      batch_size: examples in a step.
      metrics: what is evaluated; default the loss.
      score: one of them.
    """
    data = {part: jax.tree.map(jnp.asarray, arrays) for part, arrays in parts.items()}
    count = len(jax.tree.leaves(data["train"])[0])

    def with_keys(key: chex.PRNGKey, examples: Arrays) -> Any:
        return examples, jax.random.split(key, len(jax.tree.leaves(examples)[0]))

    def batches(data: Any, key: chex.PRNGKey, first_step: chex.Numeric, num_steps: int) -> Any:
        order, noise = jax.random.split(key)
        steps = first_step + jnp.arange(num_steps)
        rows = problems.epoch_indices(order, steps, num_steps, count, batch_size)
        return rows, problems.step_keys(noise, steps)

    def batch(data: Any, drawn: Any) -> Any:
        rows, key = drawn
        return with_keys(key, jax.tree.map(lambda x: x[rows], data["train"]))

    def losses(params: Any, batch: Any) -> chex.Array:
        return jax.vmap(loss, (None, 0, 0))(params, *batch)

    def evaluate(params: Any, data: Any, split: str, index: chex.Numeric) -> dict[str, chex.Array]:
        del index
        found = metrics(params, data[split]) if metrics else {
            "loss": losses(params, with_keys(jax.random.key(0), data[split]))
        }  # fmt: skip
        length = len(jax.tree.leaves(data[split])[0])
        return {k: jnp.sum(v) for k, v in found.items()} | {"count": jnp.asarray(float(length))}

    return problems.Problem(
        name=name,
        data=data,
        init=init,
        batches=batches,
        batch=batch,
        loss=lambda params, batch: jnp.mean(losses(params, batch)),
        example_loss=lambda params, example: loss(params, *example),
        splits={part: 1 for part in data if part != "train"},
        evaluate=evaluate,
        score=score,
    )


def _classification(
    name: str, network: _Network, images: Any, labels: Any, batch_size: int
) -> problems.Problem:
    def loss(params: Any, example: Any, key: chex.PRNGKey) -> chex.Array:
        del key
        logits = network(params, example[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example[1])

    return _problem(
        name, network.init, loss, _paired(images, labels), batch_size,
        metrics=_accuracy(network), score=scores.ACCURACY,
    )  # fmt: skip


def _accuracy(network: _Network) -> Metrics:
    def metrics(params: Any, examples: Any) -> Mapping[str, chex.Array]:
        logits = jax.vmap(lambda x: network(params, x))(examples[0])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, examples[1])
        right = jnp.argmax(logits, axis=-1) == examples[1]
        return {"accuracy": right.astype(jnp.float32), "loss": losses}

    return metrics


def _paired(images: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Arrays]:
    return {part: (images[part], labels[part]) for part in images}


def _parts(arrays: Arrays, train: int, validation: int) -> dict[str, Arrays]:
    """The first examples, the next, and the rest."""
    ends = {"train": (0, train), "validation": (train, train + validation),
            "test": (train + validation, None)}  # fmt: skip
    return {
        part: jax.tree.map(lambda x, s=slice(*between): x[s], arrays)
        for part, between in ends.items()
    }


def _images(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat, normalised images, of half of the resolution where it is high, and their labels."""
    whole = data_lib.load(name)
    small = len(whole.train_labels) < 10 * VALIDATION
    dataset = whole.split_validation(0.2 if small else VALIDATION)
    parts = {
        "train": (dataset.train_images, dataset.train_labels),
        "validation": (dataset.validation_images, dataset.validation_labels),
        "test": (dataset.test_images[:TEST], dataset.test_labels[:TEST]),
    }
    images, labels = {}, {}
    for part, (pixels, numbers) in parts.items():
        found = (pixels if small else halved(pixels)).astype(np.float32) - dataset.mean
        images[part] = (found / dataset.std).reshape(len(found), -1).astype(np.float32)
        labels[part] = numbers
    return images, labels

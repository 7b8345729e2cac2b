"""The slides' figure of Dauphin et al.: networks whose training meets saddles.

One hidden layer on MNIST reduced to 10 × 10, small enough for the whole Hessian: training error
and index, the share of negative eigenvalues, for minibatch SGD, damped and saddle-free Newton.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

import optgrad
from optgrad.core import oracles
from optgrad.experiments import data as data_lib
from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, local_mnist, verdict
from optgrad.experiments.reproduce import planning_runs as lib
from optgrad.experiments.reproduce import survey_runs as runs

SIDE, CLASSES = 10, 10
EXAMPLES, CURVED = 10_000, 1_000  # training set; of it for the eigenvalues that are shown
EPOCHS = 6
_TITLE = "Networks that meet saddles"
_RATES = (0.03, 0.1, 0.3, 1.0)  # of minibatch SGD


class Images(NamedTuple):
    """A batch."""

    images: Any  # [B, 100], centred
    labels: Any  # int32 [B]


class Curve(NamedTuple):
    """One run, at every epoch from 0."""

    error: Any  # share of the training set that is wrong
    loss: Any  # mean training loss
    index: Any  # share of eigenvalues below −10⁻⁶ of the largest
    lowest: Any  # the lowest eigenvalue


def init_params(seed: int, hidden: int) -> dict[str, Any]:
    """N(0, 1/inputs) and zeros, of a 100-hidden-10 network."""
    first, second = jax.random.split(jax.random.PRNGKey(seed))
    inputs = SIDE * SIDE
    return {
        "w1": jax.random.normal(first, (inputs, hidden)) / np.sqrt(inputs),
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, CLASSES)) / np.sqrt(hidden),
        "b2": jnp.zeros(CLASSES),
    }


def logits(params: Any, images: Any) -> Any:
    """Of a batch."""
    return jnp.tanh(images @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params: Any, batch: Images) -> Any:
    """Mean cross-entropy."""
    scores = logits(params, batch.images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels))


def reduced(dataset: data_lib.Dataset, count: int) -> Images:
    """The first training images at 10 × 10, in units of their own spread."""
    images = np.asarray(dataset.train_images[:count, :, :, 0], np.float32)
    small = jax.image.resize(jnp.asarray(images), (len(images), SIDE, SIDE), "linear")
    flat = small.reshape(len(images), -1)
    flat = (flat - flat.mean(0)) / jnp.std(flat)
    return Images(flat, jnp.asarray(dataset.train_labels[:count], jnp.int32))


def saddles(settings: Settings, progress: Progress) -> Result:
    """Training error and index of small networks by three methods, and by two in turn."""
    try:
        dataset = local_mnist.load(settings)
    except (data_lib.DataNotFoundError, ImportError) as error:
        progress(1.0)
        return local_mnist.skipped(_TITLE, error)
    count, epochs = (300, 1) if settings.quick else (EXAMPLES, EPOCHS)
    widths = (2,) if settings.quick else (3, 5)
    examples = reduced(dataset, count)
    curves: dict[tuple[int, str], Curve] = {}
    for i, hidden in enumerate(widths):
        study = _Study(examples, hidden, epochs)
        for label, curve in study.curves(quick=settings.quick):
            curves[hidden, label] = curve
            progress((i + len([k for k in curves if k[0] == hidden]) / 4) / len(widths))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(curves, widths)
    rows = [
        {"hidden": hidden, "method": label, "epoch": epoch,
         **{name: float(f"{float(getattr(curve, name)[epoch]):.5g}") for name in Curve._fields}}
        for (hidden, label), curve in curves.items() for epoch in range(len(curve.error))
    ]  # fmt: skip
    header = ("hidden units", "method", "training error", "loss", "index", "lowest eigenvalue")
    table = [
        (str(hidden), label, f"{100 * c.error[-1]:.1f} %", f"{c.loss[-1]:.4f}",
         f"{100 * c.index[-1]:.1f} %", f"{c.lowest[-1]:.1e}")
        for (hidden, label), c in curves.items()
    ]  # fmt: skip
    return Result(
        title=_TITLE,
        text=(
            f"100-h-10 networks with tanh on {count:,} MNIST images reduced to 10 × 10, "
            f"{epochs} epochs. Minibatch SGD (MSGD, batches of 100, momentum .9) with the best of "
            f"{len(_RATES)} rates by its final training loss; damped and saddle-free Newton with "
            "the whole Hessian of batches of 1,000 and damping by the gain ratio; saddle-free "
            "Newton from where MSGD stands after half of the epochs. Eigenvalues are those of the "
            f"first {CURVED:,} images. One start; all begin at the same."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, table)],
        findings=_findings(curves, widths),
    )


class _Study:
    """The runs with one width."""

    def __init__(self, examples: Images, hidden: int, epochs: int) -> None:
        self.examples, self.epochs = examples, epochs
        self.params = init_params(0, hidden)
        self.extras = optgrad.curvature_args(loss)
        self._look = jax.jit(self._observe)

    def curves(self, *, quick: bool) -> list[tuple[str, Curve]]:
        tried = {}
        for rate in _RATES[:1] if quick else _RATES:
            tried[rate] = self._train("momentum", {"learning_rate": 0.1 * rate}, 100)
        best = min(tried, key=lambda r: float(np.nan_to_num(tried[r][0].loss[-1], nan=np.inf)))
        half = max(self.epochs // 2, 1)
        found = [(f"MSGD {best:g}", tried[best][0])]
        for label, method in (("damped Newton", "damped_newton"),
                              ("saddle-free Newton", "saddle_free_newton")):  # fmt: skip
            found.append((label, self._train(method, {"adaptive": True}, 1000)[0]))
        head = jax.tree.map(lambda x: x[: half + 1], tried[best][0])
        tail, _ = self._train(
            "saddle_free_newton", {"adaptive": True}, 1000, tried[best][1][half], half
        )
        joined = Curve(*(np.concatenate([x, y[1:]]) for x, y in zip(head, tail, strict=True)))
        found.append(("MSGD, then saddle-free Newton", joined))
        return found

    def _train(
        self, method: str, fixed: Mapping[str, Any], size: int, params: Any = None, first: int = 0
    ) -> tuple[Curve, list[Any]]:
        """The curve and the parameters at every epoch."""
        params = self.params if params is None else params
        count = len(self.examples.labels)
        size = min(size, count)
        optimizer = runs.create(method, **fixed)
        step = runs.step_of(optimizer, self.extras)

        @jax.jit
        def epoch(carry: Any, key: Any) -> Any:
            order = jax.random.permutation(key, count)[: count - count % size].reshape(-1, size)
            return jax.lax.scan(
                lambda c, rows: (step(c, jax.tree.map(lambda x: x[rows], self.examples)), None),
                carry,
                order,
            )[0]

        carry = runs.start(optimizer, params)
        kept = [params]
        for number in range(first, self.epochs):
            carry = epoch(carry, jax.random.fold_in(jax.random.PRNGKey(1), number))
            kept.append(carry[0])
        looks = [self._look(p) for p in kept]
        return Curve(
            *(np.array([np.asarray(x) for x in column]) for column in zip(*looks, strict=True))
        ), kept

    def _observe(self, params: Any) -> Curve:
        scores = logits(params, self.examples.images)
        error = jnp.mean(jnp.argmax(scores, -1) != self.examples.labels)
        batch = jax.tree.map(lambda x: x[:CURVED], self.examples)
        product = oracles.hessian_product(lambda p: loss(p, batch), params)
        values = jnp.linalg.eigvalsh(oracles.dense_matrix(product, params))
        share = jnp.mean(values < -1e-6 * values[-1])
        return Curve(error, loss(params, self.examples), share, values[0])


def _draw(curves: Mapping[tuple[int, str], Curve], widths: Sequence[int]) -> Any:
    figure = lib.figure(3.2 * len(widths) + 2.5, 5.6)
    axes = np.atleast_2d(figure.subplots(2, len(widths), sharex=True)).reshape(2, len(widths))
    names = ["MSGD", "damped Newton", "saddle-free Newton", "MSGD, then saddle-free Newton"]
    for column, width in enumerate(widths):
        for (hidden, label), curve in curves.items():
            if hidden != width:
                continue
            name = label if label in names else label.split()[0]
            look = plots.look(names.index(name))
            epochs = np.arange(len(curve.error))
            axes[0, column].plot(epochs, 100 * curve.error, label=name, **look)
            axes[1, column].plot(epochs, 100 * curve.index, **look)
        axes[0, column].set(title=f"{width} hidden units", yscale="log")
        axes[1, column].set(xlabel="epoch", ylim=(0, None))
    axes[0, 0].set_ylabel("training error, %")
    axes[1, 0].set_ylabel("negative eigenvalues, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _findings(curves: Mapping[tuple[int, str], Curve], widths: Sequence[int]) -> list[Finding]:
    found = []
    for width in widths:
        mine = {label: c for (hidden, label), c in curves.items() if hidden == width}
        sgd = next(c for label, c in mine.items() if label.startswith("MSGD ") and "," not in label)
        damped, free = mine["damped Newton"], mine["saddle-free Newton"]
        found.append(
            Finding(
                f"{width} hidden units: saddle-free Newton has the lowest training error",
                "slides' figure: below MSGD and damped Newton",
                f"{100 * free.error[-1]:.2f} %, MSGD {100 * sgd.error[-1]:.2f} %, damped Newton "
                f"{100 * damped.error[-1]:.2f} %",
                verdict(free.error[-1] <= min(sgd.error[-1], damped.error[-1])),
            )
        )
    joined = [c for (_, label), c in curves.items() if "then" in label]
    sgds = [c for (_, label), c in curves.items() if label.startswith("MSGD ")]
    found.append(
        Finding(
            "saddle-free Newton goes on where MSGD has slowed down",
            "slides' figure: error falls after the change",
            ", ".join(f"loss {j.loss[-1]:.4f} for {s.loss[-1]:.4f}"
                      for j, s in zip(joined, sgds, strict=True)),
            verdict(all(j.loss[-1] <= s.loss[-1] for j, s in zip(joined, sgds, strict=True))),
        )
    )  # fmt: skip
    return found

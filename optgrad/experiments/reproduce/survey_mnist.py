"""MNIST with equal budgets in gradient equivalents: where these methods lose, and where not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

import optgrad
from optgrad.experiments import data as data_lib
from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, local_mnist, verdict
from optgrad.experiments.reproduce import planning_runs as lib
from optgrad.experiments.reproduce import survey_runs as runs

HIDDEN, BATCH, L2 = 32, 256, 1e-4
BUDGET = 600.0
COLUMNS = (300.0, 600.0)
_TITLE = "MNIST with equal budgets"


class Contestant(NamedTuple):
    """A method, the one hyperparameter that is tuned, and its values."""

    method: str
    tuned: str
    values: tuple[float, ...]
    fixed: Mapping[str, Any] = {}
    at_once: int = 5  # updates between two looks at the cost


CONTESTANTS: Mapping[str, Contestant] = {
    "SGD": Contestant("sgd", "learning_rate", (0.1, 0.3, 1.0), at_once=50),
    "momentum": Contestant("momentum", "learning_rate", (0.03, 0.1, 0.3), at_once=50),
    "Adam": Contestant("adam", "learning_rate", (1e-3, 3e-3, 1e-2), at_once=50),
    "K-FAC": Contestant("kfac", "learning_rate", (0.01, 0.03, 0.1), at_once=25),
    "TONGA": Contestant("tonga", "learning_rate", (0.3, 1.0, 3.0), at_once=50),
    "diagonal GGN": Contestant("diagonal_gauss_newton", "learning_rate", (0.01, 0.03, 0.1),
                               at_once=25),
    "natural gradient, empirical F": Contestant(
        "natural_gradient", "learning_rate", (0.1, 0.3, 1.0), at_once=5),
    "Lanczos saddle-free": Contestant("lanczos_saddle_free", "damping", (0.1, 1.0), {"k": 4}),
    "Krylov subspace descent": Contestant("krylov_subspace_descent", "k", (5,), {"inner_steps": 4}),
    "truncated Newton": Contestant("truncated_newton", "maxiter", (5, 10)),
    "Hessian-free": Contestant("hessian_free", "maxiter", (5, 10)),
    "NCG PR+": Contestant("nonlinear_cg", "curv_rtol", (0.1, 0.5)),
    "L-BFGS (optax)": Contestant("lbfgs", "memory_size", (10,)),
    "implicit Euler": Contestant("implicit_euler", "learning_rate", (10.0, 30.0)),
    "Heun": Contestant("runge_kutta", "learning_rate", (0.5, 1.0), {"tableau": "heun"}, at_once=25),
}  # fmt: skip


class Batch(NamedTuple):
    """Images, in units of their spread, and labels."""

    images: Any  # [B, 784]
    labels: Any  # int32 [B]


class Curve(NamedTuple):
    """One run."""

    costs: Any  # gradient equivalents, from 0
    loss: Any  # training loss on the first 10,000 images
    accuracy: Any  # on the test set


def init_params(seed: int, inputs: int = 784) -> list[dict[str, Any]]:
    """N(0, 1/inputs) and zeros, of 784-32-10 with tanh: 25,450 numbers."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    sizes = ((inputs, HIDDEN), (HIDDEN, 10))
    return [
        {"kernel": jax.random.normal(k, s) / np.sqrt(s[0]), "bias": jnp.zeros(s[1])}
        for k, s in zip(keys, sizes, strict=True)
    ]


def logits(params: Any, images: Any) -> Any:
    """Of a batch."""
    hidden = jnp.tanh(images @ params[0]["kernel"] + params[0]["bias"])
    return hidden @ params[1]["kernel"] + params[1]["bias"]


def tapped(params: Any, images: Any, taps: Any) -> Any:
    """The same with something added to the pre-activations; and the inputs of the layers."""
    before = images @ params[0]["kernel"] + params[0]["bias"] + taps["0"]
    hidden = jnp.tanh(before)
    scores = hidden @ params[1]["kernel"] + params[1]["bias"] + taps["1"]
    return scores, {"0": images, "1": hidden}


def penalty(params: Any) -> Any:
    """½·L2·|θ|²."""
    return 0.5 * L2 * sum(jnp.sum(x * x) for x in jax.tree.leaves(params))


def outputs(params: Any, batch: Batch) -> Any:
    """Logits, and the parameters, so that the Gauss–Newton matrix contains the penalty."""
    return logits(params, batch.images), params


def out_loss(z: Any, batch: Batch) -> Any:
    """Mean cross-entropy and penalty."""
    scores, params = z
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
    return jnp.mean(losses) + penalty(params)


class _Data(NamedTuple):
    train: Batch
    test: Batch


def _prepared(dataset: data_lib.Dataset) -> _Data:
    scale = 1.0 / max(float(dataset.train_images.std()), 1e-6)
    mean = float(dataset.train_images.mean())

    def batch(images: Any, labels: Any) -> Batch:
        flat = (np.asarray(images, np.float32).reshape(len(images), -1) - mean) * scale
        return Batch(jnp.asarray(flat), jnp.asarray(labels, jnp.int32))

    return _Data(
        batch(dataset.train_images, dataset.train_labels),
        batch(dataset.test_images, dataset.test_labels),
    )


def mnist(settings: Settings, progress: Progress) -> Result:
    """Training loss and test accuracy of every method at three budgets."""
    try:
        prepared = _prepared(local_mnist.load(settings))
    except (data_lib.DataNotFoundError, ImportError) as error:
        progress(1.0)
        return local_mnist.skipped(_TITLE, error)
    budget = 40.0 if settings.quick else BUDGET
    seeds = (1,)
    chosen = dict(list(CONTESTANTS.items())[:: 5 if settings.quick else 1])
    curves: dict[str, list[Curve]] = {}
    best: dict[str, float] = {}
    for i, (label, contestant) in enumerate(chosen.items()):
        best[label], curves[label] = _compete(contestant, prepared, budget, seeds)
        progress((i + 1) / len(chosen))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(curves, budget)
    columns = [c for c in COLUMNS if c <= budget] or [budget]
    header = ("method", "tuned", *(f"{c:g}: training loss, test accuracy" for c in columns))
    table = [
        (label, f"{chosen[label].tuned} = {best[label]:g}", *(_cell(found, c) for c in columns))
        for label, found in curves.items()
    ]
    rows = [
        {"method": label, "tuned": chosen[label].tuned, "best": best[label], "seed": seed, **row}
        for label, found in curves.items()
        for seed, curve in zip(seeds, found, strict=True)
        for row in lib.curve_rows(
            {}, {"gradient_equivalents": curve.costs, "train_loss": curve.loss,
                 "test_accuracy": curve.accuracy}, 25)
    ]  # fmt: skip
    return Result(
        title=_TITLE,
        text=(
            f"784-{HIDDEN}-10 with tanh, L2 {L2:g}, batches of {BATCH}, at most {budget:g} "
            f"gradient equivalents of a batch; mean of {len(seeds)} seed(s). One hyperparameter of "
            "each method is tuned by the training loss at the end, on a seed of its own. "
            "Equivalents are those of the literature (a product with the Hessian 2, a loss ⅓); "
            "factorisations are not charged."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, table)],
        findings=_findings(curves, columns[-1]),
    )


def _compete(
    contestant: Contestant, prepared: _Data, budget: float, seeds: Sequence[int]
) -> tuple[float, list[Curve]]:
    """The best value by seed 0, and the runs with it."""
    tried = {v: _train(contestant, v, prepared, budget, 0) for v in contestant.values}
    best = min(tried, key=lambda v: float(np.nan_to_num(tried[v].loss[-1], nan=np.inf)))
    return best, [_train(contestant, best, prepared, budget, seed) for seed in seeds]


def _train(
    contestant: Contestant, value: float, prepared: _Data, budget: float, seed: int
) -> Curve:
    optimizer = runs.create(contestant.method, **contestant.fixed, **{contestant.tuned: value})
    key = jax.random.PRNGKey(100 + seed)
    count = len(prepared.train.labels)

    def draw(first: Any, number: int) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(number))
        rows = jax.vmap(lambda k: jax.random.randint(k, (BATCH,), 0, count))(keys)
        return jax.tree.map(lambda x: x[rows], prepared.train), keys

    needs = optgrad.get_method(contestant.method).needs
    # The empirical Fisher matrix is that of the data's labels.
    labels = "data" if "per_example_grads" in needs else "model"

    def statistics(params: Any, batch: Batch, key: Any) -> Any:
        return optgrad.layer_statistics(
            tapped, params, batch.images, batch.labels, key, labels=labels
        )

    args = optgrad.curvature_args(
        outputs=outputs, out_loss=out_loss, kfac=statistics if "kfac_stats" in needs else None
    )

    def extras(params: Any, drawn: Any) -> Any:
        return args(params, *drawn)

    start = init_params(seed, prepared.train.images.shape[1])
    seen = [_look(start, prepared)]
    costs = [0.0]
    at_once = min(contestant.at_once, max(int(budget) // 8, 1))  # a few looks in quick runs too
    for params, cost in runs.within_budget(
        optimizer, extras, start, draw=draw, budget=budget, at_once=at_once
    ):
        costs.append(cost)
        seen.append(_look(params, prepared))
    losses, accuracies = zip(*((float(a), float(b)) for a, b in seen), strict=True)
    return Curve(np.array(costs), np.array(losses), np.array(accuracies))


@jax.jit
def _look(params: Any, prepared: _Data) -> Any:
    train = jax.tree.map(lambda x: x[:10_000], prepared.train)
    predicted = jnp.argmax(logits(params, prepared.test.images), -1)
    return out_loss(outputs(params, train), train), jnp.mean(predicted == prepared.test.labels)


def _at(curve: Curve, budget: float) -> tuple[float, float]:
    """Training loss and test accuracy at the last look within the budget."""
    last = max(int(np.searchsorted(curve.costs, budget, side="right")) - 1, 0)
    return float(curve.loss[last]), float(curve.accuracy[last])


def _cell(found: Sequence[Curve], budget: float) -> str:
    losses, accuracies = zip(*(_at(c, budget) for c in found), strict=True)
    return f"{np.mean(losses):.4f}, {100 * np.mean(accuracies):.2f} %"


def _draw(curves: Mapping[str, Sequence[Curve]], budget: float) -> Any:
    figure = lib.figure(11, 4.4)
    axes = figure.subplots(1, 2)
    for index, (label, found) in enumerate(curves.items()):
        for start, curve in enumerate(found):
            look = {**plots.look(index), "alpha": 0.4 if start else 1.0}
            axes[0].plot(curve.costs, curve.loss, label=None if start else label, **look)
            axes[1].plot(curve.costs, 100 * (1 - curve.accuracy), **look)
    axes[0].set(yscale="log", ylabel="training loss")
    axes[1].set(yscale="log", ylabel="test error, %")
    for axis in axes:
        axis.set(xlabel="gradient equivalents", xlim=(0, budget))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _findings(curves: Mapping[str, Sequence[Curve]], budget: float) -> list[Finding]:
    final = {k: float(np.mean([_at(c, budget)[0] for c in found])) for k, found in curves.items()}
    first = {k: v for k, v in final.items() if k in {"SGD", "momentum", "Adam"}}
    cheap = {k: v for k, v in final.items() if k in {"K-FAC", "TONGA", "diagonal GGN"}}
    rest = {k: v for k, v in final.items() if k not in {**first, **cheap}}
    best = min(first, key=first.__getitem__)
    found = []
    if cheap:
        name = min(cheap, key=cheap.__getitem__)
        found.append(
            Finding(
                "cheap preconditioners are level with tuned momentum and Adam",
                "digits: level (specification, 7.2)",
                f"{name} {cheap[name]:.4f}, {best} {first[best]:.4f}",
                verdict(cheap[name] <= 1.15 * first[best]),
            )
        )
    if rest:
        name = min(rest, key=rest.__getitem__)
        found.append(
            Finding(
                "methods of products and line searches lose per gradient on minibatches",
                "digits: they lose (specification, 7.2)",
                f"best of them {name} {rest[name]:.4f}, {best} {first[best]:.4f}",
                verdict(rest[name] > first[best]),
            )
        )
    return found

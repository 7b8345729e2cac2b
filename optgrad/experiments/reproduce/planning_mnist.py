"""What the paper leaves for future work: a neural network, on MNIST."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

import optgrad
from optgrad.experiments import data as data_lib
from optgrad.experiments import engine, plots, problems
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, local_mnist, verdict
from optgrad.experiments.reproduce import planning_quadratics as beyond
from optgrad.experiments.reproduce import planning_runs as lib

_RATES = (0.03, 0.1, 0.3)
_BATCH = 128
_TITLE = "Beyond the paper: a network on MNIST"


def mnist(settings: Settings, progress: Progress) -> Result:
    """A multilayer perceptron on MNIST by SGD, momentum and planning, verified and not."""
    try:
        dataset = local_mnist.load(settings)
    except (data_lib.DataNotFoundError, ImportError) as error:
        progress(1.0)
        return local_mnist.skipped(_TITLE, error)
    steps, every, seeds = (6, 3, 1) if settings.quick else (400, 40, 2)
    hidden = (16,) if settings.quick else (100,)
    problem = problems.image_classification(
        dataset, "mlp", batch_size=_BATCH, model_options={"hidden": hidden}
    )
    rates = _RATES[:1] if settings.quick else _RATES
    runs = engine.Runs(
        {"learning_rate": np.repeat(rates, seeds)}, np.tile(np.arange(seeds), len(rates))
    )
    rows: list[dict[str, Any]] = []
    curves: dict[tuple[str, bool, float], Any] = {}
    chosen = {k: v for k, v in beyond.optimizers().items() if k[0] not in {"K5", "K50"}}
    if settings.quick:
        chosen = {k: chosen[k] for k in (("SGD", False), ("heavy ball .9", False), ("K10", True))}
    for index, ((name, verify), (method, fixed)) in enumerate(chosen.items()):
        trainer = engine.Trainer(problem, optgrad.get_method(method), fixed, eval_every=every)
        history = trainer.train(runs, steps)
        for i, rate in enumerate(rates):
            mine = slice(i * seeds, (i + 1) * seeds)
            loss = history.metrics["test_loss"][mine]
            curves[name, verify, rate] = history.steps, loss
            rows.append({
                "method": name, "verify": verify, "learning_rate": rate, "runs": seeds,
                "diverged": int(np.sum(~np.isfinite(loss[:, -1]))),
                "test_loss": _mean(loss[:, -1]),
                "test_accuracy": _mean(history.metrics["test_accuracy"][mine, -1]),
                "train_loss": _mean(history.metrics["train_loss"][mine, -1]),
            })  # fmt: skip
        progress((index + 1) / len(chosen))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(curves, rates)
    header = ("method", *(f"γ = {rate:g}: test loss, accuracy" for rate in rates))
    lines = [
        [beyond.text(name, verify), *(_cell(r) for r in rows
         if (r["method"], r["verify"]) == (name, verify))]
        for name, verify in chosen
    ]  # fmt: skip
    return Result(
        title=_TITLE,
        text=(
            f"784-{'-'.join(map(str, hidden))}-10 with ReLU, batches of {_BATCH}, {steps} gradient "
            f"evaluations, mean of {seeds} seed(s), float32. Plans are verified by the loss of the "
            "minibatch at hand, each time another one."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, lines)],
        findings=_findings(rows, rates),
    )


def _mean(values: Any) -> float | None:
    """Of the runs that did not diverge; None if all did."""
    kept = values[np.isfinite(values)]
    return float(f"{kept.mean():.4g}") if len(kept) else None


def _cell(row: Mapping[str, Any]) -> str:
    if row["test_loss"] is None:
        return "diverged"
    lost = f", {row['diverged']} of {row['runs']} diverged" if row["diverged"] else ""
    return f"{row['test_loss']:.3f}, {100 * row['test_accuracy']:.1f} %{lost}"


def _draw(curves: Mapping[tuple[str, bool, float], Any], rates: Sequence[float]) -> Any:
    figure = lib.figure(4.2 * len(rates) + 1.5, 4)
    names = list(dict.fromkeys(name for name, _, _ in curves))
    axes = np.atleast_1d(figure.subplots(1, len(rates), sharey=True))
    for axis, rate in zip(axes, rates, strict=True):
        for (name, verify, at), (steps, loss) in curves.items():
            if at == rate:
                look = {**plots.look(names.index(name)), "linestyle": "-" if verify else ":"}
                if name not in beyond.planning_methods():
                    look = {"color": "0.4", "linestyle": ("-", "--")[names.index(name)]}
                axis.plot(steps, np.mean(loss, axis=0), **look,
                          label=beyond.text(name, verify))  # fmt: skip
        axis.set(yscale="log", ylim=(0.1, 10), xlabel="gradient evaluation", title=f"γ = {rate:g}")
    axes[0].set_ylabel("test loss")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def _findings(rows: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> list[Finding]:
    def best(name: str, verify: bool) -> float:
        found = [r["test_loss"] for r in rows
                 if (r["method"], r["verify"]) == (name, verify) and not r["diverged"]]  # fmt: skip
        return min((x for x in found if x is not None), default=np.inf)

    verified = [r for r in rows if r["verify"]]
    plain = [r for r in rows if r["method"] in beyond.planning_methods() and not r["verify"]]
    planned = min(
        (
            (name, verify)
            for name, verify in {(r["method"], r["verify"]) for r in [*plain, *verified]}
        ),
        key=lambda key: best(*key),
    )
    by_rate = []
    for rate in rates:
        mine = [r for r in rows if r["learning_rate"] == rate and r["test_loss"] is not None]
        sgd = next(r["test_loss"] for r in mine if r["method"] == "SGD")
        ahead = min((r for r in mine if r["method"] in beyond.planning_methods()
                     and not r["diverged"]), key=lambda r: r["test_loss"])  # fmt: skip
        name = beyond.text(ahead["method"], ahead["verify"])
        by_rate.append(
            Finding(
                f"γ = {rate:g}: planning is ahead of SGD of the same γ",
                "not in the paper",
                f"{name} {ahead['test_loss']:.3f}, SGD {sgd:.3f}",
                verdict(ahead["test_loss"] < 0.98 * sgd),
            )
        )
    return [
        *by_rate,
        Finding(
            "The method can help accelerate SGD for deep neural networks",
            "expected, left for future work",
            f"best test loss over γ = {', '.join(f'{r:g}' for r in rates)}: "
            f"{beyond.text(*planned)} {best(*planned):.3f}, SGD "
            f"{best('SGD', False):.3f}, heavy ball {best('heavy ball .9', False):.3f}",
            verdict(best(*planned) < 0.98 * best("SGD", False)),
        ),
        Finding(
            "Runs that diverge, without and with verification",
            "not in the paper",
            f"{sum(r['diverged'] for r in plain)} and {sum(r['diverged'] for r in verified)} of "
            f"{sum(r['runs'] for r in verified)}",
            verdict(not any(r["diverged"] for r in verified)),
        ),
    ]

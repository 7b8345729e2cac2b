"""Figures 3, 6 and 7: the optimizers on MNIST, CIFAR-10 and CIFAR-100."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from optgrad.experiments import compare, data, plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, skipped_picture
from optgrad.experiments.reproduce import dissecting_training as training
from optgrad.experiments.reproduce import dissecting_verdicts as verdicts
from optgrad.experiments.reproduce.dissecting_scales import Network, scale_of

Outcomes = Mapping[tuple[str, str], compare.Outcome]  # (test problem, method)
FOUR = ("momentum", "m_svag", "adam", "m_ssd")
_METRICS = (("train_loss", "training loss"), ("test_loss", "test loss"))
_ACCURACY = ("test_accuracy", "test accuracy [%]")


def figure3(settings: Settings, progress: Progress) -> Result:
    """Figure 3: M-SGD, M-SVAG, Adam and M-SSD on all three test problems."""
    return _reproduce(
        settings, progress, "Figure 3: four methods on three networks",
        ("mnist", "cifar10", "cifar100"), FOUR, judge=verdicts.figure3,
    )  # fmt: skip


def figure6(settings: Settings, progress: Progress) -> Result:
    """Figure 6: Adam, and Adam* with both variance estimates."""
    return _reproduce(
        settings, progress, "Figure 6: Adam and its variants",
        ("cifar10", "cifar100"), ("adam", "adam_star", "adam_star_mb"), judge=verdicts.figure6,
    )  # fmt: skip


def figure7(settings: Settings, progress: Progress) -> Result:
    """Figure 7: M-SVAG with both variance estimates."""
    return _reproduce(
        settings, progress, "Figure 7: both versions of M-SVAG",
        ("cifar10", "cifar100"), ("m_svag", "m_svag_mb"), judge=verdicts.figure7,
    )  # fmt: skip


def _reproduce(
    settings: Settings,
    progress: Progress,
    title: str,
    names: Sequence[str],
    methods: Sequence[str],
    *,
    judge: Any,
) -> Result:
    missing = _missing(settings, names)
    pairs = [(name, method) for name in names if name not in missing for method in methods]
    outcomes: dict[tuple[str, str], compare.Outcome] = {}
    for index, pair in enumerate(pairs):

        def advance(fraction: float, index: int = index) -> None:
            progress((index + fraction) / len(pairs))

        outcomes[pair] = training.outcome(settings, *pair, advance)
    progress(1.0)
    networks = {name: scale_of(settings).networks[name] for name in names if name not in missing}
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(networks, methods, outcomes)
    skipped = [
        Finding(name, "not tried", f"skipped: {reason}", "not tried")
        for name, reason in missing.items()
    ]
    return Result(
        title=title,
        text="\n".join([*_what_was_done(networks, methods, outcomes), *_what_is_missing(missing)]),
        figure=drawn,
        rows=_rows(outcomes) or [{"status": "no stable rate" if outcomes else "skipped"}],
        tables=[_table(networks, methods, outcomes)] if outcomes else [],
        findings=[*judge(outcomes), *skipped],
    )


def _missing(settings: Settings, names: Sequence[str]) -> dict[str, str]:
    """Test problem -> why its data cannot be had."""
    missing = {}
    for name in names:
        try:
            training.load_problem(settings, name)
        except (data.DataNotFoundError, ImportError) as error:
            missing[name] = str(error).splitlines()[0]
    return missing


# The text ---------------------------------------------------------------------------------------


def _what_was_done(
    networks: Mapping[str, Network], methods: Sequence[str], outcomes: Outcomes
) -> list[str]:
    if not networks:
        return []
    lines = [
        "Learning rates are tuned as in A.2: the largest stable one is searched from the top, then "
        "6, 3, 1 × 10^m below it with one seed; the rate of the best test accuracy reached at any "
        "evaluation is replicated with other seeds. **Chosen on the test set, as in the paper: the "
        "final numbers are optimistic, for every method alike.** Mean ± one standard deviation "
        "over the replications; the training loss is the mean over the minibatches since the last "
        "evaluation, with the L2 term. M-SGD, M-SSD, M-SVAG and their variants have μ = 0.9, Adam "
        "0.9, 0.999 and 1e-8. The paper's text has neither the numbers of steps (but for the "
        "decay after 40k and 50k on CIFAR-100) nor the strength of the L2 term; those here are "
        "our choice, the latter that of DeepOBS, by the same authors, on CIFAR. (edge): the best "
        "rate is the last one tried, a better one may lie beyond; no claim is judged that such a "
        "rate could overturn.",
        "",
    ]
    for name, network in networks.items():
        spent = [outcomes[name, method] for method in methods]
        runs = sum(len(stage.seeds) for found in spent for stage in found.tuned.stages)
        seconds = sum(found.seconds for found in spent)
        lines.append(
            f"- {network.title}: {network.steps:,} steps of {network.batch_size}, L2 "
            f"{network.l2:g}{_schedule(network)}{_augmentation(network)}; {network.seeds} seeds, "
            f"tuned over {network.decades:g} decade(s), {network.test_images or 'all'} test images "
            f"evaluated. "
            + (f"**Not the paper's: {network.differs}.** " if network.differs else "")
            + f"{len(methods)} methods × {network.runs} full runs = "
            f"{len(methods) * network.runs * network.steps:,} steps; with the search for the "
            f"largest stable rate {runs} runs in {seconds:.0f} s, compilation included."
        )
    return lines


def _schedule(network: Network) -> str:
    at = " and ".join(f"{step:,}" for step in training.boundaries(network))
    return f", rate ÷ 10 after {at} steps" if at else ", constant rate"


def _augmentation(network: Network) -> str:
    if not network.augment:
        return ""
    return f", augmentation: {', '.join(network.augment)}"


def _what_is_missing(missing: Mapping[str, str]) -> list[str]:
    return [
        f"- **{name}: skipped, as its data is not at hand.** Give the folder that holds its files "
        "by `--data-dir` or the environment variable `OPTGRAD_DATA_DIR`."
        for name in missing
    ]


def _table(
    networks: Mapping[str, Network], methods: Sequence[str], outcomes: Outcomes
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    header = (
        "problem", "method", "best rate", "test accuracy [%]", "test loss", "training loss",
        "steps/s",
    )  # fmt: skip
    rows = []
    for name, network in networks.items():
        for method in methods:
            found = outcomes[name, method]
            steps = sum(len(s.seeds) * int(s.history.steps[-1]) for s in found.tuned.stages)
            best = found.tuned.best
            rate = "none stable" if best is None else f"{best:g}"
            rows.append([
                network.title.split(",")[0],
                training.LABELS[method],
                rate + (" (edge)" if best is not None and found.tuned.at_edge else ""),
                training.mean_sd(compare.final_values(found, "test_accuracy"), 100, 2),
                training.mean_sd(compare.final_values(found, "test_loss"), 1, 4),
                training.mean_sd(compare.final_values(found, "train_loss"), 1, 4),
                f"{steps / found.seconds:.0f}",
            ])  # fmt: skip
    return header, rows


def _rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    rows = []
    for (name, method), found in outcomes.items():
        if found.tuned.final is None:
            continue
        for row in found.tuned.final.rows():
            numbers = {k: row[k] for k in ("train_loss", "test_loss", "test_accuracy")}
            rows.append({
                "problem": name, "method": method, "learning_rate": row["value"],
                "seed": row["seed"], "step": row["step"],
                **{k: float(f"{v:.6g}") if np.isfinite(v) else None for k, v in numbers.items()},
                "diverged_at": row["diverged_at"],
            })  # fmt: skip
    return rows


# The picture ------------------------------------------------------------------------------------


def _draw(networks: Mapping[str, Network], methods: Sequence[str], outcomes: Outcomes) -> Figure:
    if not networks:
        return skipped_picture("the data is not at hand")
    figure = Figure(figsize=(3.9 * len(networks) + 0.4, 7.5))
    axes = figure.subplots(3, len(networks), squeeze=False, sharex="col")
    for column, (name, network) in enumerate(networks.items()):
        for row, (metric, title) in enumerate((*_METRICS, _ACCURACY)):
            axis = axes[row, column]
            for index, method in enumerate(methods):
                _draw_curve(axis, outcomes[name, method], metric, index)
            for step in training.boundaries(network):
                axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
            if metric != "test_accuracy":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.3g"))
                axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
                axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            if column == 0:
                axis.set_ylabel(title)
        axes[0, column].set_title(network.title)
        axes[-1, column].set_xlabel("step")
    lines = [
        Line2D([], [], label=training.LABELS[m], **plots.look(i)) for i, m in enumerate(methods)
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines))
    return figure


def _draw_curve(axis: Any, found: compare.Outcome, metric: str, index: int) -> None:
    last = found.tuned.final
    if last is None or (last.history.diverged_at > 0).all():
        return
    values = last.history.metrics[metric][last.history.diverged_at == 0]
    values = 100 * values if metric == "test_accuracy" else values
    shown = np.isfinite(values).all(axis=0)  # no training loss before the first step
    steps, values = last.history.steps[shown], values[:, shown]
    mean = values.mean(axis=0)
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    look = plots.look(index)
    axis.plot(steps, mean, label=training.LABELS[found.config.method], **look)
    axis.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.2, linewidth=0)

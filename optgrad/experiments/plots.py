"""Pictures of a comparison: training curves over seeds, and sensitivity to the learning rate."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optgrad.experiments import tuning
from optgrad.experiments.compare import Comparison

# Okabe & Ito's colours, distinguishable with colour-blindness; line styles repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FEW = 6  # lines whose legend fits into a panel
_STYLES = ("-", "--", "-.", ":")
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "optgrad",  # the same numbers give the same file
}


def figures(comparison: Comparison) -> dict[str, Figure]:
    """File stem -> figure; ``sensitivity`` only where something was tuned."""
    with mpl.rc_context(STYLE):
        drawn = {"curves": curves(comparison)}
        if any(outcome.tuned.hyperparameter for outcome in comparison.outcomes):
            drawn["sensitivity"] = sensitivity(comparison)
        return drawn


def save(figure: Figure, path: Path) -> None:
    """Writes SVG or PNG by the suffix, without a time stamp."""
    with mpl.rc_context(STYLE):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def curves(comparison: Comparison) -> Figure:
    """Training loss, test loss and the score: mean ± one standard deviation over seeds."""
    score = comparison.score
    panels = {"train_loss": "training loss", "test_loss": "test loss", score.name: score.title}
    figure = Figure(figsize=(11 * len(panels) / 3, 3.6))
    figure.suptitle(f"{comparison.problem}: mean ± sd over seeds")
    axes = figure.subplots(1, len(panels))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        lowest_start, lowest = np.inf, np.inf
        for index, outcome in enumerate(comparison.outcomes):
            final = outcome.tuned.final
            if final is None or (final.history.diverged_at > 0).all():
                continue
            values = final.history.metrics[metric][final.history.diverged_at == 0]
            steps = final.history.steps
            shown = np.isfinite(values).all(axis=0)  # no training loss before the first step
            steps, values = steps[shown], values[:, shown]
            mean = values.mean(axis=0)
            sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
            label = _label(outcome)
            axis.plot(steps, mean, label=label, **look(index))
            axis.fill_between(steps, mean - sd, mean + sd, color=look(index)["color"], alpha=0.2)
            lowest_start = min(lowest_start, mean[min(1, len(mean) - 1)])
            lowest = min(lowest, mean.min())
        if not (score.in_percent and metric == score.name):
            axis.set_yscale("log" if lowest >= 0 else "linear")
        elif np.isfinite(lowest_start):  # the first evaluation, before training, says little
            axis.set_ylim(max(0.0, lowest_start - 0.05), min(1.0, axis.get_ylim()[1]))
        if metric == score.name and np.isfinite(lowest):
            axis.axhline(comparison.target, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xlabel="step", title=title)
    _add_legend(figure, axes[-1], "lower right" if score.larger_is_better else "best")
    return figure


def sensitivity(comparison: Comparison) -> Figure:
    """The selection metric that each tried learning rate reached, averaged over tuning seeds."""
    select_by, score = comparison.config.tuning.select_by, comparison.score
    sign, lowest = score.sign(select_by), np.inf
    figure = Figure(figsize=(5.5, 3.8))
    axis: Axes = figure.subplots()
    for index, outcome in enumerate(comparison.outcomes):
        stage = next((s for s in outcome.tuned.stages if s.name == "tuning"), None)
        if stage is None:
            continue
        by_value = tuning.scores(stage, select_by, score)
        points = sorted((v, sign * s) for v, s in by_value.items() if np.isfinite(s))
        if points:
            lowest = min(lowest, *(reached for _, reached in points))
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4,
                      label=_text(outcome.config.label), **look(index))  # fmt: skip
        if outcome.tuned.best is not None:
            best = outcome.tuned.best
            axis.plot(best, sign * by_value[best], "o", markersize=10, fillstyle="none",
                      color=look(index)["color"])  # fmt: skip
    axis.set_xscale("log")
    if sign < 0 <= lowest:
        axis.set_yscale("log")
    axis.set(
        xlabel="learning rate (or what the method tunes)",
        ylabel=f"best {select_by.replace('_', ' ')}",
        title=f"{comparison.problem}: sensitivity",
    )
    _add_legend(figure, axis, "best")
    return figure


def _add_legend(figure: Figure, axis: Axes, place: Any) -> None:
    """The legend within the panel, or beside it where it would hide the lines."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) <= _FEW:
        if labels:
            axis.legend(loc=place)
        return
    figure.set_figwidth(figure.get_figwidth() + 2.0)
    figure.legend(handles, labels, loc="outside right upper")


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the line number ``index``."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "linewidth": 1.5,
    }


def _label(outcome: Any) -> str:
    best, label = outcome.tuned.best, _text(outcome.config.label)
    return label if best is None else f"{label} ({best:g})"


def _text(label: str) -> str:
    """The label as plain text: no formula between dollars, not hidden by a leading underscore."""
    hidden = label.startswith("_")
    return ("\u200b" if hidden else "") + label.replace("$", r"\$")

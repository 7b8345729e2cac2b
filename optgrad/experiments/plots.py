"""Pictures of a comparison: training curves over seeds, and sensitivity to the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optgrad.experiments import tuning
from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.engine import History
from optgrad.experiments.profiles import Profiles
from optgrad.experiments.scores import Score

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


class Band(NamedTuple):
    """A mean and its spread, at the places where it is known."""

    places: npt.NDArray[Any]  # [P], increasing: steps, or values of what was tuned
    mean: npt.NDArray[np.float64]  # [P]
    sd: npt.NDArray[np.float64]  # [P], of a sample; 0 of a single run
    runs: int


def figures(comparison: Comparison, order: Sequence[str] = ()) -> dict[str, Figure]:
    """File stem -> figure; ``sensitivity`` only where something was tuned.

    Args:
      comparison: what to draw.
      order: labels, whose places in it are their colours; default: the comparison's.
    """
    with mpl.rc_context(STYLE):
        drawn = {"curves": curves(comparison, order)}
        if was_tuned(comparison):
            drawn["sensitivity"] = sensitivity(comparison, order)
        return drawn


def labels(comparison: Comparison) -> list[str]:
    """Of its optimizers, in their order."""
    return [outcome.config.label for outcome in comparison.outcomes]


def was_tuned(comparison: Comparison) -> bool:
    """Whether there is a sensitivity to draw."""
    return any(outcome.tuned.hyperparameter for outcome in comparison.outcomes)


def save(figure: Figure, path: Path) -> None:
    """Writes SVG or PNG by the suffix, without a time stamp."""
    with mpl.rc_context(STYLE):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def band(history: History, metric: str) -> Band | None:
    """Mean and spread of a metric over the runs that did not diverge; None if all did."""
    values = history.metrics[metric][history.diverged_at == 0]
    if not len(values):
        return None
    shown = np.isfinite(values).all(axis=0)  # no training loss before the first step
    return _band(history.steps[shown], values[:, shown])


def _band(places: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> Band:
    mean = values.mean(axis=0)
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    return Band(places, mean, sd, len(values))


def curves(comparison: Comparison, order: Sequence[str] = ()) -> Figure:
    """Training loss, test loss and the score: mean ± one standard deviation over seeds."""
    score, order = comparison.score, order or labels(comparison)
    panels = {"train_loss": "training loss", "test_loss": "test loss", score.name: score.title}
    figure = Figure(figsize=(11 * len(panels) / 3, 3.6))
    figure.suptitle(f"{_text(comparison.problem)}: mean ± sd over seeds")
    axes = figure.subplots(1, len(panels))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        lowest_start, lowest = np.inf, np.inf
        for outcome in comparison.outcomes:
            final = outcome.tuned.final
            drawn = band(final.history, metric) if final else None
            if drawn is None:
                continue
            steps, mean, sd, _ = drawn
            line = look(order.index(outcome.config.label))
            axis.plot(steps, mean, label=_label(outcome), **line)
            axis.fill_between(steps, mean - sd, mean + sd, color=line["color"], alpha=0.2)
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


def tried(outcome: Outcome, select_by: str, score: Score) -> Band | None:
    """What each tried value reached by the metric that selects, over seeds; None if none did.

    A value that diverged with any seed is left out.
    """
    stage = next((s for s in outcome.tuned.stages if s.name == "tuning"), None)
    if stage is None:
        return None
    by_seed = [
        tuning.scores(tuning.runs_where(stage, stage.seeds == seed), select_by, score)
        for seed in np.unique(stage.seeds)
    ]
    values = sorted(v for v in by_seed[0] if all(np.isfinite(found[v]) for found in by_seed))
    reached = np.array([[found[v] for v in values] for found in by_seed])
    return _band(np.array(values), score.sign(select_by) * reached) if values else None


def sensitivity(comparison: Comparison, order: Sequence[str] = ()) -> Figure:
    """The selection metric that each tried learning rate reached: mean ± sd over tuning seeds."""
    select_by, score = comparison.config.tuning.select_by, comparison.score
    sign, lowest, order = score.sign(select_by), np.inf, order or labels(comparison)
    figure = Figure(figsize=(5.5, 3.8))
    axis: Axes = figure.subplots()
    for outcome in comparison.outcomes:
        drawn = tried(outcome, select_by, score)
        if drawn is None:
            continue
        values, mean, sd, _ = drawn
        line = look(order.index(outcome.config.label))
        lowest = min(lowest, mean.min())
        axis.plot(values, mean, marker="o", markersize=4, label=_text(outcome.config.label), **line)
        axis.fill_between(values, mean - sd, mean + sd, color=line["color"], alpha=0.2)
        chosen = values == outcome.tuned.best
        axis.plot(values[chosen], mean[chosen], "o", markersize=10, fillstyle="none",
                  color=line["color"])  # fmt: skip
    axis.set_xscale("log")
    if sign < 0 <= lowest:
        axis.set_yscale("log")
    axis.set(
        xlabel="learning rate (or what the method tunes)",
        ylabel=f"best {select_by.replace('_', ' ')}",
        title=f"{_text(comparison.problem)}: sensitivity",
    )
    _add_legend(figure, axis, "best")
    return figure


def profiles(found: Sequence[Profiles], order: Sequence[str]) -> Figure:
    """Performance profiles, a panel for each cost."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(found), 3.6))
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, one in zip(axes, found, strict=True):
            last = max([2.0, *(p.factors[-1] for p in one.profiles.values())])
            for label, profile in one.profiles.items():
                factors = np.append(profile.factors, 1.1 * last)  # on to the right end
                shares = np.append(profile.shares, profile.shares[-1])
                line = look(order.index(label))
                axis.step(factors, shares, where="post", label=_text(label), **line)
            axis.set(xlabel="factor τ of the best", ylabel="share of studies × seeds", xscale="log",
                     ylim=(-0.02, 1.02), title=one.cost)  # fmt: skip
        _add_legend(figure, axes[-1], "lower right")
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

"""Pictures of a comparison: training curves over seeds, sensitivity to hyperparameters."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optgrad.experiments import robustness, search_space, tuning
from optgrad.experiments.compare import Comparison, Outcome

# Okabe & Ito's colours, distinguishable with colour-blindness; line styles repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FEW = 6  # lines whose legend fits into a panel
_STYLES = ("-", "--", "-.", ":")
_UNITS = {
    "steps": "step",
    "gradient_evaluations": "gradient evaluations",
    "seconds": "seconds of training",
}
_TOLERANCES = np.linspace(0.0, 0.2, 201)[1:]
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
    """File stem -> figure, of `names`."""
    draw = {"sensitivity": sensitivity, "robustness": robustness_figure}
    with mpl.rc_context(STYLE):
        drawn = {}
        for name in names(comparison):
            unit = name.removeprefix("curves").removeprefix("_") or comparison.units[0]
            drawn[name] = draw[name](comparison) if name in draw else curves(comparison, unit)
        return drawn


def names(comparison: Comparison) -> list[str]:
    """File stems of its pictures; those of the tuning only where something was tuned."""
    tuned = any(outcome.tuned.hyperparameter for outcome in comparison.outcomes)
    is_known = any(comparison.sensitivity(outcome) for outcome in comparison.outcomes)
    return [
        "curves",
        *(f"curves_{unit}" for unit in comparison.units[1:]),
        *(["sensitivity"] if tuned else []),
        *(["robustness"] if is_known else []),
    ]


def save(figure: Figure, path: Path) -> None:
    """Writes SVG or PNG by the suffix, without a time stamp."""
    with mpl.rc_context(STYLE):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def curves(comparison: Comparison, unit: str = "steps") -> Figure:
    """Training loss, test loss and the score: mean ± one standard deviation over seeds.

    Args:
      comparison: what is shown.
      unit: over what, one of its ``units``.
    """
    score = comparison.score
    panels = {"train_loss": "training loss", "test_loss": "test loss", score.name: score.title}
    figure = Figure(figsize=(11 * len(panels) / 3, 3.6))
    figure.suptitle(f"{comparison.problem}: mean ± sd over seeds")
    axes = figure.subplots(1, len(panels))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        lowest_start, lowest = np.inf, np.inf
        ends = []
        for index, outcome in enumerate(comparison.outcomes):
            final = outcome.tuned.final
            if final is None or (final.history.diverged_at > 0).all():
                continue
            values = final.history.metrics[metric][final.history.diverged_at == 0]
            steps = final.history.steps * outcome.cost_per_step[unit]
            shown = np.isfinite(values).all(axis=0)  # no training loss before the first step
            steps, values = steps[shown], values[:, shown]
            mean = values.mean(axis=0)
            sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
            label = _label(outcome)
            ends.append(steps[-1])
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
        if ends and max(ends) > 10 * min(ends):  # the short ones would be a line at the left edge
            axis.set_xscale("log", nonpositive="mask")
        axis.set(xlabel=_UNITS[unit], title=title)
    _add_legend(figure, axes[-1], "lower right" if score.larger_is_better else "best")
    return figure


def sensitivity(comparison: Comparison) -> Figure:
    """The selection metric that each tried value reached, averaged over tuning seeds.

    A panel for the main hyperparameter of each optimizer, and one for each further one that any
    of them tunes, with the best values of all others.
    """
    further = dict.fromkeys(
        name
        for outcome in comparison.outcomes
        for stage in outcome.tuned.stages
        for name in stage.others
    )
    mains = dict.fromkeys(o.tuned.hyperparameter for o in comparison.outcomes)
    mains.pop(None, None)
    panels = 1 + len(further)
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.5 if panels == 1 else 4.2 * columns, 3.8 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for unused in axes[panels:]:
        unused.remove()
    general = "learning rate (or what the method tunes)"
    _draw_sensitivity(comparison, axes[0], None, str(*mains) if further and len(mains) == 1
                      else general)  # fmt: skip
    for axis, name in zip(axes[1:panels], further, strict=True):
        _draw_sensitivity(comparison, axis, name, name)
    for axis in axes[:panels:columns]:
        axis.set_ylabel(f"best {comparison.config.tuning.select_by.replace('_', ' ')}")
    title = f"{comparison.problem}: sensitivity"
    if panels == 1:
        axes[0].set_title(title)
    else:
        figure.suptitle(title + (", the others at their best" if _is_grid(comparison) else ""))
    _add_legend(figure, axes[0], "best")
    return figure


def _is_grid(comparison: Comparison) -> bool:
    return not comparison.config.tuning.draws_points


def _draw_sensitivity(comparison: Comparison, axis: Axes, name: str | None, xlabel: str) -> None:
    """One panel: of the main hyperparameters, or of the further one of that name."""
    select_by, score = comparison.config.tuning.select_by, comparison.score
    sign, lowest = score.sign(select_by), np.inf
    shown: dict[int, dict[Any, float]] = {}  # number of the optimizer -> value -> reached
    best: dict[int, Any] = {}
    mains: dict[int, str] = {}
    scattered = set()  # random points in several dimensions, no two of which share a value
    for index, outcome in enumerate(comparison.outcomes):
        stage = next((s for s in outcome.tuned.stages if s.name == "tuning"), None)
        if stage is None or (name is not None and name not in stage.others):
            continue
        number = 0 if name is None else 1 + list(stage.others).index(name)
        found = tuning.scores(stage, select_by, score, number)
        mains[index] = outcome.tuned.hyperparameter or ""
        shown[index] = {v: sign * s for v, s in found.items() if np.isfinite(s)}
        if stage.others and not _is_grid(comparison):
            scattered.add(index)
        if chosen := tuple(outcome.tuned.chosen.values()):
            best[index] = chosen[number]
    values = [value for found in shown.values() for value in found]
    are_numbers = all(map(search_space.is_number, values))
    for index, found in shown.items():
        line, label = look(index), _text(comparison.outcomes[index].config.label)
        if index in scattered:
            line["linestyle"] = "none"
        points = sorted(found.items()) if are_numbers else [*found.items()]
        ticks = [v if are_numbers else search_space.text(v) for v, _ in points]
        if points:
            lowest = min(lowest, *found.values())
            reached = [y for _, y in points]
            axis.plot(ticks, reached, marker="o", markersize=4, label=label, **line)
        if index in best:
            x = best[index] if are_numbers else search_space.text(best[index])
            axis.plot(x, found[best[index]], "o", markersize=10, fillstyle="none",
                      color=line["color"])  # fmt: skip
    is_linear = any(
        isinstance(dimension, search_space.Interval) and dimension.scale == "linear"
        for index in shown
        for dimension in [comparison.outcomes[index].config.space.get(name or mains[index])]
    )
    if are_numbers and not is_linear and _is_logarithmic(values, 1.0 if name is None else 10.0):
        axis.set_xscale("log")
    if sign < 0 <= lowest:
        axis.set_yscale("log")
    axis.set_xlabel(xlabel)


def _is_logarithmic(values: list[Any], factor: float) -> bool:
    """Whether numbers are shown by their logarithm: positive ones over such a factor or more."""
    return min(values, default=1) > 0 and max(values, default=1) >= factor * min(values, default=1)


def robustness_figure(comparison: Comparison) -> Figure:
    """Over which factor of the rate the performance is within x % of the best."""
    figure = Figure(figsize=(5.5, 3.8))
    axis: Axes = figure.subplots()
    for index, outcome in enumerate(comparison.outcomes):
        found = comparison.sensitivity(outcome)
        if found is None:
            continue
        factors = [found.within(tolerance).factor for tolerance in _TOLERANCES]
        axis.plot(100 * _TOLERANCES, factors, label=_text(outcome.config.label), **look(index))
        for tolerance in robustness.TOLERANCES:
            good = found.within(tolerance)
            axis.plot(100 * tolerance, good.factor, "o", markersize=5, color=look(index)["color"],
                      fillstyle="none" if good.at_edge else "full")  # fmt: skip
    axis.set_yscale("log")
    axis.set(
        xlabel="performance within x % of the best",
        ylabel="over a factor of the learning rate",
        title=f"{comparison.problem}: robustness\n"
        "open circles: to the edge of what was tried, or wider",
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


def _label(outcome: Outcome) -> str:
    chosen, label = outcome.tuned.chosen, _text(outcome.config.label)
    return f"{label} ({search_space.text_of(chosen)})" if chosen else label


def _text(label: str) -> str:
    """The label as plain text: no formula between dollars, not hidden by a leading underscore."""
    hidden = label.startswith("_")
    return ("\u200b" if hidden else "") + label.replace("$", r"\$")

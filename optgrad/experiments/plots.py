"""Pictures of a comparison: training curves over seeds, sensitivity to hyperparameters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optgrad.experiments import robustness, search_space, tuning
from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.engine import History
from optgrad.experiments.features import MONITOR
from optgrad.experiments.profiles import Profiles
from optgrad.experiments.scores import Score

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


class Band(NamedTuple):
    """A mean and its spread, at the places where it is known."""

    places: npt.NDArray[Any]  # [P]: steps, or values of what was tuned; increasing if numbers
    mean: npt.NDArray[np.float64]  # [P]
    sd: npt.NDArray[np.float64]  # [P], of a sample; 0 of a single run
    runs: int


def figures(comparison: Comparison, order: Sequence[str] = ()) -> dict[str, Figure]:
    """File stem -> figure, of `names`.

    Args:
      comparison: what to draw.
      order: labels, whose places in it are their colours; default: the comparison's.
    """
    order = order or labels(comparison)
    draw = {
        "sensitivity": sensitivity,
        "robustness": robustness_figure,
        "monitor": monitor_figure,
    }
    with mpl.rc_context(STYLE):
        drawn = {}
        for name in names(comparison):
            unit = name.removeprefix("curves").removeprefix("_") or comparison.units[0]
            maker = draw.get(name)
            drawn[name] = maker(comparison, order) if maker else curves(comparison, order, unit)
        return drawn


def labels(comparison: Comparison) -> list[str]:
    """Of its optimizers, in their order."""
    return [outcome.config.label for outcome in comparison.outcomes]


def was_tuned(comparison: Comparison) -> bool:
    """Whether there is a sensitivity to draw."""
    return any(outcome.tuned.hyperparameter for outcome in comparison.outcomes)


def names(comparison: Comparison) -> list[str]:
    """File stems of its pictures; those of the tuning only where something was tuned."""
    is_known = any(comparison.sensitivity(outcome) for outcome in comparison.outcomes)
    return [
        "curves",
        *(f"curves_{unit}" for unit in comparison.units[1:]),
        *(["sensitivity"] if was_tuned(comparison) else []),
        *(["robustness"] if is_known else []),
        *(["monitor"] if _monitored(comparison) else []),
    ]


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


def curves(comparison: Comparison, order: Sequence[str] = (), unit: str = "steps") -> Figure:
    """Training loss, test loss and the score: mean ± one standard deviation over seeds.

    Args:
      comparison: what is shown.
      order: as of `figures`.
      unit: over what, one of its ``units``.
    """
    score, order = comparison.score, order or labels(comparison)
    panels = {"train_loss": "training loss", "test_loss": "test loss", score.name: score.title}
    figure = Figure(figsize=(11 * len(panels) / 3, 3.6))
    figure.suptitle(f"{_text(comparison.problem)}: mean ± sd over seeds")
    axes = figure.subplots(1, len(panels))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        lowest_start, lowest = np.inf, np.inf
        ends = []
        for outcome in comparison.outcomes:
            final = outcome.tuned.final
            drawn = band(final.history, metric) if final else None
            if drawn is None:
                continue
            steps, mean, sd, _ = drawn
            steps = steps * outcome.cost_per_step[unit]
            line = look(order.index(outcome.config.label))
            ends.append(steps[-1])
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
        if ends and max(ends) > 10 * min(ends):  # the short ones would be a line at the left edge
            axis.set_xscale("log", nonpositive="mask")
        axis.set(xlabel=_UNITS[unit], title=title)
    _add_legend(figure, axes[-1], "lower right" if score.larger_is_better else "best")
    return figure


def tried(outcome: Outcome, select_by: str, score: Score, number: int = 0) -> Band | None:
    """What each tried value reached by the metric that selects, over seeds; None if none did.

    A value that diverged with any seed is left out; of several hyperparameters it is that of the
    best values of the others.

    Args:
      outcome: of one optimizer.
      select_by: the metric.
      score: of the problem.
      number: which of the tuned hyperparameters, 0 for the main one.
    """
    stage = next((s for s in outcome.tuned.stages if s.name == "tuning"), None)
    if stage is None or number > len(stage.others):
        return None
    by_seed = tuning.scores_by_seed(stage, select_by, score, number)
    found = {value: reached for value, reached in by_seed.items() if np.isfinite(reached).all()}
    if not found:
        return None
    values = list(found)
    if are_numbers := all(map(search_space.is_number, values)):
        values.sort()
    reached = np.stack([found[value] for value in values], axis=1)
    places = np.array(values, float if are_numbers else object)
    return _band(places, score.sign(select_by) * reached)


def sensitivity(comparison: Comparison, order: Sequence[str] = ()) -> Figure:
    """The selection metric that each tried value reached: mean ± sd over tuning seeds.

    A panel for the main hyperparameter of each optimizer, and one for each further one that any
    of them tunes, with the best values of all others.
    """
    order = order or labels(comparison)
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
    main = str(*mains) if further and len(mains) == 1 else general
    for axis, name in zip(axes[:panels], (None, *further), strict=True):
        _draw_sensitivity(comparison, axis, order, name)
        axis.set_xlabel(name or main)
    for axis in axes[:panels:columns]:
        axis.set_ylabel(f"best {comparison.config.tuning.select_by.replace('_', ' ')}")
    title = f"{_text(comparison.problem)}: sensitivity"
    if panels == 1:
        axes[0].set_title(title)
    else:
        figure.suptitle(title + (", the others at their best" if _is_grid(comparison) else ""))
    _add_legend(figure, axes[0], "best")
    return figure


def _is_grid(comparison: Comparison) -> bool:
    return not comparison.config.tuning.draws_points


def _draw_sensitivity(
    comparison: Comparison, axis: Axes, order: Sequence[str], name: str | None
) -> None:
    """One panel: of the main hyperparameters, or of the further one of that name."""
    select_by, score = comparison.config.tuning.select_by, comparison.score
    drawn = []
    for outcome in comparison.outcomes:
        further = list(outcome.tuned.stages[-1].others)
        if name is not None and name not in further:
            continue
        number = 0 if name is None else 1 + further.index(name)
        if (found := tried(outcome, select_by, score, number)) is not None:
            drawn.append((outcome, number, found))
    values = [value for _, _, found in drawn for value in found.places.tolist()]
    are_numbers = all(map(search_space.is_number, values))
    for outcome, number, (places, mean, sd, _) in drawn:
        line = look(order.index(outcome.config.label))
        # Random points in several dimensions, no two of which share a value, make no curve.
        scattered = bool(outcome.tuned.others) and not _is_grid(comparison)
        ticks = places if are_numbers else [search_space.text(v) for v in places]
        style = line | ({"linestyle": "none"} if scattered else {})
        label = _text(outcome.config.label)
        axis.plot(ticks, mean, marker="o", markersize=4, label=label, **style)
        if not scattered:
            axis.fill_between(ticks, mean - sd, mean + sd, color=line["color"], alpha=0.2)
        if chosen := tuple(outcome.tuned.chosen.values()):
            at = places.tolist().index(chosen[number])
            axis.plot(ticks[at], mean[at], "o", markersize=10, fillstyle="none",
                      color=line["color"])  # fmt: skip
    spaces = [o.config.space.get(name or o.tuned.hyperparameter or "") for o, _, _ in drawn]
    is_linear = any(isinstance(x, search_space.Interval) and x.scale == "linear" for x in spaces)
    if are_numbers and not is_linear and _is_logarithmic(values, 1.0 if name is None else 10.0):
        axis.set_xscale("log")
    lowest = min((found.mean.min() for _, _, found in drawn), default=np.inf)
    if score.sign(select_by) < 0 <= lowest:
        axis.set_yscale("log")


def _is_logarithmic(values: list[Any], factor: float) -> bool:
    """Whether numbers are shown by their logarithm: positive ones over such a factor or more."""
    return min(values, default=1) > 0 and max(values, default=1) >= factor * min(values, default=1)


def robustness_figure(comparison: Comparison, order: Sequence[str] = ()) -> Figure:
    """Over which factor of the rate the performance is within x % of the best."""
    order = order or labels(comparison)
    figure = Figure(figsize=(5.5, 3.8))
    axis: Axes = figure.subplots()
    for outcome in comparison.outcomes:
        found = comparison.sensitivity(outcome)
        if found is None:
            continue
        line = look(order.index(outcome.config.label))
        factors = [found.within(tolerance).factor for tolerance in _TOLERANCES]
        axis.plot(100 * _TOLERANCES, factors, label=_text(outcome.config.label), **line)
        for tolerance in robustness.TOLERANCES:
            good = found.within(tolerance)
            axis.plot(100 * tolerance, good.factor, "o", markersize=5, color=line["color"],
                      fillstyle="none" if good.at_edge else "full")  # fmt: skip
    axis.set_yscale("log")
    axis.set(
        xlabel="performance within x % of the best",
        ylabel="over a factor of the learning rate",
        title=f"{_text(comparison.problem)}: robustness\n"
        "open circles: to the edge of what was tried, or wider",
    )
    _add_legend(figure, axis, "best")
    return figure


def _monitored(comparison: Comparison) -> list[str]:
    """Quantities that any optimizer's final runs have a record of, other than zeros."""
    finals = [outcome.tuned.final for outcome in comparison.outcomes]
    columns = [pair for final in finals if final for pair in final.history.metrics.items()]
    found = dict.fromkeys(
        name.removeprefix(MONITOR).removesuffix("/median")
        for name, values in columns
        if name.startswith(MONITOR) and name.endswith("/median") and np.nan_to_num(values).any()
    )
    return [*found]


def monitor_figure(comparison: Comparison, order: Sequence[str] = ()) -> Figure:
    """What the methods model: medians over the parameters, and all but 5 % at either end.

    Over the steps of an evaluation interval and over seeds, the mean of each.
    """
    order, names = order or labels(comparison), _monitored(comparison)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.7 * columns + 2.0, 2.8 * rows))
    figure.suptitle(f"{_text(comparison.problem)}: median, 5 % and 95 % of the parameters")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[len(names) :]:
        unused.remove()
    shown: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=False):
        least = np.inf
        for outcome in comparison.outcomes:
            final = outcome.tuned.final
            if final is None or f"{MONITOR}{name}/median" not in final.history.metrics:
                continue
            low, median, high = (
                band(final.history, f"{MONITOR}{name}/{key}") for key in ("low", "median", "high")
            )
            if low is None or median is None or high is None or not len(median.places):
                continue
            line = look(order.index(outcome.config.label))
            shown[_label(outcome)] = axis.plot(median.places, median.mean, **line)[0]
            axis.fill_between(
                median.places, low.mean, high.mean, color=line["color"], alpha=0.15, linewidth=0
            )
            least = min(least, median.mean.min())
        if 0 < least < np.inf:
            axis.set_yscale("log", nonpositive="clip")
        axis.set(title=_text(name.replace("_", " ")), xlabel="step")
    figure.legend([*shown.values()], [*shown], loc="outside right upper")
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


def _label(outcome: Outcome) -> str:
    chosen, label = outcome.tuned.chosen, _text(outcome.config.label)
    return f"{label} ({search_space.text_of(chosen)})" if chosen else label


def _text(label: str) -> str:
    """The label as plain text: no formula between dollars, not hidden by a leading underscore."""
    hidden = label.startswith("_")
    return ("\u200b" if hidden else "") + label.replace("$", r"\$")

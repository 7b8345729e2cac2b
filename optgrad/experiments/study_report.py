"""The parts of a report that say what was tuned over, with which budget, and how robust it is."""

from collections.abc import Sequence
from typing import NamedTuple

from optgrad.experiments import robustness, search_space
from optgrad.experiments.compare import Comparison
from optgrad.experiments.config import CompareConfig


class Section(NamedTuple):
    """A table under a title, and what is to be said of it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str


def sections(comparison: Comparison) -> list[Section]:
    """Robustness and budget, where there is something to say."""
    found = (_robustness(comparison), _lengths(comparison))
    return [section for section in found if section is not None]


def budget(config: CompareConfig) -> str:
    """What each run was given."""
    return {
        "steps": f"{config.steps} steps",
        "gradient_evaluations": f"{config.steps} gradient evaluations",
        "seconds": f"as many steps as fit into {config.budget_seconds} s of training, each",
    }[config.budget]


def _lengths(comparison: Comparison) -> Section | None:
    """How many steps each optimizer took, where that is not the same for all or was measured."""
    config = comparison.config
    if config.budget == "steps" and not config.measure_seconds:
        return None
    rows = []
    for record in comparison.summary():
        steps, cost = record["steps"], record["gradient_evaluations_per_step"]
        seconds = record["seconds_per_step"]
        rows.append([
            record["optimizer"],
            "–" if steps is None else str(steps),
            f"{cost:.4g}",
            "–" if steps is None else f"{cost * steps:.5g}",
            "–" if seconds is None else f"{1000 * seconds:.4g}",
            "–" if seconds is None or steps is None else f"{seconds * steps:.4g}",
        ])  # fmt: skip
    header = (
        "optimizer", "steps of a run", "gradient evaluations per step", "gradient evaluations",
        "ms per step", "seconds",
    )  # fmt: skip
    text = "The cost of a step in gradient evaluations is the nominal one of the registry."
    if config.budget == "seconds" or config.measure_seconds:
        text += (
            " Seconds are those of the training steps of a lone run without evaluation, measured "
            "once per optimizer, after compiling, and kept in the study's journal: resumed, it "
            "takes as many steps as it would have; repeated, they are measured anew."
        )
    return Section("Budget", header, rows, text)


def _robustness(comparison: Comparison) -> Section | None:
    """Over which factor of the rate each optimizer is within x % of its best."""
    found = {o.config.label: comparison.sensitivity(o) for o in comparison.outcomes}
    if not any(found.values()):
        return None
    rows = []
    for outcome in comparison.outcomes:
        curve = found[outcome.config.label]
        cells = ["–"] * len(robustness.TOLERANCES)
        if curve is not None:
            ranges = [curve.within(tolerance) for tolerance in robustness.TOLERANCES]
            cells = [f"{r.factor:.3g}" + (" (edge)" if r.at_edge else "") for r in ranges]
        rows.append([outcome.config.label, outcome.tuned.hyperparameter or "–", *cells])
    percents = [f"within {100 * tolerance:g} %" for tolerance in robustness.TOLERANCES]
    select_by = comparison.config.tuning.select_by.replace("_", " ")
    return Section(
        "Robustness",
        ("optimizer", "hyperparameter", *percents),
        rows,
        f"Over which factor of the main hyperparameter the best {select_by} stays within some "
        "percent of the best of all, without a gap around it, interpolated linearly in the "
        "logarithm of the value, the others at their best. (edge): to the last value tried, so "
        "that it may be wider.",
    )


def spaces(comparison: Comparison) -> list[str]:
    """What was tuned over, where that was said, as Markdown."""
    config = comparison.config
    lines = []
    for optimizer in config.optimizers:
        parts = []
        for name, dimension in optimizer.space.items():
            if isinstance(dimension, search_space.Interval):
                ends = f"[{dimension.low:g}, {dimension.high:g}]"
                parts.append(f"{name} in {ends} ({dimension.scale})")
            else:
                parts.append(f"{name} of {', '.join(map(search_space.text, dimension))}")
        if parts:
            number = len(config.points(optimizer))
            lines.append(
                f"- {optimizer.label}: {'; '.join(parts)}: {number} points with "
                f"{config.tuning.seeds} seed(s) each"
            )
    return ["", "Search spaces; the final seeds are others:", "", *lines, ""] if lines else []

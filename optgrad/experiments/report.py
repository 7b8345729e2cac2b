"""The comparison in words and tables, as Markdown."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optgrad.experiments import plots, search_space, statistics, study_report
from optgrad.experiments.compare import Comparison
from optgrad.experiments.scores import Score
from optgrad.experiments.tuning import Stage


def table(comparison: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of the summary, formatted."""
    score = comparison.score
    columns = {
        score.name: (score.heading, score.text),
        **{name: (text, _loss_text(score)) for name, text in _LOSSES.items() if name != score.name},
    }
    unit, defaults = comparison.config.budget, comparison.config.published_defaults
    header = (
        "optimizer", "best rate", *(heading for heading, _ in columns.values()),
        *(["at published defaults"] if defaults else []),
        f"{unit.replace('_', ' ')} to target", "seeds",
    )  # fmt: skip
    rows = [
        [
            record["optimizer"],
            _rate(record),
            *(mean_sd(record, name, text) for name, (_, text) in columns.items()),
            *([mean_sd(record, f"published_{score.name}", score.text)] if defaults else []),
            "–" if record[f"{unit}_to_target"] is None else f"{record[f'{unit}_to_target']:.5g}",
            _seeds(record),
        ]
        for record in comparison.summary()
    ]
    return header, rows


_LOSSES = {"test_loss": "test loss", "train_loss": "training loss"}


def _loss_text(score: Score) -> Callable[[float], str]:
    """Beside an accuracy losses are of order one; where they are the score, of any."""
    return "{:.4f}".format if score.in_percent else score.text


def _rate(record: Mapping[str, Any]) -> str:
    if not record["tuned"]:
        return "not tuned"
    if record["best"] is None:
        return "none stable"
    chosen = search_space.text_of({record["tuned"]: record["best"], **record["others"]})
    return chosen + (" (edge)" if record["at_edge"] else "")


def _seeds(record: Mapping[str, Any]) -> str:
    diverged = f" ({record['diverged']} diverged)" if record["diverged"] else ""
    return f"{record['seeds']}{diverged}"


def mean_sd(record: Mapping[str, Any], name: str, text: Callable[[float], str]) -> str:
    """``mean ± sd`` of a summary's metric; a dash where there is none."""
    mean, sd = record[f"{name}_mean"], record[f"{name}_sd"]
    if mean is None:
        return "–"
    return text(mean) + ("" if sd is None else f" ± {text(sd)}")


def markdown(comparison: Comparison, environment: Mapping[str, str]) -> str:
    """The report: table, pictures, what was done, with what."""
    lines = [f"# {title(comparison)}", "", *section(comparison, environment)]
    lines += ["Repeat it, in this folder (with --data-dir if need be):", "", "```"]
    lines += [_command(), "```", ""]
    return without_html(lines)


def title(comparison: Comparison) -> str:
    """Of its report."""
    return f"{comparison.problem}: {len(comparison.outcomes)} optimizers compared"


def section(
    comparison: Comparison, environment: Mapping[str, str], pictures: str = "", level: str = "##"
) -> list[str]:
    """All that is said of one comparison, in lines of Markdown.

    Args:
      comparison: of what.
      environment: with which it was measured.
      pictures: what the names of the pictures' files begin with.
      level: of the headings.
    """
    lines = [markdown_table(*table(comparison)), "", explanation(comparison), ""]
    if text := surroundings(comparison):
        lines += [text, ""]
    for name in plots.names(comparison):
        lines += [f"![{name.replace('_', ' ')}]({pictures}{name}.svg)", ""]
    lines += [f"{level} Who is ahead", "", verdict(comparison), ""]
    if comparison.ranking().differences:
        lines += [markdown_table(*rivals(comparison)), "", statistics.RULE, ""]
    lines += [
        "Medians over seeds, with their bootstrap intervals (level 0.95):",
        "",
        markdown_table(*medians(comparison)),
    ]
    lines += ["", f"{level} How the rates were chosen", "", *protocol(comparison), ""]
    for part in study_report.sections(comparison):
        lines += [f"{level} {part.title}", "", markdown_table(part.header, part.rows), ""]
        lines += [part.text, ""]
    lines += [f"{level} Cost", "", *(f"- {line}" for line in costs(comparison)), ""]
    lines += [f"{level} Environment", ""]
    return [*lines, *(f"- {name}: {value}" for name, value in environment.items()), ""]


def explanation(comparison: Comparison) -> str:
    """What the numbers of the table are."""
    config, score = comparison.config, comparison.score
    unit = config.budget.replace("_", " ")
    every = "gradient evaluations" if config.budget == "gradient_evaluations" else "steps"
    return (
        f"Mean ± standard deviation over seeds, after {study_report.budget(config)} of batch size "
        f"{config.batch_size}. {unit.capitalize()} to target: median over seeds of the first "
        f"evaluation (every {config.eval_every} {every}) with a {score.title} of at "
        f"{'least' if score.larger_is_better else 'most'} {score.text(comparison.target)}"
        f"{' %' if score.in_percent else ''}; a dash where most seeds never reach it. "
        "Training loss: mean over the minibatches since the last evaluation"
        + (", with the L2 term." if config.l2 else ".")
    )


def costs(comparison: Comparison) -> list[str]:
    """What each optimizer took."""
    return [
        f"{outcome.config.label}: {outcome.seconds:.1f} s of training and evaluation in "
        f"{sum(len(s.seeds) for s in outcome.stages)} runs, "
        f"{outcome.compilations} compilation(s) of the training step, "
        f"{outcome.compile_seconds:.1f} s of compiling"
        + "".join(f"; {note}" for note in outcome.notes)
        for outcome in comparison.outcomes
    ]


def surroundings(comparison: Comparison) -> str:
    """What surrounded the optimizers, and what the numbers are therefore of."""
    config = comparison.config
    schedule = config.schedule
    said = {
        f"The rate is the peak of a schedule ({schedule.kind}, {schedule.warmup} updates of linear "
        "warm-up).": not schedule.is_constant,
        f"Decoupled weight decay of {config.weight_decay:g}.": config.weight_decay,
        f"Every update takes the gradients of {config.accumulate} steps.": config.accumulate > 1,
        f"Label smoothing of {config.label_smoothing:g} in the training loss.": (
            config.label_smoothing
        ),
        "Trained in bfloat16, with float32 parameters.": config.precision == "bfloat16",
        f"Evaluated is the moving average of the parameters (decay {config.ema:g}).": config.ema,
        "Updates that are not finite are left out; a run has diverged when "
        f"{config.guard} in a row are.": config.guard,
    }
    return " ".join(text for text, holds in said.items() if holds)


def verdict(comparison: Comparison) -> str:
    """Which optimizer is called the winner, or why none is."""
    ranking, score = comparison.ranking(), comparison.score
    if not ranking.differences:
        return "There are no two optimizers with finite results."
    best = ranking.order[0]
    if ranking.winner:
        found = f"{best} is the winner."
    else:
        alike = [d.label for d in ranking.differences if not d.p < 1.0 - statistics.LEVEL]
        found = f"{best} has the best mean, and no winner is called"
        found += f": it is not told apart from {', '.join(alike)}." if alike else "."
    unit = ", in percentage points" if score.in_percent else ""
    return f"By the {score.title} after the last step{unit}. {found}"


def rivals(comparison: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows: the best beside each other optimizer, over their common seeds."""
    ranking, score = comparison.ranking(), comparison.score
    header = (
        "rival", f"{ranking.order[0]} is better by", "95 % interval", "p (Holm)", "common seeds"
    )  # fmt: skip
    rows = [
        [
            d.label,
            score.text(d.mean),
            f"{score.text(d.low)} … {score.text(d.high)}"
            if d.seeds >= statistics.MIN_SEEDS
            else "–",
            f"{d.p:.3g}" if d.seeds >= statistics.MIN_SEEDS else "–",
            str(d.seeds),
        ]
        for d in ranking.differences
    ]
    return header, rows


def medians(comparison: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows: the median of the score and its bootstrap interval."""
    score = comparison.score
    keys = [f"{score.name}_median{end}" for end in ("", "_low", "_high")]
    header = ("optimizer", f"median {score.heading}", "from", "to", "runs that count")
    rows = [
        [
            record["optimizer"],
            *("–" if record[key] is None else score.text(record[key]) for key in keys),
            str(record["seeds"] - record["diverged"]),
        ]
        for record in comparison.summary()
    ]
    return header, rows


def protocol(comparison: Comparison) -> list[str]:
    """How the tuned values were chosen, in sentences."""
    tuning = comparison.config.tuning
    lines = []
    if tuning.protocol == "search":
        lines.append(
            "The largest stable value was searched from the top of the method's range (stable: "
            f"over {comparison.config.eval_every} steps the loss stays below that at the start), "
            f"then {tuning.decades:g} decades below it were searched at 6, 3, 1 × 10^m with "
            f"{tuning.seeds} seed(s) (Balles & Hennig, appendix A.2). The final seeds are others."
        )
    elif tuning.protocol == "grid" and not all(o.space for o in comparison.config.optimizers):
        lines.append("Every value of the grid was trained with every seed.")
    elif tuning.draws_points:
        how = "independently at random" if tuning.protocol == "random" else "from a Halton sequence"
        lines.append(
            f"{tuning.samples} points were drawn {how} (seed {tuning.sample_seed}) and trained "
            f"with {tuning.seeds} seed(s) each. The final seeds are others."
        )
    lines += study_report.spaces(comparison)
    if tuning.protocol != "none":
        lines.append(f"Chosen by the best {tuning.select_by.replace('_', ' ')} reached.")
        if tuning.select_by.startswith("test") and not comparison.score.is_exact:
            lines.append("Chosen on the test set: the final numbers are optimistic.")
    if any(o.tuned.hyperparameter and o.tuned.at_edge for o in comparison.outcomes):
        lines.append("(edge): the best value is the last one tried; a better one may lie beyond.")
    for outcome in comparison.outcomes:
        diverged = [
            f"{_point_text(stage, point)} (step {at})"
            for stage in outcome.stages
            for point, at in zip(stage.points, stage.history.diverged_at, strict=True)
            if at
        ]
        if diverged:
            lines.append(f"{outcome.config.label} diverged at: {', '.join(diverged)}.")
    return lines or ["Nothing was tuned."]


def _point_text(stage: Stage, point: Sequence[Any]) -> str:
    if stage.name == "published":
        return "the published defaults"
    return search_space.text_of(dict(zip(("", *stage.others), point, strict=True)))


def _command() -> str:
    return shlex.join(["optgrad", "compare", "--config", "config.toml"])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table in Markdown; a bar within a cell is escaped.

    Examples:
      >>> print(markdown_table(["a|b"], [["1"]]))
      | a\|b |
      | --- |
      | 1 |
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [escaped[0], ["---"] * len(header), *escaped[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def without_html(lines: Sequence[str]) -> str:
    """The lines as a text in which nothing is HTML, whatever problems and optimizers are called."""
    return "\n".join(lines).replace("<", "&lt;")

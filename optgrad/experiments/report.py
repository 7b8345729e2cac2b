"""The comparison in words and tables, as Markdown."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optgrad.experiments import statistics
from optgrad.experiments.compare import Comparison
from optgrad.experiments.scores import Score


def table(comparison: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of the summary, formatted."""
    score = comparison.score
    columns = {
        score.name: (score.heading, score.text),
        **{name: (text, _loss_text(score)) for name, text in _LOSSES.items() if name != score.name},
    }
    header = (
        "optimizer", "best rate", *(heading for heading, _ in columns.values()), "steps to target",
        "seeds",
    )  # fmt: skip
    rows = [
        [
            record["optimizer"],
            _rate(record),
            *(mean_sd(record, name, text) for name, (_, text) in columns.items()),
            "–" if record["steps_to_target"] is None else f"{record['steps_to_target']:g}",
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
    return f"{record['best']:g}" + (" (edge)" if record["at_edge"] else "")


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
    config, score = comparison.config, comparison.score
    header, rows = table(comparison)
    lines = [
        f"# {comparison.problem}: {len(rows)} optimizers compared",
        "",
        markdown_table(header, rows),
        "",
        f"Mean ± standard deviation over seeds, after {config.steps} steps of batch size "
        f"{config.batch_size}. Steps to target: median over seeds of the first evaluation (every "
        f"{config.eval_every} steps) with a {score.title} of at "
        f"{'least' if score.larger_is_better else 'most'} {score.text(comparison.target)}"
        f"{' %' if score.in_percent else ''}; a dash where most seeds never reach it. "
        "Training loss: mean over the minibatches since the last evaluation"
        + (", with the L2 term." if config.l2 else "."),
        *_surroundings(comparison),
        "",
        "![curves](curves.svg)",
        "",
    ]
    if any(outcome.tuned.hyperparameter for outcome in comparison.outcomes):
        lines += ["![sensitivity](sensitivity.svg)", ""]
    lines += ["## Who is ahead", "", *_who_is_ahead(comparison), ""]
    lines += ["## How the rates were chosen", "", *_protocol(comparison), ""]
    lines += ["## Cost", ""]
    lines += [
        f"- {outcome.config.label}: {outcome.seconds:.1f} s of training and evaluation in "
        f"{sum(len(s.seeds) for s in outcome.tuned.stages)} runs, "
        f"{outcome.compilations} compilation(s) of the training step, "
        f"{outcome.compile_seconds:.1f} s of compiling"
        + "".join(f"; {note}" for note in outcome.notes)
        for outcome in comparison.outcomes
    ]
    lines += ["", "## Environment", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines += ["", "Repeat it, in this folder (with --data-dir if need be):", "", "```"]
    lines += [_command(), "```", ""]
    return "\n".join(lines)


def _surroundings(comparison: Comparison) -> list[str]:
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
    }
    text = " ".join(text for text, holds in said.items() if holds)
    return ["", text] if text else []


def _who_is_ahead(comparison: Comparison) -> list[str]:
    """The best beside each other optimizer, and whether it is called the winner."""
    ranking, score = comparison.ranking(), comparison.score
    if not ranking.differences:
        return ["There are no two optimizers with finite results."]
    best = ranking.order[0]
    if ranking.winner:
        verdict = f"**{best} is the winner.**"
    else:
        alike = [d.label for d in ranking.differences if not d.p < 1.0 - statistics.LEVEL]
        verdict = f"{best} has the best mean, and **no winner is called**"
        verdict += f": it is not told apart from {', '.join(alike)}." if alike else "."
    header = ("rival", f"{best} is better by", "95 % interval", "p (Holm)", "common seeds")
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
    unit = ", in percentage points" if score.in_percent else ""
    return [
        f"By the {score.title} after the last step{unit}. {verdict}",
        "",
        markdown_table(header, rows),
        "",
        statistics.RULE,
    ]


def _protocol(comparison: Comparison) -> list[str]:
    tuning = comparison.config.tuning
    lines = []
    if tuning.protocol == "search":
        lines.append(
            "The largest stable value was searched from the top of the method's range (stable: "
            f"over {comparison.config.eval_every} steps the loss stays below that at the start), "
            f"then {tuning.decades:g} decades below it were searched at 6, 3, 1 × 10^m with "
            f"{tuning.seeds} seed(s) (Balles & Hennig, appendix A.2). The final seeds are others."
        )
    elif tuning.protocol == "grid":
        lines.append("Every value of the grid was trained with every seed.")
    if tuning.protocol != "none":
        lines.append(f"Chosen by the best {tuning.select_by.replace('_', ' ')} reached.")
        if tuning.select_by.startswith("test") and not comparison.score.is_exact:
            lines.append("**Chosen on the test set: the final numbers are optimistic.**")
    if any(o.tuned.hyperparameter and o.tuned.at_edge for o in comparison.outcomes):
        lines.append("(edge): the best value is the last one tried; a better one may lie beyond.")
    for outcome in comparison.outcomes:
        diverged = [
            f"{value:g} (step {at})"
            for stage in outcome.tuned.stages
            for value, at in zip(stage.values, stage.history.diverged_at, strict=True)
            if at
        ]
        if diverged:
            lines.append(f"{outcome.config.label} diverged at: {', '.join(diverged)}.")
    return lines or ["Nothing was tuned."]


def _command() -> str:
    return shlex.join(["optgrad", "compare", "--config", "config.toml"])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

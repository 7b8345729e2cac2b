"""One ingredient of `optgrad.auto` taken away or changed at a time.

    python benchmarks/auto_ablation.py --output docs/results/auto/ablation [--variants …]

The rule is that of `auto_rule`, which at its defaults is auto. On the quick problems of
`auto_problems.py`; writes report.md and ablation.csv, anew after each problem.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import auto_problems
import auto_rule
import numpy as np
from auto_problems import Difference, Quick, Row

from optgrad.experiments import gaps, problems, report, results

WHOLE = "auto"
AVERAGED = "evaluated at the mean position"


def constant(value: float) -> Any:
    """κ that does not depend on the step."""
    return lambda t: value


# What is changed -> arguments of the rule.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    WHOLE: {},
    "one step size for the whole tree": {"pool": "tree"},
    "one step size for each coordinate": {"pool": "coordinate"},
    "all coordinates count the same": {"weighted": False},
    "⟨d²⟩ of Gaussian noise": {"measured": False},
    "P of the step sizes as they were": {"as_they_were": True},
    "small tensors on their own": {"few": 0.0},
    "small tensors count from 3 entries": {"few": 3.0},
    "small tensors count from 30 entries": {"few": 30.0},
    "n is the number of all entries": {"effective": False},
    "C without S": {"fading": False},
    "κ = 1 (no search)": {"kappa": constant(1.0)},
    "κ = 1.5 (no annealing)": {"kappa": constant(1.5)},
    "κ = 0.7": {"kappa": constant(0.7)},
    "β_θ = 0.9": {"beta_position": 0.9},
    "raw second moment, as Adam": {"central": False},
    "look-ahead, as Nadam's": {"ahead": True},
    "β = 0, raw second moment": {"beta": 0.0, "central": False},
    "first step 0.0003 everywhere": {"initial_step": 3e-4, "relative": False},
    "variance adaptation γ, as M-SVAG's": {"adapted": True},
    "steps at most 0.03 of the tensor's size": {"cap": 0.03},
    "weight decay 0.01": {"weight_decay": 0.01},
    AVERAGED: {},
}


def measure(name: str, quick: Quick, variants: Sequence[str] = tuple(VARIANTS)) -> list[Row]:
    """A row for each variant: the score, and how far it is behind that of the whole rule."""
    problem = quick.build()
    chosen = dict.fromkeys((WHOLE, *variants))
    found = {variant: _result(variant, quick, problem) for variant in chosen}
    return [
        {"problem": name, "variant": variant}
        | auto_problems.numbers(result, found[WHOLE], problem.score)
        for variant, result in found.items()
    ]


def _result(variant: str, quick: Quick, problem: problems.Problem) -> gaps.Result:
    method = auto_rule.record(average=variant == AVERAGED)
    return auto_problems.train(quick, problem, method, [{}], **VARIANTS[variant])[0]


def table(rows: Sequence[Row]) -> str:
    """Final score of each variant on each problem, and how far it is behind, in percent."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    lines = []
    for variant in _variants(rows):
        chosen = [row for row in rows if row["variant"] == variant]
        cells = [f"{row['text']} ({_marked(row)})" for row in chosen]
        behind = [row["percent"] for row in chosen]
        ends = (auto_problems.percent(float(x)) for x in (np.mean(behind), max(behind)))
        lines.append([variant, *cells, *ends])
    return report.markdown_table(("variant", *names, "mean", "worst"), lines)


def _marked(row: Row) -> str:
    """The difference, bold where it is clear."""
    behind = Difference(row["percent"], row["error"])
    text = auto_problems.percent(row["percent"])
    return f"**{text}**" if behind.is_ahead or behind.is_behind else text


def sentences(rows: Sequence[Row]) -> list[str]:
    """Where each variant is clearly behind, or ahead."""
    found = []
    for variant in _variants(rows):
        chosen = [row for row in rows if row["variant"] == variant]
        differences = {row["problem"]: Difference(row["percent"], row["error"]) for row in chosen}
        behind = [name for name, d in differences.items() if d.is_behind]
        ahead = [name for name, d in differences.items() if d.is_ahead]
        if variant != WHOLE:
            found.append(
                f"- {variant}: clearly behind on {len(behind)} of {len(chosen)} problems"
                f"{_listed(behind)}, clearly ahead on {len(ahead)}{_listed(ahead)}."
            )
    return found


def _variants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def text_of(rows: Sequence[Row]) -> str:
    """The report, Markdown."""
    environment = results.describe_environment()
    seeds = {row["problem"]: row["seeds"] for row in rows}
    counts = ", ".join(f"{name} {number}" for name, number in seeds.items())
    return "\n".join([
        "# What each ingredient of auto does", "",
        "Written by `python benchmarks/auto_ablation.py`, revision "
        f"`{environment['revision']}`, jax {environment['jax']}; seeds: {counts}.", "",
        "One change at a time, nothing else adapted to it (P is, to β and β_θ). "
        "Final scores (test accuracy [%] for digits, test loss for logistic, embedding and "
        "attention, excess for the others, there the geometric mean), and in brackets how far they "
        "are behind the whole rule's in percent: points of accuracy, relative loss, or the share "
        "of the decades of the excess that is missing. Negative is ahead; bold is clear, by more "
        "than 1 % and two standard errors of the differences seed by seed. The quadratics and "
        "Rosenbrock's function have one tensor.", "",
        table(rows), "", *sentences(rows), "",
    ])  # fmt: skip


def write(rows: Sequence[Row], folder: Path) -> None:
    """Report and numbers."""
    auto_problems.write(rows, text_of(rows), folder, "ablation.csv")


if __name__ == "__main__":
    auto_problems.main(__doc__.splitlines()[0], measure, write, list(VARIANTS))

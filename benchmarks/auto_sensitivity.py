"""Each constant of `optgrad.auto` over two decades around its default, the others at theirs.

    python benchmarks/auto_sensitivity.py --output docs/results/auto/sensitivity

On the quick problems of `auto_problems.py`, each in one compiled program. Writes report.md,
sensitivity.csv and sensitivity.png, anew after each problem.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import auto_problems
import matplotlib as mpl
import numpy as np
from auto_problems import Difference, Quick, Row
from matplotlib.figure import Figure

import optgrad
from optgrad.experiments import plots, report, results

FACTORS = tuple(float(x) for x in np.logspace(-1, 1, 7))
# What is varied -> (argument of auto, whether it is 1 minus that, factors of its default).
CONSTANTS: Mapping[str, tuple[str, bool, Sequence[float]]] = {
    "search_steps": ("search_steps", False, FACTORS),
    "initial_step": ("initial_step", False, FACTORS),
    "adaptation": ("adaptation", False, FACTORS),
    "1 − beta_position": ("beta_position", True, FACTORS),
    "1 − beta": ("beta", True, (*FACTORS[:-1], 9.0)),  # β is 0.1 at the last, not 0
    "1 − beta_variance": ("beta_variance", True, FACTORS),
}
ARGUMENTS = tuple(argument for argument, *_ in CONSTANTS.values())


def defaults() -> dict[str, float]:
    """What `auto` takes if it is not told."""
    parameters = inspect.signature(optgrad.auto).parameters
    return {name: float(parameters[name].default) for name in ARGUMENTS}


def values_of(constant: str) -> list[tuple[float, dict[str, float]]]:
    """Pairs of its value and all of auto's constants, the default among them."""
    argument, is_rest, factors = CONSTANTS[constant]
    preset = defaults()
    middle = 1 - preset[argument] if is_rest else preset[argument]
    found = []
    for factor in factors:
        value = middle * factor
        setting = {**preset, argument: 1 - value if is_rest else value}
        found.append((value, preset if factor == 1.0 else setting))
    return found


def measure(name: str, quick: Quick) -> list[Row]:
    """A row for each constant and value: the score, and how far it is behind the default's."""
    problem = quick.build()
    points = [(constant, *point) for constant in CONSTANTS for point in values_of(constant)]
    settings = {tuple(setting.values()): setting for *_, setting in points}  # the default is shared
    method = optgrad.get_method("auto")
    trained = auto_problems.train(quick, problem, method, list(settings.values()))
    found = dict(zip(settings, trained, strict=True))
    reference = found[tuple(defaults().values())]
    return [
        {"problem": name, "constant": constant, "value": float(f"{value:.3g}")}
        | auto_problems.numbers(found[tuple(setting.values())], reference, problem.score)
        for constant, value, setting in points
    ]


def difference_of(row: Row) -> Difference:
    """That of its score and the default's."""
    return Difference(row["percent"], row["error"])


def rows_by_value(rows: Sequence[Row], constant: str) -> dict[float, list[Row]]:
    """Value of a constant -> its rows, one for each problem."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if row["constant"] == constant:
            found.setdefault(row["value"], []).append(row)
    return found


def run_around(values: Sequence[float], accepted: Sequence[bool], middle: int) -> Sequence[float]:
    """The accepted values that follow one another, on both sides of that in the middle.

    Examples:
      >>> run_around([1.0, 2.0, 3.0, 4.0], [True, False, True, True], 2)
      [3.0, 4.0]
    """
    first, last = middle, middle
    while first > 0 and accepted[first - 1]:
        first -= 1
    while last + 1 < len(values) and accepted[last + 1]:
        last += 1
    return values[first : last + 1]


def sentence(rows: Sequence[Row], constant: str) -> str:
    """What the numbers of one constant say."""
    by_value = rows_by_value(rows, constant)
    values = list(by_value)
    factors = CONSTANTS[constant][2]
    middle = min(range(len(values)), key=lambda i: abs(np.log(factors[i])))

    def span(accepts: Any) -> str:
        accepted = [all(accepts(row) for row in found) for found in by_value.values()]
        inside = run_around(values, accepted, middle)
        return f"{inside[0]:g} … {inside[-1]:g}"

    means = {v: float(np.mean([row["percent"] for row in found])) for v, found in by_value.items()}
    best = min(means, key=lambda v: (means[v], abs(np.log(v / values[middle]))))
    ahead = [
        f"{row['problem']} at {row['value']:g} ({auto_problems.percent(row['percent'])} %)"
        for name in dict.fromkeys(row["problem"] for row in rows)
        if (row := min((r for found in by_value.values() for r in found if r["problem"] == name),
                       key=lambda r: r["percent"])) and difference_of(row).is_ahead
    ]  # fmt: skip
    tail = f"Clearly better than the default: {', '.join(ahead)}." if ahead else (
        "No value is clearly better than the default on any problem.")  # fmt: skip
    return (
        f"**{constant}**, default {values[middle]:g}: within 1 % of it on every problem over "
        f"{span(lambda row: row['percent'] <= 1.0)}; within 1 % or two standard errors over "
        f"{span(lambda row: not difference_of(row).is_behind)}. In the mean over the problems the "
        f"best value is {best:g} ({auto_problems.percent(means[best])} %). {tail}"
    )


def table(rows: Sequence[Row], constant: str) -> str:
    """Final score of each value on each problem, how far it is behind, and over all problems."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    lines = []
    for value, found in rows_by_value(rows, constant).items():
        by_problem = {row["problem"]: row for row in found}
        behind = [row["percent"] for row in found]
        chosen = (by_problem[name] for name in names)
        cells = (f"{row['text']} ({auto_problems.percent(row['percent'])})" for row in chosen)
        ends = (auto_problems.percent(float(x)) for x in (np.mean(behind), max(behind)))
        lines.append([f"{value:g}", *cells, *ends])
    return report.markdown_table((constant, *names, "mean", "worst"), lines)


def figure(rows: Sequence[Row]) -> Figure:
    """A panel for each constant, a line for each problem: percent behind the default."""
    drawn = Figure(figsize=(11, 6))
    names = list(dict.fromkeys(row["problem"] for row in rows))
    axes = drawn.subplots(2, 3, sharey=True).ravel()
    for axis, constant in zip(axes, CONSTANTS, strict=True):
        for number, name in enumerate(names):
            chosen = [r for r in rows if (r["constant"], r["problem"]) == (constant, name)]
            axis.plot([r["value"] for r in chosen], [r["percent"] for r in chosen], marker="o",
                      markersize=3, label=name, **plots.look(number))  # fmt: skip
        axis.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_xlabel(constant)
    for axis in axes[::3]:
        axis.set_ylabel("behind the default [%]")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def text_of(rows: Sequence[Row]) -> str:
    """The report, Markdown."""
    environment = results.describe_environment()
    seeds = {row["problem"]: row["seeds"] for row in rows}
    counts = ", ".join(f"{name} {number}" for name, number in seeds.items())
    lines = [
        "# Sensitivity of auto to its own constants", "",
        "Written by `python benchmarks/auto_sensitivity.py`, revision "
        f"`{environment['revision']}`, jax {environment['jax']}; seeds: {counts}.", "",
        "Each constant by itself. Final scores (test accuracy [%] for digits, test loss for "
        "logistic, embedding and attention, excess for the others, there the geometric mean), and "
        "in brackets how far they are behind the default's in percent: points of accuracy, "
        "relative loss, or the share of the decades of the excess that is missing. Negative "
        "is ahead. \"Clearly\" is by more than 1 % and two standard errors of the differences seed "
        "by seed; the best of seven values and seven problems is ahead by luck, too.", "",
        *(f"- {sentence(rows, constant)}" for constant in CONSTANTS), "",
        "![sensitivity](sensitivity.png)", "",
    ]  # fmt: skip
    for constant in CONSTANTS:
        lines += [f"## {constant}", "", table(rows, constant), ""]
    return "\n".join(lines)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Report, numbers and picture."""
    auto_problems.write(rows, text_of(rows), folder, "sensitivity.csv")
    with mpl.rc_context(plots.STYLE):
        plots.save(figure(rows), folder / "sensitivity.png")


if __name__ == "__main__":
    auto_problems.main(__doc__.splitlines()[0], measure, write)

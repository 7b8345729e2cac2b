"""The gallery's report, as Markdown."""

import shlex
from collections.abc import Iterator

import optgrad
from optgrad.experiments.gallery import numbers as numbers_lib
from optgrad.experiments.gallery import page, pictures
from optgrad.experiments.gallery import places as places_lib
from optgrad.experiments.gallery.numbers import Numbers
from optgrad.experiments.gallery.places import Place
from optgrad.experiments.report import markdown_table


def markdown(numbers: Numbers) -> str:
    """How it was done, who reached what, and the pictures."""
    lines = ["# Gallery: every method on eight landscapes, tuned alike", ""]
    if numbers.settings == numbers_lib.QUICK:
        lines += ["**Quick mode: far too little for the numbers to mean anything.**", ""]
    lines += [
        f"{len(numbers.methods)} methods on {len(numbers.places)} functions of two variables. "
        "What helps in two dimensions need not help in a million: dense second-order methods are "
        "at their best here, and what is made for noise has little to do where there is none. "
        f"An interactive page with the same runs: [{page.NAME}]({page.NAME}).",
        "",
        "## How it was done",
        "",
        *(f"- {note}" for note in page.notes(numbers)),
        "",
        "## Overview",
        "",
        "![log₁₀ excess of all methods on all landscapes](overview.png)",
        "",
    ]
    for name in numbers.places:
        lines += _section(numbers, places_lib.places()[name])
    lines += ["## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in numbers.environment.items()]
    lines += ["", "Repeat it:", "", "```", _command(numbers), "```", ""]
    return "\n".join(lines)


def _section(numbers: Numbers, place: Place) -> Iterator[str]:
    yield from (
        f"## {place.title}",
        "",
        f"{place.text[0].upper()}{place.text[1:]}. {place.source}.",
        "",
    )
    yield from (f"![{place.title}: the best of each family]({place.name}.gif)", "")
    yield markdown_table(*_ranking(numbers, place))
    yield ""
    yield (
        f"log₁₀ (f − f*), mean over held-out starts, sorted by {numbers.settings.shown} gradient "
        "equivalents; behind it the chosen value, * where it is at the edge of what was tried; the "
        "spread is one standard deviation over starts, the steps are those within the budget."
    )
    yield ""
    for family in numbers.families:
        stem = f"{place.name}_{family}"
        yield from (f"![{place.title}: paths of {family}]({stem}.png)", "")
        stem = f"{place.name}_tuning_{family}"
        yield from (f"![{place.title}: tuning of {family}]({stem}.png)", "")


def _ranking(numbers: Numbers, place: Place) -> tuple[list[str], list[list[str]]]:
    budgets, shown = numbers.settings.budgets, numbers.settings.shown
    header = ["method", *(f"{b}" for b in budgets), f"spread ({shown})", f"steps ({shown})"]
    table = []
    for row in pictures.ranking(numbers, place.name, shown):
        cells = [numbers.row(place.name, row["method"], b) for b in budgets]
        texts = [_cell(cell) for cell in cells if cell is not None]
        table.append([row["method"], *texts, f"{row['spread']:.1f}", f"{row['steps']:.0f}"])
    return header, table


def _cell(row: numbers_lib.Row) -> str:
    value = "" if row["value"] is None else numbers_lib.value_text(row["value"])
    value = f" ({value}{' *' if row['edge'] else ''})" if value else ""
    diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{row['log10_excess']:.1f}".replace("-", "−") + value + diverged


def _command(numbers: Numbers) -> str:
    command = ["optgrad", "gallery"]
    if len(numbers.places) < len(places_lib.places()):
        command += ["--landscapes", ",".join(numbers.places)]
    if len(numbers.methods) < len(optgrad.methods()):
        command += ["--methods", ",".join(numbers.methods)]
    if numbers.settings == numbers_lib.QUICK:
        command += ["--quick"]
    return shlex.join(command)

"""The commands list, show and problems: what there is to compare."""

import inspect
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.panel import Panel
from rich.table import Table

from optgrad.experiments import cli_names, terminal
from optgrad.experiments.cli_later import Later

if TYPE_CHECKING:
    from optgrad.registry import Method

registry = Later("optgrad.registry")


def list_methods(
    family: Annotated[
        str | None,
        typer.Option(help="Only this family.", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.families)),
    ] = None,
) -> None:  # fmt: skip
    """List the optimizers, family by family.

    Example: optgrad list --family dissecting_adam
    """
    try:
        found = registry.methods(family)
    except ValueError as error:
        raise terminal.refuse(error) from None
    for name in dict.fromkeys(method.family for method in found):
        table = Table(title=name, title_justify="left", box=rich.box.SIMPLE)
        for column in ("name", "title", "needs", "state", "tunes"):
            no_wrap = column in {"name", "state", "tunes"}
            table.add_column(column, no_wrap=no_wrap, overflow="fold")
        for method in (m for m in found if m.family == name):
            tunes = method.tunes.hyperparameter if method.tunes else "–"
            needs = ", ".join(sorted(method.needs)) or "–"
            table.add_row(method.name, method.title, needs, f"{_state(method)} D", tunes)
        terminal.console.print(table)


def show(
    name: Annotated[
        str,
        typer.Argument(help="A name from 'optgrad list'.",
                       autocompletion=cli_names.beginning(cli_names.methods)),
    ],
) -> None:  # fmt: skip
    """Show one optimizer: equation, reference, arguments.

    Example: optgrad show m_svag
    """
    try:
        method = registry.get_method(name)
    except ValueError as error:
        raise terminal.refuse(error) from None
    rows = {
        "title": method.title,
        "family": method.family,
        "equation": method.equation,
        "reference": method.reference,
        "arguments": ", ".join(str(p).split(":")[0] + _default(p) for p in _parameters(method)),
        "static": ", ".join(method.static_args) or "–",
        "needs": "\n".join(f"{n}: {registry.EXTRAS[n]}" for n in sorted(method.needs)) or "–",
        "tunes": _tunes(method),
        "state": f"{_state(method)} vectors of parameter size",
        "16 bits": method.low_precision or "no vectors to keep",
        "stays wide": ", ".join(method.wide_state) or "–",
        "cost": f"{method.cost:g} gradient(s) per step",
        "evaluated": "at the trained parameters"
        if method.evaluation_params is None
        else "at an average of iterates, evaluated(state, params) of the record",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in rows.items():
        table.add_row(key, value)
    terminal.console.print(Panel(table, title=method.name, title_align="left"))
    text = inspect.getdoc(method.factory)
    terminal.console.print(text, markup=False, highlight=False, soft_wrap=True)


def list_problems() -> None:
    """List the problems beside images, with their options.

    Example: optgrad problems
    Example: optgrad compare --problem rosenbrock --set problem_options.noise=1
    """
    from optgrad.experiments import catalogue  # noqa: PLC0415

    rows = [
        (kind.name, kind.title, "\n".join(f"{k} = {v!r}" for k, v in kind.options.items()))
        for kind in catalogue.problems().values()
    ]
    terminal.console.print(terminal.table(("problem", "what", "options and defaults"), rows))
    terminal.console.print(
        "Options: --set problem_options.NAME=VALUE. A problem of your own: --problem FILE.py",
        highlight=False,
        soft_wrap=True,
    )


def _parameters(method: "Method") -> list[inspect.Parameter]:
    return list(method.hyperparameters.values())


def _default(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return ""
    return f"={default!r}" if isinstance(default, int | float | str | None) else "=…"


def _state(method: "Method") -> str:
    """Vectors of parameter size, as an affine function of their number D if it is dense."""
    if not method.is_dense:
        return f"{method.state_vectors(0):g}"
    constant, slope = method.state_vectors(0), method.state_vectors(1) - method.state_vectors(0)
    return f"({constant:g} + {slope:g} D)"


def _tunes(method: "Method") -> str:
    if method.tunes is None:
        return "nothing"
    return f"{method.tunes.hyperparameter} in [{method.tunes.low:g}, {method.tunes.high:g}]"

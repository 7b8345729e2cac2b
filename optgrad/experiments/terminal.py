"""What the command line prints, and how it refuses."""

import contextlib
from collections.abc import Iterator
from typing import Any

import rich.box
import typer
from rich.console import Console
from rich.table import Table

console = Console()
errors = Console(stderr=True)


def table(header: Any, rows: Any, title: str | None = None, shares: Any = None) -> Table:
    """A table; ``shares`` divides the width among columns of long text, which are wrapped."""
    found = Table(title=title, box=rich.box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(header):
        share = shares[i] if shares else None
        found.add_column(column, no_wrap=i == 0 and not shares, overflow="fold", ratio=share)
    for row in rows:
        found.add_row(*row)
    return found


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What is refused as one line on stderr, without a traceback."""
    from optgrad.experiments import checkpoint, data, results  # noqa: PLC0415

    refused = (data.DataError, results.ResultsError, checkpoint.CheckpointError)
    try:
        yield
    except (*refused, ValueError, ImportError) as error:
        raise refuse(error) from None


def refuse(error: Exception) -> typer.Exit:
    """Prints an error on stderr; what is to be raised."""
    errors.print(f"optgrad: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(2)

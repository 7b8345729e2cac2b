"""What the command line prints, and how it refuses."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.box
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()
errors = Console(stderr=True)

_BETWEEN_LINES = 10.0  # seconds, in a log

OnProgress = Callable[[str, float], None]


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
def progress(total: float | None = None) -> Iterator[OnProgress]:
    """Shows on stderr how far a command is.

    On a terminal that is a bar with the time left, elsewhere a line for whatever begins, and one
    every ten seconds.

    Args:
      total: how much there is to do; None if nobody knows.

    Yields:
      What is to be called with a description and how much is done.
    """
    with _bar(total) if errors.is_terminal else _lines(total) as on_progress:
        yield on_progress


@contextlib.contextmanager
def _bar(total: float | None) -> Iterator[OnProgress]:
    description = TextColumn("{task.description}")
    elapsed = [TimeElapsedColumn(), TextColumn("elapsed")]
    left = [TextColumn("·"), TimeRemainingColumn(elapsed_when_finished=True), TextColumn("left")]
    columns = (
        [SpinnerColumn(), description, *elapsed]
        if total is None
        else [description, BarColumn(bar_width=None), TaskProgressColumn(), *elapsed, *left]
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=total)

        def on_progress(description: str, done: float) -> None:
            bar.update(task, description=description, completed=done)

        yield on_progress


@contextlib.contextmanager
def _lines(total: float | None) -> Iterator[OnProgress]:
    began = time.monotonic()
    last: tuple[str, float] = ("", began)

    def on_progress(description: str, done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if description == last[0] and now - last[1] < _BETWEEN_LINES:
            return
        last = (description, now)
        share = f", {100 * done / total:.0f} %" if total and done else ""
        errors.print(
            f"{now - began:6.0f} s  {description}{share}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    yield on_progress


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What is refused as one line on stderr, without a traceback."""
    try:
        yield
    except (RuntimeError, ValueError, ImportError) as error:
        # Imported here: what is refused by name needs no checkpoints.
        from optgrad.experiments import checkpoint, results  # noqa: PLC0415

        ours = (results.ResultsError, checkpoint.CheckpointError)
        if isinstance(error, RuntimeError) and not isinstance(error, ours):
            raise
        if isinstance(error, ModuleNotFoundError):  # an extra is not installed: main() says which
            raise
        raise refuse(error) from None


def refuse(error: Exception) -> typer.Exit:
    """Prints an error on stderr; what is to be raised."""
    errors.print(f"optgrad: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(2)

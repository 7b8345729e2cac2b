"""What a comparison shows on the terminal while it runs."""

import math
import time
from typing import Any

from rich.console import Group
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from optgrad.experiments import config as config_lib
from optgrad.experiments import search_space, terminal
from optgrad.experiments.scores import ACCURACY


class LiveView:
    """A progress bar with ETA over all steps, and the best result so far of each optimizer."""

    def __init__(self, settings: config_lib.CompareConfig) -> None:
        self.settings = settings
        self.score = ACCURACY  # until a record brings the problem's
        self.progress = Progress(  # what is running stands above it, or it would leave no room
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left, {task.fields[rate]:.0f} steps/s"),
        )
        self.expected = [config_lib.expected_steps(settings, o) for o in settings.optimizers]
        self.intervals = {o.label: settings.length(o).eval_every for o in settings.optimizers}
        total = sum(self.expected) or None  # nobody knows how many steps fit into seconds
        self.task = self.progress.add_task("compiling", total=total, rate=0.0)
        self.best: dict[str, tuple[str, dict[str, Any]]] = {}
        self.diverged: dict[str, set[tuple[str, str, int]]] = {}
        self.started = time.monotonic()
        self.steps = 0
        self.announced: tuple[str, str] | None = None

    def on_interval(self, label: str, stage: str, record: Any) -> None:
        """Takes note of one evaluation of one run."""
        if not terminal.console.is_terminal and self.announced != (label, stage):  # a log, a pipe
            self.announced = (label, stage)
            elapsed = time.monotonic() - self.started
            terminal.errors.print(
                f"{elapsed:6.0f} s  {label}: {stage}", markup=False, highlight=False
            )
        interval = self.intervals.get(label, 0) if record["step"] else 0
        self.steps += interval
        if label not in self.best:  # its predecessors are finished, whatever they were expected
            self.best[label] = (stage, dict(record))
            if completed := sum(self.expected[: len(self.best) - 1]):
                self.progress.update(self.task, completed=completed)
        if record["diverged_at"]:
            runs = self.diverged.setdefault(label, set())
            runs.add((stage, search_space.text(record["value"]), int(record["seed"])))
        self.score = record.get("score", self.score)
        sign, name = self.score.sign(self.score.name), self.score.name
        best = self.best[label][1][name]
        if sign * record[name] > sign * best or math.isnan(best):
            self.best[label] = (stage, dict(record))
        self.progress.update(
            self.task,
            advance=interval,
            description=f"{label}: {stage} {search_space.text(record['value'])}, "
            f"seed {record['seed']}, step {record['step']}",
            rate=self.steps / max(time.monotonic() - self.started, 1e-9),
        )

    def on_note(self, label: str, text: str) -> None:
        """Says how the runs go through the machine."""
        where = terminal.console if terminal.console.is_terminal else terminal.errors
        where.print(f"{label}: {text}", markup=False, highlight=False, soft_wrap=True)

    def render(self) -> Group:
        """The view as it is now."""
        best = f"best {self.score.heading}"
        header = ("optimizer", "stage", "rate", "step", best, "diverged runs")
        rows = [
            [
                label,
                stage,
                search_space.text(record["value"]),
                str(record["step"]),
                self.score.text(record[self.score.name]),
                str(len(self.diverged.get(label, ()))),
            ]
            for label, (stage, record) in self.best.items()
        ]
        running = Text(self.progress.tasks[0].description, no_wrap=True, overflow="ellipsis")
        return Group(terminal.table(header, rows), running, self.progress)

"""The command line: list, show, problems, compare, resume and reproduce."""

import contextlib
import inspect
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import optgrad
from optgrad import registry
from optgrad.experiments import config as config_lib
from optgrad.experiments import report, user_problems
from optgrad.experiments.scores import ACCURACY

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()
errors = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"optgrad {optgrad.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Optimizers that know about curvature, gradient variance and step size, compared fairly."""


@app.command("list")
def list_methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
) -> None:
    """List the registered optimizers."""
    try:
        found = registry.methods(family)
    except ValueError as error:
        raise _refuse(error) from None
    for name in dict.fromkeys(method.family for method in found):
        table = Table(title=name, title_justify="left", box=rich.box.SIMPLE)
        for column in ("name", "title", "needs", "state", "tunes"):
            no_wrap = column in {"name", "state", "tunes"}
            table.add_column(column, no_wrap=no_wrap, overflow="fold")
        for method in (m for m in found if m.family == name):
            tunes = method.tunes.hyperparameter if method.tunes else "–"
            needs = ", ".join(sorted(method.needs)) or "–"
            table.add_row(method.name, method.title, needs, f"{_state(method)} D", tunes)
        console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from 'optgrad list'.")]) -> None:
    """Show one optimizer: equation, reference, arguments, extras."""
    try:
        method = registry.get_method(name)
    except ValueError as error:
        raise _refuse(error) from None
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
        "cost": f"{method.cost:g} gradient(s) per step",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(Panel(table, title=method.name, title_align="left"))
    text = inspect.getdoc(method.factory)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("problems")
def list_problems() -> None:
    """List the problems beside images, with their options, for 'compare --problem'."""
    from optgrad.experiments import catalogue  # noqa: PLC0415

    rows = [
        (kind.name, kind.title, "\n".join(f"{k} = {v!r}" for k, v in kind.options.items()))
        for kind in catalogue.problems().values()
    ]
    console.print(_table(("problem", "what", "options and defaults"), rows))
    console.print(
        "Options: --set problem_options.NAME=VALUE. A problem of your own: --problem FILE.py",
        highlight=False,
        soft_wrap=True,
    )


def _parameters(method: registry.Method) -> list[inspect.Parameter]:
    return list(method.hyperparameters.values())


def _default(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return ""
    return f"={default!r}" if isinstance(default, int | float | str | None) else "=…"


def _state(method: registry.Method) -> str:
    """Vectors of parameter size, as an affine function of their number D if it is dense."""
    if not method.is_dense:
        return f"{method.state_vectors(0):g}"
    constant, slope = method.state_vectors(0), method.state_vectors(1) - method.state_vectors(0)
    return f"({constant:g} + {slope:g} D)"


def _tunes(method: registry.Method) -> str:
    if method.tunes is None:
        return "nothing"
    return f"{method.tunes.hyperparameter} in [{method.tunes.low:g}, {method.tunes.high:g}]"


@app.command()
def compare(  # noqa: PLR0917  typer reads the options from the signature
    config: Annotated[Path | None, typer.Option(help="A TOML file; default: digits.")] = None,
    problem: Annotated[
        str | None, typer.Option(help="A name from 'optgrad problems', or FILE.py[:FUNCTION].")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="digits, mnist, cifar10, …")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data set.")] = None,
    model: Annotated[str | None, typer.Option(help="mlp, mlp_small, cifar10_cnn, …")] = None,
    optimizers: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a run.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Replications of the best rate.")] = None,
    rates: Annotated[str | None, typer.Option(help="Rates to try, separated by commas.")] = None,
    tuning: Annotated[str | None, typer.Option(help="search, grid or none.")] = None,
    select_by: Annotated[str | None, typer.Option(help="validation_accuracy, …")] = None,
    vectorize: Annotated[str | None, typer.Option(help="auto, vmap or map.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices: runs=4,data=2.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0 of several, or auto on a cluster.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many processes.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for the other processes.")] = 300,
    output: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier results folder.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: FIELD=VALUE, repeatable.")
    ] = None,
) -> None:
    """Tune, replicate and compare optimizers; the default is the paper's four on digits."""
    overrides: dict[str, Any] = {
        "problem": problem,
        "dataset": dataset,
        "data_dir": data_dir,
        "model": model,
        "optimizers": _split(optimizers),
        "steps": steps,
        "eval_every": eval_every,
        "batch_size": batch_size,
        "seeds": seeds,
        "tuning.rates": _split(rates),
        "tuning.protocol": tuning,
        "tuning.select_by": select_by,
        "vectorize": vectorize,
        "mesh": mesh,
        "output": output,
    }
    # Imported here: 'optgrad list' and a refused configuration need no data set and no figures.
    from optgrad.experiments import checkpoint, results  # noqa: PLC0415

    with _refusals():
        overrides |= dict(config_lib.parse_override(text) for text in set_ or ())
        settings = config_lib.load_config(config, overrides)
    with _together(coordinator, num_processes, process_id, timeout) as leads, _refusals():
        if not leads:
            _take_part(data_dir, settings)
            return
        folder = settings.output or results.default_folder(settings)
        results.check_destination(folder, overwrite=overwrite)
        study = {
            "config": _resolved(settings),
            "environment": results.describe_environment(),
        }
        seconds = settings.checkpoint_seconds
        with checkpoint.begin(folder, study, seconds=seconds, anew=overwrite) as journal:
            _run_study(settings, folder, journal, overwrite=overwrite)


@app.command()
def resume(  # noqa: PLR0917  typer reads the options from the signature
    folder: Annotated[
        Path, typer.Argument(help="The results folder that was to be written, or its .partial.")
    ],
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data set.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0 of several, or auto on a cluster.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many processes.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for the other processes.")] = 300,
) -> None:
    """Go on with a comparison that was interrupted, at any moment and in any way."""
    from optgrad.experiments import checkpoint, results  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        leads = stack.enter_context(_together(coordinator, num_processes, process_id, timeout))
        stack.enter_context(_refusals())
        if not leads:
            _take_part(data_dir)
            return
        journal = stack.enter_context(checkpoint.resume(folder))
        study = journal.study
        moved = {"data_dir": data_dir.resolve()} if data_dir else {}
        settings = config_lib.CompareConfig.model_validate({**study["config"], **moved})
        for name, now in results.describe_environment().items():
            if now != (before := study["environment"].get(name)):
                errors.print(
                    f"optgrad: {name} was {before} and is {now}: numbers may differ in rounding "
                    "from those of one run",
                    style="yellow", markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        destination = folder.with_name(folder.name.removesuffix(checkpoint.SUFFIX))
        # Results that are there are earlier ones that were to be replaced, or already its own.
        results.check_destination(destination, overwrite=True)
        _run_study(settings, destination, journal, overwrite=True)


def _resolved(settings: config_lib.CompareConfig) -> dict[str, Any]:
    """The configuration as JSON, with places that mean the same from any folder."""
    config = settings.model_dump(mode="json")
    if settings.data_dir and not settings.problem:
        config["data_dir"] = str(settings.data_dir.resolve())
    if place := user_problems.file_of(settings.problem):
        path, function = place
        config["problem"] = f"{path.resolve()}:{function}"
    return config


def _run_study(
    settings: config_lib.CompareConfig, folder: Path, journal: Any, *, overwrite: bool
) -> None:
    """Runs a comparison to its end, or as far as it comes, and prints what it found."""
    from optgrad.experiments import compare as compare_lib  # noqa: PLC0415
    from optgrad.experiments import distributed, results  # noqa: PLC0415

    live = _LiveView(settings)
    keeper = journal
    if distributed.process_count() > 1:
        distributed.broadcast(_resolved(settings))
        keeper = distributed.SharedJournal(journal)
    try:
        with Live(
            get_renderable=live.render, console=console, refresh_per_second=4, transient=True
        ):
            comparison = compare_lib.run_comparison(
                settings, live.on_interval, keeper, live.on_note
            )
        results.write(comparison, folder, overwrite=overwrite)
    except BaseException:
        if not journal.is_empty:
            errors.print(
                f"Interrupted; go on with: optgrad resume {folder}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        raise
    journal.discard()
    header, rows = report.table(comparison)
    console.print(_table(header, rows, title=comparison.problem))
    console.print(f"Results, curves and report: {folder}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _together(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> Iterator[bool]:
    """Meets the other processes, if there are to be any; gives whether this one leads."""
    if (coordinator, processes, process) == (None, None, None):
        yield True
        return
    from optgrad.experiments import distributed  # noqa: PLC0415

    with _refusals():
        distributed.initialize(coordinator, processes, process, timeout=timeout)
    with distributed.ended_together():
        yield distributed.is_first()


def _take_part(data_dir: Path | None, own: config_lib.CompareConfig | None = None) -> None:
    """Runs what the first process runs; prints and writes nothing."""
    from optgrad.experiments import compare as compare_lib  # noqa: PLC0415
    from optgrad.experiments import distributed  # noqa: PLC0415

    config = distributed.broadcast(None)
    if own:
        distributed.check_agreement(_resolved(own), config)
    place = {"data_dir": data_dir} if data_dir else {}
    settings = config_lib.CompareConfig.model_validate({**config, **place})
    compare_lib.run_comparison(settings, journal=distributed.SharedJournal(None))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What is refused as one line on stderr, without a traceback."""
    from optgrad.experiments import checkpoint, data, results  # noqa: PLC0415

    refused = (data.DataError, results.ResultsError, checkpoint.CheckpointError)
    try:
        yield
    except (*refused, ValueError, ImportError) as error:
        raise _refuse(error) from None


class _LiveView:
    """A progress bar with ETA over all steps, and the best result so far of each optimizer."""

    def __init__(self, settings: config_lib.CompareConfig) -> None:
        self.settings = settings
        self.score = ACCURACY  # until a record brings the problem's
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left, {task.fields[rate]:.0f} steps/s"),
        )
        self.expected = [config_lib.expected_steps(settings, o) for o in settings.optimizers]
        self.task = self.progress.add_task("compiling", total=sum(self.expected), rate=0.0)
        self.best: dict[str, tuple[str, dict[str, Any]]] = {}
        self.diverged: dict[str, set[tuple[str, str, int]]] = {}
        self.started = time.monotonic()
        self.steps = 0
        self.announced: tuple[str, str] | None = None

    def on_interval(self, label: str, stage: str, record: Any) -> None:
        """Takes note of one evaluation of one run."""
        if not console.is_terminal and self.announced != (label, stage):  # a log, a pipe
            self.announced = (label, stage)
            elapsed = time.monotonic() - self.started
            errors.print(f"{elapsed:6.0f} s  {label}: {stage}", markup=False, highlight=False)
        interval = (self.settings.eval_every or 0) if record["step"] else 0
        self.steps += interval
        if label not in self.best:  # its predecessors are finished, whatever they were expected
            self.best[label] = (stage, dict(record))
            completed = sum(self.expected[: len(self.best) - 1])
            self.progress.update(self.task, completed=completed)
        if record["diverged_at"]:
            runs = self.diverged.setdefault(label, set())
            runs.add((stage, f"{record['value']:g}", int(record["seed"])))
        self.score = record.get("score", self.score)
        sign, name = self.score.sign(self.score.name), self.score.name
        best = self.best[label][1][name]
        if sign * record[name] > sign * best or math.isnan(best):
            self.best[label] = (stage, dict(record))
        self.progress.update(
            self.task,
            advance=interval,
            description=f"{label}: {stage} {record['value']:g}, seed {record['seed']}, "
            f"step {record['step']}",
            rate=self.steps / max(time.monotonic() - self.started, 1e-9),
        )

    def on_note(self, label: str, text: str) -> None:
        """Says how the runs go through the machine."""
        where = console if console.is_terminal else errors
        where.print(f"{label}: {text}", markup=False, highlight=False, soft_wrap=True)

    def render(self) -> Group:
        """The view as it is now."""
        best = f"best {self.score.heading}"
        header = ("optimizer", "stage", "rate", "step", best, "diverged runs")
        rows = [
            [
                label,
                stage,
                f"{record['value']:g}",
                str(record["step"]),
                self.score.text(record[self.score.name]),
                str(len(self.diverged.get(label, ()))),
            ]
            for label, (stage, record) in self.best.items()
        ]
        return Group(_table(header, rows), self.progress)


@app.command()
def reproduce(  # noqa: PLR0917  typer reads the options from the signature
    paper: Annotated[str | None, typer.Argument(help="Which paper; none: list them all.")] = None,
    figures: Annotated[
        list[str] | None, typer.Argument(help="Figures or tables, or 'all', the default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier results folder.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data sets.")] = None,
    scale: Annotated[
        str, typer.Option(help="'cpu' or, where there is one, 'paper': the paper's budget.")
    ] = "cpu",
    quick: Annotated[
        bool, typer.Option(help="Seconds, to try it; the numbers mean little.")
    ] = False,
) -> None:
    """Reproduce the figures and tables of a paper: pictures, numbers and a report."""
    from optgrad.experiments import reproduce as lib  # noqa: PLC0415
    from optgrad.experiments import results  # noqa: PLC0415
    from optgrad.experiments.reproduce import report as reproduction_report  # noqa: PLC0415

    if paper is None:
        for name in lib.reproductions():
            console.print(_reproduction_table(lib.get_reproduction(name)))
        return
    with _refusals():
        reproduction = lib.get_reproduction(paper)
        makers = reproduction.select(figures or ())
        settings = lib.Settings(quick=quick, data_dir=data_dir, scale=scale)
        reproduction.check_settings(settings)
        folder = output or results.default_folder_of(paper)
        results.check_destination(folder, overwrite=overwrite)
        found = _make_with_progress(makers, settings)
        reproduction_report.write(reproduction, found, settings, folder, overwrite=overwrite)
    for result in found.values():
        rows = reproduction_report.findings_rows(result)
        header = reproduction_report.FINDINGS_HEADER
        console.print(_table(header, rows, title=result.title, shares=(3, 2, 2, 2)))
    console.print(f"Figures, numbers and report: {folder}", highlight=False, soft_wrap=True)


def _reproduction_table(reproduction: Any) -> Table:
    rows = [(name, maker.title) for name, maker in reproduction.figures.items()]
    return _table(("figure", "what"), rows, title=f"{reproduction.name}: {reproduction.reference}")


def _make_with_progress(makers: Any, settings: Any) -> dict[str, Any]:
    """The results, under a progress bar with ETA over all figures."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
        console=console,
        transient=True,
    )
    task = progress.add_task("", total=sum(maker.share for maker in makers.values()))
    found, done = {}, 0.0
    with progress:
        for name, maker in makers.items():
            progress.update(task, description=name)

            def advance(fraction: float, done: float = done, share: float = maker.share) -> None:
                progress.update(task, completed=done + fraction * share)

            found[name] = maker.make(settings, advance)
            done += maker.share
            progress.update(task, completed=done)
    return found


def _table(header: Any, rows: Any, title: str | None = None, shares: Any = None) -> Table:
    """A table; ``shares`` divides the width among columns of long text, which are wrapped."""
    table = Table(title=title, box=rich.box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(header):
        share = shares[i] if shares else None
        table.add_column(column, no_wrap=i == 0 and not shares, overflow="fold", ratio=share)
    for row in rows:
        table.add_row(*row)
    return table


def _split(text: str | None) -> list[Any] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _refuse(error: Exception) -> typer.Exit:
    errors.print(f"optgrad: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(2)

"""The command line: what can be done with optimizers, problems, studies and their results."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

import optgrad
from optgrad.experiments import (
    cli_bench,
    cli_gallery,
    cli_methods,
    cli_report,
    cli_reproduce,
    report,
    terminal,
    user_problems,
)
from optgrad.experiments import config as config_lib
from optgrad.experiments.live_view import LiveView

# How a process meets the others, in compare and in resume.
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0 of several, or auto on a cluster.")
]
NumProcesses = Annotated[int | None, typer.Option(help="How many processes.")]
ProcessId = Annotated[int | None, typer.Option(help="Which of them this is, from 0.")]
Timeout = Annotated[int, typer.Option(help="Seconds to wait for the other processes.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.console.print(f"optgrad {optgrad.__version__}", highlight=False)
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


app.command("list")(cli_methods.list_methods)
app.command("show")(cli_methods.show)
app.command("problems")(cli_methods.list_problems)


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
    tuning: Annotated[
        str | None, typer.Option(help="search, grid, random, halton or none.")
    ] = None,
    select_by: Annotated[str | None, typer.Option(help="validation_accuracy, …")] = None,
    vectorize: Annotated[str | None, typer.Option(help="auto, vmap or map.")] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="TensorBoard event files, too.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices: runs=4,data=2.")] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    timeout: Timeout = 300,
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
        "tensorboard": tensorboard,
        "mesh": mesh,
        "output": output,
    }
    # Imported here: 'optgrad list' and a refused configuration need no data set and no figures.
    from optgrad.experiments import checkpoint, results  # noqa: PLC0415

    with terminal.refusals():
        overrides |= dict(config_lib.parse_override(text) for text in set_ or ())
        settings = config_lib.load_config(config, overrides)
    with _together(coordinator, num_processes, process_id, timeout) as leads, terminal.refusals():
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
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    timeout: Timeout = 300,
) -> None:
    """Go on with a comparison that was interrupted, at any moment and in any way."""
    from optgrad.experiments import checkpoint, results  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        leads = stack.enter_context(_together(coordinator, num_processes, process_id, timeout))
        stack.enter_context(terminal.refusals())
        if not leads:
            _take_part(data_dir)
            return
        journal = stack.enter_context(checkpoint.resume(folder))
        study = journal.study
        moved = {"data_dir": data_dir.resolve()} if data_dir else {}
        settings = config_lib.CompareConfig.model_validate({**study["config"], **moved})
        for name, now in results.describe_environment().items():
            if now != (before := study["environment"].get(name)):
                terminal.errors.print(
                    f"optgrad: {name} was {before} and is {now}: numbers may differ in rounding "
                    "from those of one run",
                    style="yellow", markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        destination = folder.with_name(folder.name.removesuffix(checkpoint.SUFFIX))
        # Results that are there are earlier ones that were to be replaced, or already its own.
        results.check_destination(destination, overwrite=True)
        _run_study(settings, destination, journal, overwrite=True)


@app.command()
def doctor(
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data sets.")] = None,
) -> None:
    """Show versions, devices, data and caches, and run a self test of one second.

    Example: optgrad doctor --data-dir DATA
    """
    from optgrad.experiments import doctor as lib  # noqa: PLC0415

    found = []
    with terminal.refusals():
        for finding in lib.findings(data_dir):
            found.append(finding)
    rows = [(f.name, f"{'' if f.is_fine else '– '}{f.found}") for f in found]
    terminal.console.print(terminal.table(("what", "found"), rows, shares=(1, 3)))
    if not found[-1].is_fine:
        raise typer.Exit(1)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0, help="How long studies begin.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Kill and resume random studies, and check that nothing is lost.

    Example: optgrad soak --minutes 20
    """
    from optgrad.experiments import soak as lib  # noqa: PLC0415

    folder = Path(tempfile.mkdtemp(prefix="optgrad-soak-"))
    try:
        found = lib.soak(minutes, seed, folder, lambda line: terminal.console.print(
            line, markup=False, highlight=False, soft_wrap=True))  # fmt: skip
    except lib.LostError as error:  # what was found stays there
        raise terminal.refuse(error) from None
    folder.rmdir()
    terminal.console.print(
        f"{found.kills} kills in {found.studies} studies, {found.seconds / 60:.1f} minutes: "
        "all metrics bit-identical, nothing left behind",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


app.command("report")(cli_report.report)
app.command("reproduce")(cli_reproduce.reproduce)
app.command("gallery")(cli_gallery.gallery)
app.add_typer(cli_bench.app, name="bench")


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
    from optgrad.experiments import distributed, event_files, results  # noqa: PLC0415

    if settings.tensorboard:
        event_files.check_installed()
    live = LiveView(settings)
    keeper = journal
    if distributed.process_count() > 1:
        distributed.broadcast(_resolved(settings))
        keeper = distributed.SharedJournal(journal)
    try:
        with Live(
            get_renderable=live.render,
            console=terminal.console,
            refresh_per_second=4,
            transient=True,
        ):
            comparison = compare_lib.run_comparison(
                settings, live.on_interval, keeper, live.on_note
            )
        results.write(comparison, folder, overwrite=overwrite)
        results.remove_leftovers(folder)  # the journal's lock keeps other processes out
    except BaseException:
        if not journal.is_empty:
            terminal.errors.print(
                f"Interrupted; go on with: optgrad resume {folder}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        raise
    journal.discard()
    header, rows = report.table(comparison)
    terminal.console.print(terminal.table(header, rows, title=comparison.problem))
    terminal.console.print(f"Results, curves and report: {folder}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _together(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> Iterator[bool]:
    """Meets the other processes, if there are to be any; gives whether this one leads."""
    if (coordinator, processes, process) == (None, None, None):
        yield True
        return
    from optgrad.experiments import distributed  # noqa: PLC0415

    with terminal.refusals():
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


def _split(text: str | None) -> list[Any] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]

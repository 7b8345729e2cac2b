"""The command line: what can be done with optimizers, problems, studies and their results.

What imports JAX is imported within the commands: their help, and the shell's completion, need none.
"""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live

import optgrad
from optgrad.experiments import (
    cli_bench,
    cli_commands,
    cli_gallery,
    cli_methods,
    cli_names,
    cli_report,
    cli_reproduce,
    interrupts,
    terminal,
)
from optgrad.experiments.cli_commands import (
    BUDGET,
    COMPARE,
    MACHINE,
    OUTPUT,
    PROCESSES,
    RUNNING,
    TUNING,
    WHAT,
)
from optgrad.experiments.cli_later import Later

if TYPE_CHECKING:
    from optgrad.experiments.config import CompareConfig

config_lib = Later("optgrad.experiments.config")

# How a process meets the others, in compare and in resume.
Coordinator = Annotated[
    str | None,
    typer.Option(
        help="Process 0, or 'auto' on a cluster.", metavar="HOST:PORT", rich_help_panel=PROCESSES
    ),
]
NumProcesses = Annotated[
    int | None, typer.Option(help="How many there are.", metavar="N", rich_help_panel=PROCESSES)
]
ProcessId = Annotated[
    int | None, typer.Option(help="Which one this is, from 0.", metavar="N",
                             rich_help_panel=PROCESSES),
]  # fmt: skip
Timeout = Annotated[
    int, typer.Option(help="Seconds to wait for them.", metavar="S", rich_help_panel=PROCESSES)
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data set.", metavar="DIR", rich_help_panel=WHAT)
]

_NOTHING_DONE = "Interrupted before anything was computed; nothing was written"

app = cli_commands.create_app()


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
    """Optimizers that know about curvature, gradient variance and step size.

    Example: optgrad compare --optimizers adam,m_svag
    """


app.command("list", rich_help_panel=cli_commands.LOOK)(cli_methods.list_methods)
app.command("show", rich_help_panel=cli_commands.LOOK)(cli_methods.show)
app.command("problems", rich_help_panel=cli_commands.LOOK)(cli_methods.list_problems)


@app.command(rich_help_panel=COMPARE)
def compare(  # noqa: PLR0917  typer reads the options from the signature
    config: Annotated[
        Path | None, typer.Option(help="TOML file with all of these.", metavar="FILE",
                                  rich_help_panel=WHAT),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(help="See 'optgrad problems'; or FILE.py[:FUNCTION].", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.problems), rich_help_panel=WHAT),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="digits, mnist, cifar10, …", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.datasets), rich_help_panel=WHAT),
    ] = None,
    data_dir: DataDir = None,
    model: Annotated[
        str | None,
        typer.Option(help="mlp, mlp_small, cifar10_cnn, …", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.models), rich_help_panel=WHAT),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(help="See 'optgrad list'; with commas between.", metavar="NAMES",
                     autocompletion=cli_names.listed(cli_names.methods), rich_help_panel=WHAT),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of a run.", metavar="N",
                                 rich_help_panel=BUDGET),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations.", metavar="N",
                                 rich_help_panel=BUDGET),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step.", metavar="N", rich_help_panel=BUDGET)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Replications of the best rate.", metavar="N",
                                 rich_help_panel=BUDGET),
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Rates to try, with commas between.", metavar="RATES",
                                 rich_help_panel=TUNING),
    ] = None,
    tuning: Annotated[
        str | None,
        typer.Option(help="search, grid, random, halton or none.", metavar="HOW",
                     autocompletion=cli_names.one_of("search", "grid", "random", "halton", "none"),
                     rich_help_panel=TUNING),
    ] = None,
    select_by: Annotated[
        str | None,
        typer.Option(help="validation_accuracy, test_loss, …", metavar="METRIC",
                     autocompletion=cli_names.one_of("validation_accuracy", "validation_loss",
                                                     "test_accuracy", "test_loss"),
                     rich_help_panel=TUNING),
    ] = None,
    vectorize: Annotated[
        str | None,
        typer.Option(help="Runs together or in turn: auto, vmap or map.", metavar="HOW",
                     autocompletion=cli_names.one_of("auto", "vmap", "map"),
                     rich_help_panel=RUNNING),
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Devices, such as runs=4,data=2.", metavar="AXES",
                                 rich_help_panel=RUNNING),
    ] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    timeout: Timeout = 300,
    output: Annotated[
        Path | None, typer.Option(help="Results folder.", metavar="DIR", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier results folder.",
                           rich_help_panel=OUTPUT),
    ] = False,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="TensorBoard event files, too.",
                                  rich_help_panel=OUTPUT),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the file; repeatable.",
                                       metavar="FIELD=VALUE"),
    ] = None,
) -> None:  # fmt: skip
    """Tune, replicate and compare optimizers.

    Without options: the four of "Dissecting Adam" on scikit-learn's digits.

    Example: optgrad compare --optimizers adam,m_svag --output results/try
    Example: optgrad compare --config study.toml --set l2=1e-4
    """
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
    from optgrad.experiments import checkpoint, results  # noqa: PLC0415

    with terminal.refusals():
        overrides |= dict(config_lib.parse_override(text) for text in set_ or ())
        settings = config_lib.load_config(config, overrides)
    with (
        _together(coordinator, num_processes, process_id, timeout) as leads,
        interrupts.explained(lambda: _NOTHING_DONE),
        terminal.refusals(),
    ):
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


@app.command(rich_help_panel=COMPARE)
def resume(  # noqa: PLR0917  typer reads the options from the signature
    folder: Annotated[
        Path,
        typer.Argument(help="The results folder that was to be written, or its .partial."),
    ],
    data_dir: DataDir = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    timeout: Timeout = 300,
) -> None:
    """Go on with a comparison that was interrupted.

    At any moment and in any way: by Ctrl-C, kill -9 or a power failure.

    Example: optgrad resume results/try
    """
    line = _how_to_go_on(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupts.explained(lambda: line, at_once=line))
        from optgrad.experiments import checkpoint, results  # noqa: PLC0415

        leads = stack.enter_context(_together(coordinator, num_processes, process_id, timeout))
        stack.enter_context(interrupts.explained(lambda: line, at_once=line))  # one of several
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
        _run_study(settings, destination, journal, overwrite=True, resumed=True)


app.command("report", rich_help_panel=COMPARE)(cli_report.report)
app.command("reproduce", rich_help_panel=cli_commands.PAPERS)(cli_reproduce.reproduce)
app.command(
    "gallery",
    short_help="Draw the paths of all methods on landscapes.",
    rich_help_panel=cli_commands.PAPERS,
)(cli_gallery.gallery)


@app.command(rich_help_panel=MACHINE)
def doctor(
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with data sets.", metavar="DIR")
    ] = None,
) -> None:
    """Show versions, devices, data and caches; test for a second.

    Example: optgrad doctor --data-dir DATA
    """
    with terminal.errors.status("Looking and testing"), terminal.refusals():
        from optgrad.experiments import doctor as lib  # noqa: PLC0415

        found = list(lib.findings(data_dir))
    rows = [(f.name, f"{'' if f.is_fine else '– '}{f.found}") for f in found]
    terminal.console.print(terminal.table(("what", "found"), rows, shares=(1, 3)))
    if not found[-1].is_fine:
        raise typer.Exit(1)


app.add_typer(cli_bench.app, name="bench", rich_help_panel=MACHINE)


@app.command(rich_help_panel=MACHINE)
def soak(
    minutes: Annotated[
        float, typer.Option(min=0, help="How long studies begin.", metavar="M")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", metavar="N")] = 0,
) -> None:
    """Kill and resume random studies: nothing may be lost.

    Example: optgrad soak --minutes 20
    """
    from optgrad.experiments import soak as lib  # noqa: PLC0415

    came_through: list[str] = []
    with interrupts.explained(
        lambda: f"Interrupted; {len(came_through)} studies came through, and nothing is left"
    ):
        try:
            with lib.scratch() as folder, terminal.progress() as on_progress:
                on_progress("the first study", 0)

                def on_study(line: str) -> None:
                    came_through.append(line)
                    terminal.console.print(line, markup=False, highlight=False, soft_wrap=True)
                    on_progress(f"{len(came_through)} came through; the next study", 0)

                found = lib.soak(minutes, seed, folder, on_study)
        except lib.LostError as error:  # what was found stays there
            raise terminal.refuse(error) from None
    terminal.console.print(
        f"{found.kills} kills in {found.studies} studies, {found.seconds / 60:.1f} minutes: "
        "all metrics bit-identical, nothing left behind",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


cli_commands.finish(app)


def _resolved(settings: "CompareConfig") -> dict[str, Any]:
    """The configuration as JSON, with places that mean the same from any folder."""
    config = settings.model_dump(mode="json")
    if settings.data_dir and not settings.problem:
        config["data_dir"] = str(settings.data_dir.resolve())
    from optgrad.experiments import user_problems  # noqa: PLC0415

    if place := user_problems.file_of(settings.problem):
        path, function = place
        config["problem"] = f"{path.resolve()}:{function}"
    return config


def _run_study(
    settings: "CompareConfig", folder: Path, journal: Any, *, overwrite: bool, resumed: bool = False
) -> None:
    """Runs a comparison to its end, or as far as it comes, and prints what it found."""
    from optgrad.experiments import compare as compare_lib  # noqa: PLC0415
    from optgrad.experiments import (  # noqa: PLC0415
        distributed,
        event_files,
        live_view,
        report,
        results,
    )

    if settings.tensorboard:
        event_files.check_installed()
    how_to_go_on = _how_to_go_on(folder)
    written = f"Results, curves and report: {folder}"
    is_written = False

    def advice() -> str:
        if is_written:
            return written
        return how_to_go_on if resumed or not journal.is_empty else _NOTHING_DONE

    with interrupts.explained(advice, at_once=how_to_go_on):
        live = live_view.LiveView(settings)
        keeper = journal
        if distributed.process_count() > 1:
            distributed.broadcast(_resolved(settings))
            keeper = distributed.SharedJournal(journal)
        try:
            _download(settings)
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
        except Exception:
            if not journal.is_empty:
                terminal.errors.print(how_to_go_on, markup=False, highlight=False, soft_wrap=True)
            raise
        is_written = True
        journal.discard()
        header, rows = report.table(comparison)
        terminal.console.print(terminal.table(header, rows, title=comparison.problem))
        terminal.console.print(written, highlight=False, soft_wrap=True)


def _how_to_go_on(folder: Path) -> str:
    return f"Interrupted; go on with: optgrad resume {shlex.quote(str(folder))}"


def _download(settings: "CompareConfig") -> None:
    """Gets the data set if it is not there: under the live view its progress would not be seen."""
    from optgrad.experiments import data  # noqa: PLC0415

    if not terminal.console.is_terminal or settings.problem:
        return
    if not data.whereabouts(settings.dataset, settings.data_dir):
        data.load(settings.dataset, settings.data_dir)


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


def _take_part(data_dir: Path | None, own: "CompareConfig | None" = None) -> None:
    """Runs what the first process runs; prints and writes nothing."""
    from optgrad.experiments import compare as compare_lib  # noqa: PLC0415
    from optgrad.experiments import distributed  # noqa: PLC0415

    with interrupts.explained(lambda: "Interrupted; process 0 says how to go on"):
        config = distributed.broadcast(None)
        if own:
            distributed.check_agreement(_resolved(own), config)
        place = {"data_dir": data_dir} if data_dir else {}
        settings = config_lib.CompareConfig.model_validate({**config, **place})
        compare_lib.run_comparison(settings, journal=distributed.SharedJournal(None))


def _split(text: str | None) -> list[Any] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]

"""The commands bench step, bench compile and bench sweep: what optimizers cost."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optgrad.experiments import cli_commands, cli_names, terminal
from optgrad.experiments.cli_later import Later

if TYPE_CHECKING:
    from optgrad.registry import Method

registry, checks = Later("optgrad.registry"), Later("optgrad.core.checks")
compilation = Later("optgrad.experiments.compilation")

app = cli_commands.create_app()

Methods = Annotated[
    list[str] | None,
    typer.Argument(help="Names from 'optgrad list'; none: all.",
                   autocompletion=cli_names.beginning(cli_names.methods)),
]  # fmt: skip
Output = Annotated[Path | None, typer.Option(help="Folder for Markdown and JSON.", metavar="DIR")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier folder.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all is timed.", metavar="N")]


@app.callback()
def _bench() -> None:
    """Measure what a step, its compilation and a sweep cost.

    Example: optgrad bench step adam m_svag --tree one
    """


@app.command("step")
def step(  # noqa: PLR0917  typer reads the options from the signature
    methods: Methods = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(help="one, hundred, small400, resnet18, transformer, few; repeatable.",
                     metavar="NAME", autocompletion=cli_names.beginning(cli_names.trees)),
    ] = None,
    param_dtype: Annotated[
        str,
        typer.Option(help="float32 or bfloat16.", metavar="TYPE",
                     autocompletion=cli_names.one_of("float32", "bfloat16")),
    ] = "float32",
    state_dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, nearest or stochastic.", metavar="TYPE",
                     autocompletion=cli_names.one_of("default", "float32", "bfloat16", "nearest",
                                                     "stochastic")),
    ] = "default",
    rounds: Rounds = 20,
    peers: Annotated[
        bool, typer.Option("--peers", help="torch and pytorch_optimizer, where installed.")
    ] = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Time a step of each method.

    Beside optax.adam, and beside the bytes that a step must move.

    Example: optgrad bench step adam m_svag --tree one --rounds 5
    """
    from optgrad.experiments.bench import step as lib  # noqa: PLC0415
    from optgrad.experiments.bench import trees  # noqa: PLC0415

    compilation.without_cache()  # reading a program back is not what is measured
    with terminal.refusals():
        chosen = _methods(methods)
        named = tree or ["one", "hundred"]
        for name in named:
            trees.get_tree(name)
        checks.check_one_of("param_dtype", param_dtype, lib.DTYPES)
        checks.check_one_of("state_dtype", state_dtype, lib.STATE_DTYPES)
        settings = [lib.Setting(name, param_dtype, state_dtype, rounds) for name in named]
        _check_output(output, overwrite)
        tables: list[Any] = []
        notes: list[str] = []
        for setting in settings:
            title = f"{trees.get_tree(setting.tree).title}, {param_dtype}"
            if state_dtype != "default":
                title += f", state {state_dtype}"
            rows = lib.costs(chosen, setting, with_peers=peers, on_note=notes.append)
            tables.append(_table(title, lib, rows))
        asked = {
            "methods": [m.name for m in chosen], "tree": named, "param_dtype": param_dtype,
            "state_dtype": state_dtype, "rounds": rounds, "peers": peers,
        }  # fmt: skip
        _finish("step", tables, notes, asked, output, overwrite)


@app.command("compile")
def compile_(
    methods: Methods = None,
    leaves: Annotated[
        list[int] | None, typer.Option(min=1, help="How many; repeatable.", metavar="N")
    ] = None,
    saving_memory: Annotated[
        bool, typer.Option("--saving-memory", help="XLA's schedule of accelerators, on a CPU.")
    ] = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time the compilation of a step.

    Also counts the copies, temporaries and instructions of the program.

    Example: optgrad bench compile m_svag --leaves 100
    """
    from optgrad.experiments.bench import compilation as lib  # noqa: PLC0415

    compilation.without_cache()
    with terminal.refusals():
        chosen, counts = _methods(methods), leaves or [100, 400]
        _check_output(output, overwrite)
        tables: list[Any] = []
        notes: list[str] = []
        for count in counts:
            title = f"{count} leaves of {lib.LEAF}"
            rows = lib.costs(chosen, count, saving_memory=saving_memory, on_note=notes.append)
            tables.append(_table(title, lib, rows))
        asked = {
            "methods": [m.name for m in chosen], "leaves": counts, "saving_memory": saving_memory,
        }  # fmt: skip
        _finish("compile", tables, list(dict.fromkeys(notes)), asked, output, overwrite)


@app.command("sweep")
def sweep(  # noqa: PLR0917  typer reads the options from the signature
    method: Annotated[
        str,
        typer.Argument(help="A name from 'optgrad list'.",
                       autocompletion=cli_names.beginning(cli_names.methods)),
    ] = "momentum",
    dataset: Annotated[
        str,
        typer.Option(help="digits, mnist, cifar10, …", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.datasets)),
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(help="mlp, mlp_small, cifar10_cnn, …", metavar="NAME",
                     autocompletion=cli_names.beginning(cli_names.models)),
    ] = "mlp_small",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.", metavar="N")] = 64,
    runs: Annotated[
        list[int] | None, typer.Option(min=1, help="How many; repeatable.", metavar="N")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Between two evaluations.", metavar="N")
    ] = 100,
    rounds: Rounds = 7,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data set.", metavar="DIR")
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Time runs that go together in one program.

    Beside the same runs, one after the other.

    Example: optgrad bench sweep m_svag --runs 1 --runs 8
    """
    from optgrad.experiments import data, problems  # noqa: PLC0415
    from optgrad.experiments.bench import sweep as lib  # noqa: PLC0415

    compilation.without_cache()
    with terminal.refusals():
        record, widths = registry.get_method(method), runs or [1, 2, 4, 8, 16]
        _check_output(output, overwrite)
        problem = problems.image_classification(
            data.load(dataset, data_dir), model, batch_size=batch_size
        )
        title = f"{method}, {model} on {dataset}, batches of {batch_size}"
        rows = lib.costs(problem, record, widths, steps=steps, rounds=rounds)
        table = _table(title, lib, rows)
        asked = {
            "method": method, "dataset": dataset, "model": model, "batch_size": batch_size,
            "runs": widths, "steps": steps, "rounds": rounds,
        }  # fmt: skip
        _finish("sweep", [table], [], asked, output, overwrite)


cli_commands.finish(app)


def _methods(names: Sequence[str] | None) -> "list[Method]":
    return [registry.get_method(name) for name in names] if names else list(registry.methods())


def _check_output(folder: Path | None, overwrite: bool) -> None:
    if folder:
        from optgrad.experiments import results  # noqa: PLC0415

        results.check_destination(folder, overwrite=overwrite)


def _table(title: str, lib: Any, rows: Iterable[Any]) -> Any:
    """The rows of one of the benchmarks' modules; how many there are is shown on the way."""
    from optgrad.experiments.bench import output  # noqa: PLC0415

    records = []
    with terminal.progress() as on_progress:
        on_progress(title, 0)
        for row in rows:
            records.append(row)
            on_progress(f"{title}: {len(records)} done", len(records))
    cells = [lib.cells(record) for record in records]
    return output.Table(title, lib.HEADER, cells, records, lib.SHOWN)


def _finish(  # noqa: PLR0917  what, where, how
    name: str,
    tables: Sequence[Any],
    notes: Sequence[str],
    asked: dict[str, Any],
    folder: Path | None,
    overwrite: bool,
) -> None:
    from optgrad.experiments.bench import output  # noqa: PLC0415

    for table in tables:
        header, *rows = ([row[i] for i in table.shown] for row in (table.header, *table.cells))
        terminal.console.print(terminal.table(header, rows, title=table.title))
    for note in notes:
        terminal.console.print(f"Not measured: {note}", markup=False, highlight=False)
    if folder:
        output.write(name, tables, notes, asked, folder, overwrite=overwrite)
        terminal.console.print(f"Markdown and JSON: {folder}", highlight=False, soft_wrap=True)

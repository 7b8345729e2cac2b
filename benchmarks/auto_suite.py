"""The studies behind `optgrad.auto`: run them, and make the evidence of what they left.

    python benchmarks/auto_suite.py run [NAMES…] --output FOLDER [--data-dir DATA]
    python benchmarks/auto_suite.py evidence FOLDER --output docs/results/auto

A study is a file of configs/auto, a problem with its batch size and budget. It is run with each
group of configs/auto/optimizers, into FOLDER/STUDY/GROUP, a results folder of `optgrad compare`.
What is finished there is left alone, what was interrupted goes on: repeat the command. The quick
studies come first. ``--suite full`` has the scale of configs/auto/full, for an accelerator;
``--suite held_out`` has problems on which nothing was chosen.
"""

import argparse
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import auto_evidence
import jax

import optgrad
from optgrad.experiments import (
    checkpoint,
    compare,
    compilation,
    config,
    results,
    user_problems,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "auto"
SUITES = {"chosen_on": CONFIGS, "full": CONFIGS / "full", "held_out": CONFIGS / "held_out"}
# Group -> the file of its optimizers, and what is set beside it.
GROUPS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "auto": ("auto", {}),
    "parameter_free": ("parameter_free", {}),
    "constant": ("tuned", {}),
    "cosine": ("tuned", {"schedule.kind": "cosine"}),
}
QUICK_FIRST = ("quadratic", "rosenbrock", "logistic", "digits", "embedding", "attention", "mnist",
               "cifar10", "all_cnn")  # fmt: skip
STEPS = "steps"  # in the place of a hyperparameter's value: how many the study has


def study_files(folder: Path) -> dict[str, Path]:
    """Name -> file of every study in a folder, the quick ones first."""

    def place(name: str) -> tuple[int, str]:
        starts = (i for i, start in enumerate(QUICK_FIRST) if name.startswith(start))
        return next(starts, len(QUICK_FIRST)), name

    names = sorted((path.stem for path in folder.glob("*.toml")), key=place)
    return {name: folder / f"{name}.toml" for name in names}


def settings_of(study: Path, group: str) -> config.CompareConfig:
    """The configuration of a study with the optimizers of a group, as far as they are registered.

    Raises:
      LookupError: none of them is.
    """
    problem = tomllib.loads(study.read_text(encoding="utf-8"))
    file, overrides = GROUPS[group]
    found = tomllib.loads((CONFIGS / "optimizers" / f"{file}.toml").read_text(encoding="utf-8"))
    optimizers = _with_steps(_registered(found.pop("optimizers")), problem["steps"])
    if not optimizers:
        raise LookupError(f"no optimizer of {group} is registered")
    return config.load_config(study, {**dict(_flat(found)), **overrides, "optimizers": optimizers})


def _registered(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    known = {method.name for method in optgrad.methods()}
    tables = [{"method": o} if isinstance(o, str) else o for o in optimizers]
    return [table for table in tables if table["method"] in known]


def _with_steps(optimizers: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """With the study's number of steps where its name stands among the hyperparameters."""
    found = []
    for table in optimizers:
        given = table.get("hyperparams", {})
        given = {name: steps if value == STEPS else value for name, value in given.items()}
        found.append({**table, "hyperparams": given})
    return found


def _flat(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names -> values, of tables within a table."""
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def run_group(settings: config.CompareConfig, folder: Path, *, again: bool) -> float | None:
    """Runs a study's group to its end, from where it was interrupted; seconds, None if it is there.

    Args:
      settings: what to run.
      folder: where its results go.
      again: whether results and unfinished runs that are there are thrown away.
    """
    if (folder / results.SUMMARY).is_file() and not again:
        before = config.load_config(folder / results.MARKER)
        if _what_counts(before) != _what_counts(settings):
            print(f"{folder} was run with other settings; --again runs it anew", flush=True)
        return None
    begun = time.perf_counter()
    study = {"config": settings.model_dump(mode="json"),
             "environment": results.describe_environment()}  # fmt: skip
    is_unfinished = (checkpoint.partial_folder(folder) / "study.json").is_file()
    if is_unfinished and not again:
        opened = checkpoint.resume(folder)
    else:
        opened = checkpoint.begin(folder, study, anew=again)
    with opened as journal:
        if journal.study["config"] != study["config"]:
            raise checkpoint.CheckpointError(
                f"{journal.folder} was begun with other settings; accepted: the same, or --again"
            )
        found = compare.run_comparison(settings, journal=journal)
        results.write(found, folder, overwrite=again)
        journal.discard()
    return time.perf_counter() - begun


def _what_counts(settings: config.CompareConfig) -> dict[str, Any]:
    """Without places on a machine, and what a finished study has resolved."""
    found = settings.model_dump(mode="json", exclude={"output", "data_dir"})
    if own := user_problems.file_of(settings.problem):
        found["problem"] = own[0].read_text(encoding="utf-8"), own[1]
    found["tuning"].pop("select_by")
    return found


def run(arguments: argparse.Namespace) -> None:
    """Runs what is chosen and not finished; a line for each group of a study."""
    compilation.cache_on_disk()
    if arguments.data_dir:
        os.environ["OPTGRAD_DATA_DIR"] = str(arguments.data_dir)  # for small_cifar10.py, too
    files = study_files(SUITES[arguments.suite])
    beginnings = tuple(arguments.names) or ""
    chosen = {name: path for name, path in files.items() if name.startswith(beginnings)}
    if not chosen:
        raise SystemExit(f"NAMES = {arguments.names}; accepted: beginnings of {', '.join(files)}")
    for name, path in chosen.items():
        for group in arguments.groups:
            folder = arguments.output / name / group
            try:
                settings = settings_of(path, group)
            except LookupError as error:
                print(f"{name}: {error}", flush=True)
                continue
            seconds = run_group(settings, folder, again=arguments.again)
            took = "is finished" if seconds is None else f"took {seconds:.0f} s"
            print(f"{name}, {group}: {took}", flush=True)
            jax.clear_caches()  # else the data of every study so far would be kept


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="run studies that are not finished")
    running.add_argument("names", nargs="*", metavar="NAMES", help="beginnings; default: all")
    running.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    running.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    running.add_argument("--data-dir", type=Path, default=None, metavar="DATA")
    running.add_argument("--again", action="store_true", help="what is finished, too")
    running.set_defaults(command=run)
    showing = commands.add_parser("evidence", help="tables and figures of the finished studies")
    showing.add_argument("folder", type=Path, metavar="FOLDER")
    showing.add_argument("--output", type=Path, required=True)
    showing.set_defaults(
        command=lambda a: auto_evidence.write(
            a.folder, list(study_files(SUITES[a.suite])), a.output
        )
    )
    for command in (running, showing):
        command.add_argument("--suite", choices=SUITES, default="chosen_on")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()

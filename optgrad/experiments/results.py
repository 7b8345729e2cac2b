"""A results folder, written whole or not at all.

That of a comparison holds:

``config.toml`` (resolved: the same command again), ``metrics.csv`` (every run at every evaluation),
``summary.csv``, ``summary.json`` (with the configuration, the environment and who is ahead),
``environment.json``, the pictures as SVG and PNG, ``report.md``;
with ``tensorboard`` event files below a folder of that name; and of a user's problem the Python
file.
"""

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tomli_w

import optgrad
from optgrad.experiments import event_files, plots, report, user_problems
from optgrad.experiments.compare import Comparison
from optgrad.experiments.config import CompareConfig

MARKER = "config.toml"  # a folder with it was written by optgrad
SUMMARY, METRICS = "summary.json", "metrics.csv"
FORMAT = 1  # of summary.json and metrics.csv; 'optgrad report' reads this one
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


class ResultsError(RuntimeError):
    """A results folder that cannot or may not be written."""


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raises before any work if the results could not be written to ``folder`` afterwards.

    Raises:
      ResultsError: if it exists (unless it holds results and ``overwrite`` is set), or its parent
        cannot be written to.
    """
    if folder.resolve() == Path.cwd():
        raise ResultsError(f"output = {folder} is the current folder; accepted: a folder below it")
    try:
        if folder.exists():
            is_results = folder.is_dir() and (folder / MARKER).is_file()
            is_empty = folder.is_dir() and not any(folder.iterdir())
            if not is_empty and not (overwrite and is_results):
                remedy = (
                    "choose another, or let --overwrite replace it"
                    if is_results
                    else "it was not written by optgrad: choose another"
                )
                raise ResultsError(f"output = {folder} exists already; {remedy}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise ResultsError(f"output = {folder} cannot be written: {error}") from error


def default_folder(config: CompareConfig) -> Path:
    """``results/<data set or problem>-<time>``, below the current folder."""
    place = user_problems.file_of(config.problem)
    return default_folder_of(place[0].stem if place else config.problem or config.dataset)


def default_folder_of(name: str) -> Path:
    """``results/<name>-<time>``, below the current folder."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results") / f"{name}-{now}"


def write(comparison: Comparison, folder: Path, *, overwrite: bool = False) -> None:
    """Writes the results folder of a comparison."""
    write_folder(folder, lambda prepared: _write_files(comparison, prepared), overwrite=overwrite)


def write_folder(
    folder: Path, write_files: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Writes a results folder whole or not at all: prepared beside its place, then renamed into it.

    Args:
      folder: its place.
      write_files: writes the files into the folder that it is given, ``config.toml`` among them.
      overwrite: whether an earlier results folder may be replaced.

    Raises:
      ResultsError: if the folder cannot or may not be written.
    """
    check_destination(folder, overwrite=overwrite)
    prepared = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        prepared.chmod(0o755)
        write_files(prepared)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / "results")
            try:
                os.replace(prepared, folder)
            except OSError:
                os.replace(old / "results", folder)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.replace(prepared, folder)
    except OSError as error:
        raise ResultsError(f"output = {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(prepared, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had prepared for a results folder that is there now.

    For the one process that may write the folder: another would lose what it prepares.
    """
    prepared = re.compile(rf"\.{re.escape(folder.name)}\.(old\.)?[a-z0-9_]{{8}}")
    for path in folder.parent.iterdir():
        if prepared.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _write_files(comparison: Comparison, folder: Path) -> None:
    config = comparison.config.model_dump(mode="json", exclude_none=True)
    for place in ("output", "data_dir"):  # where things lie on this machine determines no number
        config.pop(place, None)
    if own := user_problems.file_of(comparison.config.problem):
        path, function = own
        shutil.copyfile(path, folder / path.name)
        config["problem"] = f"{path.name}:{function}"  # found beside the configuration
    (folder / MARKER).write_text(tomli_w.dumps(config), encoding="utf-8")
    rows = [
        {"optimizer": outcome.config.label, **row}
        for outcome in comparison.outcomes
        for stage in outcome.stages
        for row in stage.rows()
    ]
    write_csv(folder / METRICS, rows)
    summary = comparison.summary()
    write_csv(folder / "summary.csv", summary)
    environment = describe_environment()
    write_json(folder / "environment.json", environment)
    everything = {
        "format": FORMAT,
        "problem": comparison.problem,
        "score": dataclasses.asdict(comparison.score),
        "target": comparison.target,
        "config": config,
        "environment": environment,
        "summary": summary,
        "ranking": dataclasses.asdict(comparison.ranking()),
    }
    write_json(folder / SUMMARY, everything)
    for name, figure in plots.figures(comparison).items():
        for suffix in ("svg", "png"):
            plots.save(figure, folder / f"{name}.{suffix}")
    if comparison.config.tensorboard:
        event_files.write(comparison, folder / event_files.FOLDER)
    text = report.markdown(comparison, environment)
    (folder / "report.md").write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """A tree of plain values as JSON, null for NaN and infinity."""
    text = json.dumps(plain_json(content), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def plain_json(content: Any) -> Any:
    """The same tree with null for NaN and infinity, which JSON has not."""
    return jax.tree.map(
        lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, content
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One record a line, under the keys of all records; empty where one has no such key."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def describe_environment() -> dict[str, str]:
    """Versions, device and source revision that the numbers were measured with."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    device = jax.devices()[0]
    return {
        "optgrad": optgrad.__version__,
        "revision": _revision(),
        **versions,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}, {os.cpu_count()} cores",
        "device": f"{device.platform} {device.device_kind}",
    }


def _revision() -> str:
    """The git revision of the package's source, where it is a checkout.

    A package that is installed below somebody's checkout is not tracked by it.
    """
    file = Path(optgrad.__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return found.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"

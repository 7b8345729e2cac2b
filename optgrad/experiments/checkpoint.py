"""An unfinished study on disk: what its runs have measured, and the state of those that run.

While a study runs, ``NAME.partial`` lies beside the results folder ``NAME`` that it will write:

- ``study.json``: everything that the study follows from,
- ``decisions.json``: what depended on the machine, such as how many runs go together,
- ``waves.jsonl``: one line for each finished wave (runs that go through the program together),
- ``state/``: an orbax checkpoint of the wave that runs, with all that it has measured,
- ``lock``: held by the process that works there.

Tuning is a function of what the runs measured. So a study is resumed by beginning it again: waves
that are finished are read instead of trained, the one that was running goes on from its state, and
all numbers are those of a study that was never interrupted.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

SUFFIX = ".partial"
_STUDY, _WAVES, _STATE, _LOCK = "study.json", "waves.jsonl", "state", "lock"
_DECISIONS = "decisions.json"

Records = list[list[dict[str, float]]]  # of each run, one record per evaluation


class CheckpointError(RuntimeError):
    """An unfinished study that cannot be read, written or gone on with."""


def partial_folder(results: Path) -> Path:
    """Where the unfinished study of a results folder lies; ``results`` may be that folder itself.

    Examples:
      >>> partial_folder(Path("results/mnist")).as_posix()
      'results/mnist.partial'
    """
    return results if results.name.endswith(SUFFIX) else results.with_name(results.name + SUFFIX)


class Journal:
    """The folder of an unfinished study, locked while the object is open.

    Made by `begin` and `resume`, which are context managers.

    Attributes:
      folder: its place.
      study: what `begin` was given.
    """

    def __init__(self, folder: Path, study: Mapping[str, Any], *, seconds: float) -> None:
        self.folder, self.study = folder, study
        self._seconds = seconds
        self._saved_at = time.monotonic()
        with _reported(folder):
            self._finished = _read_waves(folder / _WAVES)
            decisions = folder / _DECISIONS
            self._decisions = json.loads(decisions.read_text()) if decisions.exists() else {}
            (folder / _STATE).mkdir(exist_ok=True)
            # Not left to orbax: its thread would look for them after the folder is gone.
            for unfinished in (folder / _STATE).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(
                (folder / _STATE).resolve(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    enable_async_checkpointing=False,
                    create=False,  # which it refuses to do for one of several processes
                    multiprocessing_options=_alone(),
                ),
            )

    def decide(self, label: str, name: str, make: Callable[[], Any]) -> Any:
        """What was decided before, or now is: JSON that depends on more than the configuration."""
        of_label = self._decisions.setdefault(label, {})
        if name not in of_label:
            of_label[name] = make()
            with _reported(self.folder):
                _replace(self.folder / _DECISIONS, self._decisions)
        return of_label[name]

    def finished(self, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a finished wave left: its ``records`` and ``seconds``.

        Raises:
          CheckpointError: if another wave was finished in its place.
        """
        found = self._finished.get((key["label"], key["number"]))
        if found is not None and found["key"] != key:
            raise CheckpointError(
                f"{self.folder} holds another study: wave {key['number']} of {key['label']} was "
                f"{found['key']}, and now is {dict(key)}; accepted: the study that began there"
            )
        return found

    def finish(self, key: Mapping[str, Any], records: Records, seconds: float) -> None:
        """Notes that a wave is finished."""
        line = json.dumps({"key": key, "records": records, "seconds": seconds})
        with _reported(self.folder), open(self.folder / _WAVES, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, key: Mapping[str, Any], state: Any, records: Records, seconds: float) -> None:
        """Keeps the state of the wave that runs; not if the last time is too short ago."""
        if not self.is_due:
            return
        about = {"text": json.dumps({"key": key, "records": records, "seconds": seconds})}
        number = (self._manager.latest_step() or 0) + 1
        with _reported(self.folder):
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_leaves(state)), about=ocp.args.JsonSave(about)
                ),
            )
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last time that a state was kept is long enough ago."""
        return time.monotonic() - self._saved_at >= self._seconds

    def load(self, key: Mapping[str, Any], like: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """The state and records of the wave that ran, if it is the one of this key."""
        number = self._manager.latest_step()
        if number is None:
            return None
        with _reported(self.folder):
            found = self._manager.restore(
                number, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )
            about = json.loads(found["about"]["text"])
            if about["key"] != key:
                return None
            found = self._manager.restore(
                number, args=ocp.args.Composite(state=ocp.args.StandardRestore(_leaves(like)))
            )
        return _with_leaves(like, found["state"]), about

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be lost with it."""
        return not (self.folder / _WAVES).exists() and self._manager.latest_step() is None

    def close(self) -> None:
        """Waits for orbax' threads, which look into the folder, and ends them."""
        self._manager.close()

    def discard(self) -> None:
        """Removes the folder, for the study is finished."""
        self.close()
        shutil.rmtree(self.folder)


class Keeper(Protocol):
    """What keeps waves: a `Journal`, or what stands for it where several processes share one."""

    def decide(self, label: str, name: str, make: Callable[[], Any]) -> Any:
        """As `Journal.decide`."""

    def finished(self, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """As `Journal.finished`."""

    def finish(self, key: Mapping[str, Any], records: Records, seconds: float) -> None:
        """As `Journal.finish`."""

    def save(self, key: Mapping[str, Any], state: Any, records: Records, seconds: float) -> None:
        """As `Journal.save`."""

    def load(self, key: Mapping[str, Any], like: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """As `Journal.load`."""


class Waves:
    """The waves of one optimizer, in the order in which they come whenever the study is begun.

    Args:
      journal: where they are kept; None keeps nothing.
      label: the optimizer's.
    """

    def __init__(self, journal: Keeper | None = None, label: str = "") -> None:
        self._journal, self._label, self._count = journal, label, 0

    def decide(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON that is made once, even if the study is interrupted: see `Journal.decide`."""
        return self._journal.decide(self._label, name, make) if self._journal else make()

    def next(self, hyperparams: Mapping[str, np.ndarray], seeds: np.ndarray, steps: int) -> "Wave":
        """The next wave: these runs, for so many steps."""
        key = {
            "label": self._label,
            "number": self._count,
            "hyperparams": {k: np.atleast_1d(v).tolist() for k, v in hyperparams.items()},
            "seeds": np.atleast_1d(seeds).tolist(),
            "steps": steps,
        }
        self._count += 1
        return Wave(self._journal, key)


class Wave:
    """Runs that advance together: what is known of them from before, and what is to be kept."""

    def __init__(self, journal: Keeper | None, key: Mapping[str, Any]) -> None:
        self._journal, self._key = journal, key
        self._began = time.perf_counter()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Spent on it so far, before interruptions too."""
        return self._earlier + time.perf_counter() - self._began

    def finished(self) -> Records | None:
        """What it measured, if it is finished already."""
        found = self._journal.finished(self._key) if self._journal else None
        if found is None:
            return None
        self._began, self._earlier = time.perf_counter(), found["seconds"]
        records: Records = found["records"]
        return records

    def load(self, like: Any) -> tuple[Any, Records] | None:
        """Its state and what it has measured, where it was interrupted."""
        found = self._journal.load(self._key, like) if self._journal else None
        if found is None:
            return None
        state, about = found
        self._earlier = about["seconds"]
        return state, about["records"]

    def save(self, state: Any, records: Records) -> None:
        """Keeps its state, after an evaluation."""
        if self._journal:
            self._journal.save(self._key, state, records, self.seconds)

    def finish(self, records: Records) -> None:
        """Keeps what it measured, after the last step."""
        if self._journal:
            self._journal.finish(self._key, records, self.seconds)


@contextlib.contextmanager
def begin(
    results: Path, study: Mapping[str, Any], *, seconds: float = 5.0, anew: bool = False
) -> Iterator[Journal]:
    """Begins a study whose results will be written to ``results``; it is locked within.

    A study that ends with an error before it has measured anything leaves nothing behind.

    Args:
      results: the results folder to be.
      study: everything that it follows from, as JSON.
      seconds: at least so long from one checkpoint of the running state to the next; 0 is one
        at every evaluation.
      anew: whether an unfinished study that lies there is thrown away.

    Raises:
      CheckpointError: if an unfinished study is there, or another process works on it, or the
        folder cannot be written.
    """
    folder = partial_folder(results)
    with _locked(folder):
        if (folder / _STUDY).exists() and not anew:
            raise CheckpointError(
                f"{folder} holds an unfinished study; go on with it: optgrad resume {results}, or "
                "begin anew: --overwrite"
            )
        with _reported(folder):
            for name in (_STUDY, _WAVES, _DECISIONS):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / _STATE, ignore_errors=True)
        journal = None
        try:
            with _reported(folder):
                _replace(folder / _STUDY, study)
            with contextlib.closing(Journal(folder, study, seconds=seconds)) as journal:
                yield journal
        except BaseException as error:
            # A Ctrl-C may come before there is a journal; after another error there one can resume.
            is_empty = isinstance(error, KeyboardInterrupt) if journal is None else journal.is_empty
            if is_empty:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def resume(results: Path, *, seconds: float = 5.0) -> Iterator[Journal]:
    """Goes on with an unfinished study.

    Args:
      results: the results folder to be, or the ``.partial`` one beside it.
      seconds: as for `begin`.

    Raises:
      CheckpointError: if there is none, or another process works on it.
    """
    folder = partial_folder(results)
    if not (folder / _STUDY).is_file():
        finished = f", and {results} is there: its study is finished" if results.exists() else ""
        raise CheckpointError(f"there is no unfinished study in {folder}{finished}")
    with _locked(folder):
        try:
            study = json.loads((folder / _STUDY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / _STUDY} cannot be read: {error}") from error
        with contextlib.closing(Journal(folder, study, seconds=seconds)) as journal:
            yield journal


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however that ends."""
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / _LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"another process works in {folder}; wait for it, or choose another output"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
        if folder.exists() and not (folder / _STUDY).exists():  # it never began
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """What goes wrong on the disk as an error that says what is safe."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # orbax and tensorstore have many, of many lines
        what = (str(error) or type(error).__name__).splitlines()[0].rstrip(":;. ")
        raise CheckpointError(
            f"checkpoint in {folder}: {what}; the last good one is kept: once the disk can be "
            "written, go on with optgrad resume"
        ) from error


def _alone() -> Any:
    """Of several processes the first alone keeps checkpoints; orbax would wait for the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def _replace(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    prepared = path.with_name(path.name + ".new")
    prepared.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(prepared, path)


def _read_waves(path: Path) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The finished waves; a last line that was cut off in the writing is taken away."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    if not path.exists():
        return found
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            wave = json.loads(line)
            found[wave["key"]["label"], wave["key"]["number"]] = wave
            whole += len(line)
    os.truncate(path, whole)
    return found


def replay(
    records: Records, eval_every: int, on_interval: Callable[[int, int, dict[str, float]], None]
) -> None:
    """Reports what was measured before an interruption, as (run, step, metrics)."""
    for row, run in enumerate(records):
        for index, record in enumerate(run):
            on_interval(row, index * eval_every, record)


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by number; empty ones are left out, which orbax refuses."""
    leaves: Sequence[Any] = jax.tree.leaves(tree)
    return {str(i): x for i, x in enumerate(leaves) if x.size}


def _with_leaves(like: Any, found: Mapping[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [found.get(str(i), x) for i, x in enumerate(leaves)])

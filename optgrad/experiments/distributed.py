"""Several processes that run one study together: JAX's own runtime connects them.

Every process runs the same program on the global mesh. The first alone keeps the journal, prints
and writes results; what it reads from there it tells the others, so that all take the same way.
"""

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optgrad.experiments.checkpoint import Journal, Records

AUTO = "auto"


def initialize(
    coordinator: str | None, processes: int | None, process: int | None, *, timeout: int = 300
) -> None:
    """Meets the other processes; before anything is computed.

    What is None is found out by JAX, from a cluster that it knows or its environment variables.
    JAX ends the process, with a message of its own, if the others do not come in time.

    Args:
      coordinator: HOST:PORT of the first process, or ``"auto"``.
      processes: how many there are.
      process: which of them this is, from 0.
      timeout: seconds that they wait for each other.

    Raises:
      ValueError: for an address or numbers that cannot be.
    """
    address = None if coordinator == AUTO else coordinator
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator = {address!r}; accepted: HOST:PORT, or auto on a cluster")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(
            f"process-id = {process} of num-processes = {processes}; accepted: 0 to {processes - 1}"
        )
    print(
        f"optgrad: process {AUTO if process is None else process} waits for the others at "
        f"{address or 'the address that JAX finds'}, {timeout} s at most",
        file=sys.stderr,
        flush=True,
    )
    # For processes on CPUs; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call]
    try:
        jax.distributed.initialize(address, processes, process, initialization_timeout=timeout)
    except ValueError as error:
        raise ValueError(
            f"{error} Accepted: --coordinator HOST:PORT --num-processes N --process-id I, or on a "
            "cluster that JAX knows --coordinator auto"
        ) from None


def process_count() -> int:
    """How many processes run together."""
    return int(jax.process_count())


def is_first() -> bool:
    """Whether this process prints and writes: the only one, or the first of several."""
    return bool(jax.process_index() == 0)


@contextmanager
def ended_together() -> Iterator[None]:
    """Ends this process at once on an error: at a usual end it would wait for the others.

    They wait for its numbers and get an error instead, when its connections close.
    """
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            code = 1
            if isinstance(error, jax.errors.JaxRuntimeError):
                first_line = str(error).splitlines()[0]
                print(f"optgrad: another process ended, or this one: {first_line}", file=sys.stderr)
            else:
                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def broadcast(content: Any) -> Any:
    """JSON of the first process, on all."""
    return json.loads(_broadcast_bytes(json.dumps(content).encode()))


def check_agreement(own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Refuses processes that were not started alike.

    Args:
      own: the configuration of this process, as JSON.
      first: that of the first process.

    Raises:
      ValueError: naming what differs.
    """
    elsewhere = {"data_dir", "output"}  # which may differ from machine to machine
    for name in sorted({*own, *first} - elsewhere):
        if own.get(name) != first.get(name):
            raise ValueError(
                f"{name} = {own.get(name)!r} in this process, and {first.get(name)!r} in process "
                "0; accepted: the same command in all processes"
            )


class SharedJournal:
    """A `Journal` of the first process that all processes consult alike.

    Args:
      journal: None in the others.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal

    def decide(self, label: str, name: str, make: Callable[[], Any]) -> Any:
        """As `Journal.decide`; the first process decides."""
        return broadcast(self._journal.decide(label, name, make) if self._journal else None)

    def finished(self, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """As `Journal.finished`."""
        found: Mapping[str, Any] | None = broadcast(
            self._journal.finished(key) if self._journal else None
        )
        return found

    def finish(self, key: Mapping[str, Any], records: Records, seconds: float) -> None:
        """As `Journal.finish`."""
        if self._journal:
            self._journal.finish(key, records, seconds)

    def save(self, key: Mapping[str, Any], state: Any, records: Records, seconds: float) -> None:
        """As `Journal.save`; the state is brought to the first process."""
        if not broadcast(self._journal.is_due if self._journal else None):
            return
        whole = multihost_utils.process_allgather(state, tiled=True)
        if self._journal:
            self._journal.save(key, whole, records, seconds)

    def load(self, key: Mapping[str, Any], like: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """As `Journal.load`; arrays of NumPy."""
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        found = self._journal.load(key, like) if self._journal else None
        about = broadcast(found[1] if found else None)
        if about is None:
            return None
        leaves, structure = jax.tree.flatten(found[0] if found else like)
        content = _broadcast_bytes(b"".join(np.asarray(x).tobytes() for x in leaves))
        ends = np.cumsum([0, *(x.size * x.dtype.itemsize for x in leaves)])
        parts = [content[a:b] for a, b in itertools.pairwise(ends)]
        read = [
            np.frombuffer(part, x.dtype).reshape(x.shape)
            for part, x in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, read), about

    @property
    def is_empty(self) -> bool:
        """As `Journal.is_empty`; True in processes without it."""
        return self._journal is None or self._journal.is_empty

    def discard(self) -> None:
        """As `Journal.discard`."""
        if self._journal:
            self._journal.discard()


def _broadcast_bytes(content: bytes) -> bytes:
    """Those of the first process, bit for bit."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Powers of two, so that few programs are compiled for it.
    buffer = np.zeros(1 << max(length - 1, 0).bit_length(), np.uint8)
    if is_first():
        buffer[:length] = np.frombuffer(content, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes())

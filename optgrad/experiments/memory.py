"""How many runs fit into the memory of a device together."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import pydantic

from optgrad.experiments.executable import Executable

_SHARE = {"cpu": 0.5}  # of the memory that is there; the rest is for others, and for fragments
_SHARE_ELSEWHERE = 0.9
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container, or "max"


class Plan(NamedTuple):
    """How runs go through a program: so many at a time."""

    width: int
    bytes_per_run: float
    bytes_common: int

    def describe(self, count: int) -> str:
        """One line, for a log and the report."""
        return (
            f"{count} run{'s' if count > 1 else ''}, {_size(self.bytes_per_run)} each beside "
            f"{_size(self.bytes_common)} of data, {self.width} at a time"
        )


def device_bytes() -> int:
    """What runs may take on one device by default.

    0.9 of the memory that JAX has on an accelerator. On a CPU half of the machine's memory, or of
    its container's limit, divided by the number of simulated devices.
    """
    device = jax.local_devices()[0]
    share = _SHARE.get(device.platform, _SHARE_ELSEWHERE)
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(share * stats["bytes_limit"])
    return int(share * _host_bytes() / jax.local_device_count())


def _host_bytes() -> int:
    """The machine's memory, or 8 GB where the system does not say."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        there = 8 * 10**9
    try:
        return min(there, int(_CONTROL_GROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return there


def plan_runs(
    executable: Executable, names: Sequence[str], count: int, limit: int | None = None
) -> Plan:
    """How runs that go together fit into memory.

    Args:
      executable: their program, compiled for runs that go together.
      names: of their hyperparameters.
      count: how many there are.
      limit: bytes of one device; None: `device_bytes`.
    """
    mesh, data = executable.program.mesh, executable.program.problem.data
    return plan(
        count,
        limit or device_bytes(),
        sum(x.nbytes for x in jax.tree.leaves(data)),
        lambda width: executable.memory_bytes(names, width),
        multiple=mesh.runs if mesh else 1,
    )


def plan(
    count: int, limit: int, common: int, bytes_at: Callable[[int], int], multiple: int = 1
) -> Plan:
    """The fewest waves of equal width that keep within the limit; one run at least.

    Args:
      count: how many runs there are.
      limit: bytes of one device.
      common: bytes that do not depend on the runs, which ``bytes_at`` contains.
      bytes_at: width -> bytes on one device; to be asked rarely, for it compiles.
      multiple: of which the width is one; so many devices share the runs.

    Examples:
      >>> plan(10, 1000, 100, lambda width: 100 + 200 * width)[:2]  # 4 fit: 10 = 4 + 3 + 3
      (4, 200.0)
      >>> plan(6, 1000, 100, lambda width: 100 + 200 * width)[:2]  # 6 = 3 + 3
      (3, 200.0)
    """

    def rounded(width: float) -> int:
        return max(1, -(-int(width) // multiple)) * multiple

    width = rounded(count)
    found = bytes_at(width)
    while found > limit and width > multiple:
        least = bytes_at(multiple)
        slope = max(found - least, 1) / (width - multiple)
        fitting = multiple + max(0.0, (limit - least) / slope)
        fitting = max(multiple, min(fitting, width - multiple) // multiple * multiple)
        waves = -(-count // int(fitting))
        width = rounded(-(-count // waves))
        found = bytes_at(width)
    return Plan(width, max(found - common, 0) * multiple / width, common)


def _size(count: float) -> str:
    return pydantic.ByteSize(count).human_readable(decimal=True, separator=" ")

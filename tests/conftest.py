"""Settings of every test: eight simulated CPU devices, 64-bit floats on request, hypothesis."""

# ruff: noqa: E402  the environment is set before jax is imported

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

# Before jax starts its backend; the sharding tests need the devices, the others do not mind.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Most of the time goes into compiling. XLA's older code generator for CPU takes about half of it,
# and gives the same HLO; the benchmarks, the README's main job and the reproductions use the newer.
# A module in one piece takes a twelfth less: the tests' own processes keep the cores busy.
_FASTER = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def _are_known(flags: str) -> bool:
    """Whether this jaxlib has them; unknown flags end the process."""
    environment = {**os.environ, "XLA_FLAGS": flags}
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(probe, env=environment, capture_output=True, check=False).returncode


if _FASTER[0] not in os.environ["XLA_FLAGS"] and "PYTEST_XDIST_WORKER" not in os.environ:
    candidates = (" ".join([os.environ["XLA_FLAGS"], *_FASTER[:n]]) for n in (2, 1))
    os.environ["XLA_FLAGS"] = next(filter(_are_known, candidates), os.environ["XLA_FLAGS"])

from collections.abc import Iterator

import hypothesis
import jax
import pytest

import optgrad

# What LLVM does not optimise compiles in little more than half of the time, too. Neither HLO nor,
# beyond rounding, numbers depend on it. Where training takes longer than compiling: `optimised`.
jax.config.update("jax_disable_most_optimizations", True)

EFFICIENCY = "efficiency"  # the key under which a test records a row of that table

hypothesis.settings.register_profile("optgrad", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "optgrad")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of the contract suite runs; its conftest.py says what is left out, and why."""
    parser.addoption(
        "--contract", choices=("dealt", "kinds", "all"), default="dealt",
        help="dealt (default): variants dealt out among the methods; kinds: one method of "
        "each kind; all: every variant for every method",
    )  # fmt: skip
    parser.addoption(
        "--fuzz-inputs", type=int, default=300, help="damaged files of each kind (default 300)"
    )
    parser.addoption(
        "--record-golden", action="store_true", help="write the golden trajectories anew"
    )
    parser.addoption(
        "--reliability", type=Path, help="write the table of methods and properties into that file"
    )


@pytest.fixture(autouse=True)
def precision_as_found() -> Iterator[None]:
    """No test may change the precision of those after it; a library's import can."""
    before = jax.config.jax_enable_x64
    yield
    after = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", before)
    assert after == before, f"the test left jax_enable_x64 = {after}"


@pytest.fixture
def optimised() -> Iterator[None]:
    """Code as users have it, for tests that run more than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit floats, for the duration of one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


# Most of the time of these methods' tests is compilation: one stage of .ci/run has the time.
_SLOW_FAMILY = {method.name for method in optgrad.methods("curvature")}
_NAMES = ("method", "name", "optimizer")  # of the parameters that may hold a registered method


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves every test that runs for one method of the curvature family to the marker ``slow``."""
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        given = [getattr(values[name], "name", values[name]) for name in _NAMES if name in values]
        if any(isinstance(name, str) and name in _SLOW_FAMILY for name in given):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    """Prints the efficiency table; writes it where ``OPTGRAD_EFFICIENCY_TABLE`` says."""
    reports = [*itertools.chain(*terminalreporter.stats.values())]
    if path := terminalreporter.config.getoption("--reliability"):
        from contract import reliability

        try:
            reliability.check_run(terminalreporter.config)
            reliability.write(path, reports, terminalreporter.config.cache)
        except ValueError as error:
            terminalreporter.write_line(f"{path} was not written: {error}", red=True)
    rows = [
        value
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == EFFICIENCY and getattr(report, "when", None) == "call"
    ]
    if not rows:
        return
    order = {method.name: i for i, method in enumerate(optgrad.methods())}
    rows.sort(key=lambda row: order.get(row["method"], len(order)))
    terminalreporter.section("efficiency of one donated step", sep="-")
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(row[c])) for row in rows)) for c in columns]
    for line in (columns, *([str(row[c]) for c in columns] for row in rows)):
        terminalreporter.write_line(
            "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True))
        )
    if path := os.environ.get("OPTGRAD_EFFICIENCY_TABLE"):
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")

"""Fixtures of the experiments' tests."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from optgrad.experiments import cli, terminal

try:
    import fcntl
except ImportError:  # Windows; unpack.py is safe without the lock, only slower
    fcntl = None

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HOW_TO_GET = (
    "set OPTGRAD_DATA_DIR to a folder that holds mnist/, cifar-10-batches-bin/ and "
    f"cifar-100-binary/, or provide {SHARED_DATA / 'unpack.py'}, which writes them"
)


@pytest.fixture(autouse=True)
def long_runs_are_optimised(request):
    """They are compared with other processes', bit by bit, and run longer than they compile."""
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("optimised")


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process; returns the exit code and all that was printed."""

    def invoke(*arguments, width=160):
        monkeypatch.setattr(terminal, "console", Console(width=width))
        monkeypatch.setattr(terminal, "errors", Console(stderr=True, width=width))
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # a user would see a traceback
        return result.exit_code, result.output

    return invoke


@pytest.fixture(scope="session")
def as_user():
    """Runs ``optgrad`` in a process of its own; the prelude is code that goes before."""

    def start(*arguments, cwd=None, prelude=""):
        code = f"import sys\n{prelude}\nfrom optgrad.__main__ import main\nsys.exit(main())"
        how = ["-c", code] if prelude else ["-m", "optgrad"]
        return subprocess.run(
            [sys.executable, *how, *map(str, arguments)],
            capture_output=True, text=True, encoding="utf-8", cwd=cwd, check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"},
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def real_data_dir():
    """A folder with the real MNIST, CIFAR-10 and CIFAR-100 files, unpacked if need be."""
    if from_environment := os.environ.get("OPTGRAD_DATA_DIR"):
        return Path(from_environment)
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real images are not here: {HOW_TO_GET}")
    folder = Path(tempfile.gettempdir()) / "optgrad-test-data"
    folder.mkdir(exist_ok=True)
    with _locked(folder / ".lock"):  # the next worker then finds all files and only checks them
        run = subprocess.run(
            [sys.executable, SHARED_DATA / "unpack.py", folder],
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        message = f"the real images could not be unpacked: {run.stderr.strip()}; {HOW_TO_GET}"
        # Where the data set is provided and a machine checks, a skip would hide lost coverage.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return folder


@contextmanager
def _locked(path):
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield

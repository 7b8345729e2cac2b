"""The method that a tutorial adds: its diff, applied to a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFF = ROOT / "docs" / "tutorials" / "add_a_method.diff"
NAME = "normalized_sgd"
WHOLE = ("--contract", "all", "-m", "slow or not slow")

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the diff is applied by git")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and its tests, with the method added."""
    folder = tmp_path_factory.mktemp("added")
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache")
    for name in ("optgrad", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    applied = subprocess.run(
        ["git", "apply", str(DIFF)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert applied.returncode == 0, f"{DIFF.name} fits the repository no more: {applied.stderr}"
    return folder


def output_of(folder, module, *arguments):
    """What a module prints when it is run with the copy's optgrad; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def number_passed(folder, *arguments):
    found = output_of(folder, "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments)
    return int(re.search(r"(\d+) passed", found).group(1))


def test_the_command_line_knows_it(copy):
    assert "Hazan" in output_of(copy, "optgrad", "show", NAME)


def test_its_own_tests_and_a_part_of_the_contract(copy):
    """Nothing of the contract names it: it is there because it is registered."""
    own = ("tests/step_size/test_normalized_sgd.py", "optgrad/step_size/normalized_sgd.py")
    files = ("records", "registry", "convergence", "extras")
    contract = [f"tests/contract/test_{name}.py" for name in files]
    assert number_passed(copy, *own, *contract, "--contract", "all", "-k", NAME) > 20


@pytest.mark.slow
def test_the_whole_contract(copy):
    """As CONTRIBUTING has it: the records, then every property."""
    recorded = ("tests/contract/test_golden.py", "tests/core/test_saved_state.py")
    assert number_passed(copy, *recorded, *WHOLE, "-k", NAME, "--record-golden") == 3
    assert number_passed(copy, "tests/contract", *WHOLE, "-k", NAME) > 90

"""Every example of the docstrings and pages prints what it says, or the build fails.

The tests that check them are run before anything is read. ``-D check_examples=0`` leaves them out,
where they have been run already.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_ROOT = Path(__file__).parents[2]
_TESTS = ("optgrad", "tests/test_readme.py")  # doctests of the package; snippets of the pages


def _check(app: Sphinx) -> None:
    if not app.config.check_examples:
        return
    command = [sys.executable, "-m", "pytest", "-q", *_TESTS]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ExtensionError(f"examples differ from what they print:\n{run.stdout[-4000:]}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the check to the beginning of the build."""
    app.add_config_value("check_examples", default=True, rebuild="", types=bool)
    app.connect("builder-inited", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

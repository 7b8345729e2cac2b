"""Modules that the command line imports when they are needed.

``optgrad --help`` and the shell's completion answer at once: JAX takes a second to import, and the
harness with its figures several.
"""

import importlib
from typing import Any


class Later:
    """Stands for a module, which is imported when something of it is first asked for.

    Args:
      name: the module's.

    Examples:
      >>> Later("math").sqrt(4.0)
      2.0
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        """What the module has under that name."""
        return getattr(importlib.import_module(self._name), name)

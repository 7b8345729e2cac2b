"""The Flax harness: tunes, replicates and compares optimizers (extra ``experiments``).

It knows the optimizers only through `optgrad.registry`. For problems of your own: `Problem`,
`Score`, `function_problem`; `create_problem` makes one by its name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optgrad.experiments.catalogue import create_problem
    from optgrad.experiments.function_problems import function_problem
    from optgrad.experiments.problems import Problem
    from optgrad.experiments.scores import Score

__all__ = ["Problem", "Score", "create_problem", "function_problem"]

_HOME = {
    "Problem": "problems",
    "Score": "scores",
    "create_problem": "catalogue",
    "function_problem": "function_problems",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the package itself needs no extra."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""A problem of a user's own: one function in a Python file."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from optgrad.core import checks
from optgrad.experiments.problems import Problem

FUNCTION = "problem"  # what the file defines, unless another name is given
_CONTRACT = "accepted: def problem(*, batch_size, …) -> optgrad.experiments.Problem"


def file_of(problem: str) -> tuple[Path, str] | None:
    """The file and function of a user's problem; None for a name.

    Examples:
      >>> file_of("mine.py")[1], file_of("mine.py:other")[1], file_of("saddle")
      ('problem', 'other', None)
    """
    found = re.fullmatch(r"(.+\.py)(?::(\w+))?", problem)
    return (Path(found[1]), found[2] or FUNCTION) if found else None


def load(path: Path, function: str, arguments: Mapping[str, Any]) -> Problem:
    """The problem that a function in a Python file returns.

    Args:
      path: the file; what lies beside it can be imported.
      function: its name.
      arguments: what it is called with.

    Raises:
      ValueError: the file cannot be run, has no such function, refuses the arguments or returns
        something that is no usable problem.
    """
    where = f"problem = '{path}'"
    build = _function(path, function)
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {function}: {error}; {_CONTRACT}") from error
    try:
        found: Problem = build(**arguments)
    except Exception as error:  # whatever a user's code does
        raise ValueError(f"{where}: {_message(error, path)}") from error
    check_problem(found, where)
    return found


def _function(path: Path, function: str) -> Callable[..., Any]:
    name = f"_optgrad_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    sys.path.insert(0, str(path.resolve().parent))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it may be a results folder
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"problem = '{path}' cannot be run: {_message(error, path)}") from error
    finally:
        sys.dont_write_bytecode = before
        sys.path.pop(0)
    found: Any = getattr(module, function, None)
    if not callable(found):
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == name]
        raise ValueError(
            f"problem = '{path}' has no function {function!r}; {checks.did_you_mean(function, own)}"
        )
    build: Callable[..., Any] = found
    return build


def _message(error: Exception, path: Path) -> str:
    """The error, with the last line of the file that it passed through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.resolve()
    ]
    line = f"line {lines[-1]}: " if lines else ""
    return f"{line}{type(error).__name__}: {error}"


def check_problem(problem: Any, where: str = "problem") -> None:
    """Refuses what is no usable `Problem`, by shapes alone: nothing is computed.

    Args:
      problem: what a builder returned.
      where: what to call it in the message.

    Raises:
      ValueError: naming the field that is wrong and what is accepted.
    """
    if not isinstance(problem, Problem):
        kind = type(problem).__name__
        raise ValueError(f"{where} returned {kind}, not a Problem; {_CONTRACT}")
    if "test" not in problem.splits:
        raise ValueError(
            f"{where}: splits = {list(problem.splits)}; accepted: 'test', and if tuning is to have "
            "examples of its own 'validation'"
        )
    key = jax.random.key(0)
    step = jnp.zeros((), jnp.int32)

    def first_batch(data: Any) -> Any:
        drawn = problem.batches(data, key, step, 2)
        return problem.batch(data, jax.tree.map(lambda x: x[0], drawn))

    params = _shapes(where, "init", problem.init, key)
    batch = _shapes(where, "batch", first_batch, problem.data)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{where}: the leaves of a batch begin with {sorted(sizes)}; accepted: one leading "
            "axis, that of the examples, on every leaf"
        )
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)  # type: ignore[no-untyped-call]
    for field, argument in (("loss", batch), ("example_loss", example)):
        value = _shapes(where, field, getattr(problem, field), params, argument)
        if getattr(value, "shape", None) != ():
            raise ValueError(f"{where}: {field} returns {value}; accepted: one number, shape ()")
    for split in problem.splits:
        metrics = _shapes(
            where, "evaluate", lambda p, d, s=split: problem.evaluate(p, d, s, step),
            params, problem.data,
        )  # fmt: skip
        if missing := {"loss", "count", problem.score.metric} - set(metrics):
            raise ValueError(
                f"{where}: evaluate gives {', '.join(sorted(metrics))}; missing: "
                f"{', '.join(sorted(missing))}"
            )


def _shapes(where: str, field: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        raise ValueError(f"{where}: {field} fails: {type(error).__name__}: {error}") from error

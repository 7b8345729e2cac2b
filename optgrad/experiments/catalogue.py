"""The problems that a configuration can name."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from optgrad.core import checks
from optgrad.experiments import (
    function_problems,
    linear_problems,
    quadratics,
    text_problems,
    user_problems,
)
from optgrad.experiments.problems import Problem

_BATCH_SIZE = "batch_size"


@dataclasses.dataclass(frozen=True)
class ProblemKind:
    """A problem by name.

    Attributes:
      name: what a configuration calls it.
      title: one line for menus.
      build: called with ``batch_size`` and the options, returns the problem.
    """

    name: str
    title: str
    build: Callable[..., Problem]

    @property
    def options(self) -> Mapping[str, Any]:
        """Every option and its default.

        Examples:
          >>> dict(problems()["rosenbrock"].options)
          {'dimension': 2, 'noise': 0.0}
        """
        parameters = inspect.signature(self.build).parameters
        return {name: p.default for name, p in parameters.items() if name != _BATCH_SIZE}


_KINDS = {
    kind.name: kind
    for kind in (
        ProblemKind(
            "noisy_quadratic",
            "stochastic quadratic of Balles & Hennig, figure 2",
            quadratics.noisy_quadratic,
        ),
        ProblemKind(
            "yao_convex",
            "½wᵀQw, Q = diag(1000, 1), of Yao, figures 3 and 4",
            function_problems.yao_convex,
        ),
        ProblemKind(
            "rosenbrock",
            "Rosenbrock's function in any dimension; Yao, figures 5 to 9",
            function_problems.rosenbrock,
        ),
        ProblemKind(
            "lattice",
            "2-D and 3-D test functions from the points of Duda's lattices",
            function_problems.lattice,
        ),
        ProblemKind("saddle", "saddles of the second-order survey", function_problems.saddle),
        ProblemKind(
            "sparse_logistic",
            "logistic regression on binary features, most of them rare",
            linear_problems.sparse_logistic,
        ),
        ProblemKind(
            "embedding", "the next word from embeddings of the last", text_problems.embedding
        ),
        ProblemKind(
            "attention", "a small transformer of characters of text", text_problems.attention
        ),
    )
}


def problems() -> dict[str, ProblemKind]:
    """All problems by name.

    Examples:
      >>> list(problems())[:5]
      ['noisy_quadratic', 'yao_convex', 'rosenbrock', 'lattice', 'saddle']
    """
    return dict(_KINDS)


def check_name(problem: str, options: Mapping[str, Any]) -> None:
    """Refuses what can be refused without running a user's file.

    Args:
      problem: a name from ``optgrad problems``, or ``FILE.py`` or ``FILE.py:FUNCTION``.
      options: the arguments that it is to have.

    Raises:
      ValueError: no such problem, file or option.
    """
    if _BATCH_SIZE in options:
        raise ValueError(
            f"problem_options.{_BATCH_SIZE} = {options[_BATCH_SIZE]!r}: no such option; accepted: "
            f"the field {_BATCH_SIZE}"
        )
    if place := user_problems.file_of(problem):
        if not place[0].is_file():
            raise ValueError(f"problem = {problem!r}: there is no file {place[0]}")
        return
    if problem not in _KINDS:
        raise ValueError(
            f"problem = {problem!r} is not accepted; {checks.did_you_mean(problem, _KINDS)}, "
            "or FILE.py or FILE.py:FUNCTION"
        )
    accepted = _KINDS[problem].options
    for name, value in options.items():
        if name not in accepted:
            near = checks.did_you_mean(name, accepted)
            raise ValueError(f"problem_options.{name} = {value!r}: no such option; {near}")


def create_problem(problem: str, *, batch_size: int = 1, **options: Any) -> Problem:
    """A problem by its name, or from a user's file.

    Args:
      problem: a name from ``optgrad problems``, or ``FILE.py`` (its function ``problem``) or
        ``FILE.py:FUNCTION``.
      batch_size: examples per step.
      options: as ``optgrad problems`` or the user's function has them.

    Raises:
      ValueError: whatever is wrong with the name, the file or the options.

    Examples:
      >>> create_problem("saddle", distance=0.5).name
      'saddle from 0.5'
    """
    check_name(problem, options)
    if place := user_problems.file_of(problem):
        return user_problems.load(*place, {_BATCH_SIZE: batch_size, **options})
    try:
        return _KINDS[problem].build(batch_size=batch_size, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"problem_options: {error}") from error

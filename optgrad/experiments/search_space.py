"""Search spaces: which hyperparameters of an optimizer are tuned, and where their values lie."""

import itertools
import math
import numbers
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import qmc

from optgrad import registry

Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = Mapping[str, Any]  # hyperparameter -> value
_DIGITS = 6  # of the values of an interval: what tables show is what was run
_PLAIN = frozenset({bool, int, float, str, type(None)})


class Interval(BaseModel):
    """The values between two ends.

    Attributes:
      low: smallest value; positive on a logarithmic scale.
      high: largest value.
      num: points of a grid, at least two; random and Halton points have their own number.
      scale: ``"log"`` or ``"linear"``.

    Examples:
      >>> Interval(low=1e-3, high=1e-1, num=3).grid()
      (0.001, 0.01, 0.1)
      >>> Interval(low=0.0, high=1.0, scale="linear").at(0.25)
      0.25
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Finite
    high: Finite
    num: Annotated[int, Field(strict=True, ge=2)] = 7
    scale: Literal["log", "linear"] = "log"

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> "Interval":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g}, high = {self.high:g}; accepted: low < high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low = {self.low:g}; accepted: low > 0, or scale = 'linear'")
        return self

    def grid(self) -> tuple[float, ...]:
        """``num`` values from ``low`` to ``high``, both included, less what rounding repeats.

        Examples:
          >>> Interval(low=0.9999, high=0.99999, num=3).grid()
          (0.9999, 0.999944999, 0.99999)
        """
        return tuple(dict.fromkeys(self.at(u) for u in np.linspace(0.0, 1.0, self.num)))

    def at(self, fraction: float) -> float:
        """The value at a fraction in [0, 1] of the way from ``low`` to ``high``."""
        if fraction in {0.0, 1.0}:  # the ends as they were given
            return self.high if fraction else self.low
        if self.scale == "log":
            value = math.exp((1 - fraction) * math.log(self.low) + fraction * math.log(self.high))
        else:
            value = (1 - fraction) * self.low + fraction * self.high
        largest = max(abs(self.low), abs(self.high))
        common = math.floor(math.log10(largest / (self.high - self.low)))  # digits of the two ends
        return min(max(float(f"{value:.{_DIGITS + max(common, 0)}g}"), self.low), self.high)


def _dimension(value: Any) -> Interval | tuple[Any, ...]:
    if isinstance(value, Interval):
        return value
    if isinstance(value, Mapping):
        return Interval.model_validate(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    raise ValueError(
        f"{value!r} is no search space; accepted: a list of values, or a table with low and high "
        "and optionally num and scale"
    )


Dimension = Annotated[Interval | tuple[Any, ...], pydantic.BeforeValidator(_dimension)]
Space = Mapping[str, Interval | tuple[Any, ...]]


def check(method: registry.Method, space: Space, hyperparams: Mapping[str, Any]) -> None:
    """Refuses a space that the method cannot be run over.

    Args:
      method: the optimizer's record.
      space: the hyperparameters that are tuned.
      hyperparams: those that are fixed.

    Raises:
      ValueError: naming the hyperparameter, its value and what is accepted.
    """
    for name, dimension in space.items():
        method.check_hyperparameter(name)
        if name in hyperparams:
            raise ValueError(f"space.{name}: hyperparams.{name} fixes it; accepted: one of the two")
        if isinstance(dimension, tuple):
            _check_choices(method, name, dimension)
        elif name in method.static_args:
            raise ValueError(
                f"space.{name}: a static argument of {method.name}, which is compiled for each of "
                "its values; accepted: a list of values"
            )
    if not space:
        return
    first = {name: _ends(dimension)[0] for name, dimension in space.items()}
    base = {**hyperparams, **first}
    registry.check_hyperparams(method, base)
    for name, dimension in space.items():
        for value in _ends(dimension):
            try:  # a value that the method refuses is found here and not after hours of training
                method.factory(**{**base, name: value})
            except (TypeError, ValueError) as error:
                raise ValueError(f"space.{name} = {value!r}: {error}") from error


def _ends(dimension: Interval | tuple[Any, ...]) -> tuple[Any, ...]:
    """The values whose acceptance shows that all are accepted."""
    return (dimension.low, dimension.high) if isinstance(dimension, Interval) else dimension


def _check_choices(method: registry.Method, name: str, values: tuple[Any, ...]) -> None:
    given = f"space.{name} = {list(values)}"
    if not values or any(a == b for a, b in itertools.combinations(values, 2)):
        raise ValueError(f"{given}; accepted: one or more distinct values")
    if name not in method.static_args:
        if not all(is_number(value) for value in values):
            raise ValueError(f"{given}; accepted: finite numbers")
        return
    kind = _plain_type(method, name)
    if kind is None:
        return
    adapter = pydantic.TypeAdapter(kind)
    for value in values:
        try:
            adapter.validate_python(value, strict=True)
        except pydantic.ValidationError:
            accepted = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{given}: {value!r} is no value of it; accepted: {accepted}") from (
                None
            )


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    return is_real and math.isfinite(float(value))


def _plain_type(method: registry.Method, name: str) -> Any:
    """The annotation of a static argument made of numbers, strings and None, else None."""
    try:
        kind = typing.get_type_hints(method.factory).get(name)
    except (NameError, TypeError):  # of optax, whose names are hidden from the interpreter
        kind = type(method.hyperparameters[name].default)
    leaves = frozenset(typing.get_args(kind)) or {kind}
    return kind if leaves <= _PLAIN and leaves != {type(None)} else None


def default_space(tunable: registry.Tunable) -> Space:
    """What the registry says that a sweep tunes, and its range."""
    return {tunable.hyperparameter: Interval(low=tunable.low, high=tunable.high)}


def points(space: Space, protocol: str, samples: int | None = None, seed: int = 0) -> list[Point]:
    """The points of a space at which an optimizer is trained.

    Args:
      space: hyperparameter -> interval, or values.
      protocol: ``"grid"`` (all combinations), ``"random"`` (independent points) or ``"halton"`` (a
        scrambled Halton sequence, which fills the space more evenly).
      samples: number of random or Halton points; of equal ones only the first is kept.
      seed: of the random numbers, ≥ 0.

    Examples:
      >>> points({"b1": (0.5, 0.9), "b2": Interval(low=0.9, high=0.99, num=2)}, "grid")[1]
      {'b1': 0.5, 'b2': 0.99}
      >>> len(points({"learning_rate": Interval(low=1e-4, high=1.0)}, "halton", samples=8))
      8

    References:
      J. H. Halton, "Algorithm 247: Radical-inverse quasi-random point sequence", 1964; J. Bergstra
      and Y. Bengio, "Random Search for Hyper-Parameter Optimization", 2012.
    """
    names = list(space)
    if protocol == "grid":
        values = [d if isinstance(d, tuple) else d.grid() for d in space.values()]
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]
    assert samples is not None  # refused by the configuration
    generator = np.random.default_rng(seed)
    if protocol == "random":
        fractions = generator.random((samples, len(space)))
    else:
        fractions = qmc.Halton(len(space), scramble=True, seed=generator).random(samples)
    drawn = [
        {name: _at(space[name], u) for name, u in zip(names, row, strict=True)} for row in fractions
    ]
    return [p for i, p in enumerate(drawn) if p not in drawn[:i]]


def _at(dimension: Interval | tuple[Any, ...], fraction: float) -> Any:
    if isinstance(dimension, Interval):
        return dimension.at(fraction)
    return dimension[int(fraction * len(dimension))]


def ordered(space: Space, method: registry.Method) -> Space:
    """With the hyperparameter that the registry says to tune first, then those that are traced."""

    def rank(name: str) -> int:
        if method.tunes is not None and name == method.tunes.hyperparameter:
            return 0
        return 2 if name in method.static_args else 1

    return {name: space[name] for name in sorted(space, key=rank)}


def at_edge(point: Point, tried: Iterable[Point]) -> bool:
    """Whether a number is the smallest or largest tried, of three or more: better may lie beyond.

    Not so a zero, which is nearly always the end of what is accepted.

    Examples:
      >>> at_edge({"b1": 0.9}, [{"b1": 0.5}, {"b1": 0.7}, {"b1": 0.9}])
      True
    """
    tried = list(tried)
    for name, value in point.items():
        values = {other[name] for other in tried}
        are_numbers = len(values) > 2 and all(is_number(v) for v in values)
        if are_numbers and value != 0 and value in (min(values), max(values)):
            return True
    return False


def text(value: Any) -> str:
    """A hyperparameter's value for a table.

    Examples:
      >>> text(0.010000001), text(True), text("ggn")
      ('0.01', 'True', 'ggn')
    """
    return f"{value:g}" if isinstance(value, numbers.Real) and is_number(value) else str(value)


def text_of(point: Point) -> str:
    """A point for a table: the first value, and the others by name.

    Examples:
      >>> text_of({"learning_rate": 0.1, "b1": 0.9})
      '0.1, b1 = 0.9'
    """
    first, *others = point.items()
    return ", ".join([text(first[1]), *(f"{name} = {text(value)}" for name, value in others)])

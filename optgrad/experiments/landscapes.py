"""Test functions of two or three variables, and noisy descents on them by the thousand.

A descent sees the exact gradient plus Gaussian noise of a given deviation; descents from all
starting points, with all noise seeds and all values of one hyperparameter, are one compiled
program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import optgrad
from optgrad.experiments import functions

_Float = npt.NDArray[np.floating[Any]]
_WORST = 1e12  # what a descent counts that ended nowhere


@dataclasses.dataclass(frozen=True)
class Landscape:
    """A test function and where one starts on it.

    Attributes:
      name: key in `landscapes`.
      title: for figures.
      function: array of coordinates (…, n) -> values (…).
      minimizers: every global minimizer, n coordinates each.
      minimum: the value there.
      box: (lowest, highest) start in each coordinate.
      noise: usual standard deviation of each gradient component's noise.
      residuals: coordinates -> r with function = ½ Σ r², where it is a sum of squares.
    """

    name: str
    title: str
    function: Callable[[Any], Any]
    minimizers: tuple[tuple[float, ...], ...]
    minimum: float
    box: tuple[tuple[float, float], ...]
    noise: float
    residuals: Callable[[Any], Any] | None = None

    def lattice(self, side: int) -> _Float:
        """``side`` equidistant starts in each coordinate, shape (sideⁿ, n)."""
        axes = [np.linspace(low, high, side) for low, high in self.box]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))

    def excess(self, points: Any, floor: float = 1e-12) -> _Float:
        """Excess f − f* of points (…, n) in double precision, between ``floor`` and 1e12.

        Below the floor a difference is rounding of single-precision parameters; points that are
        not finite count as 1e12.
        """
        with np.errstate(all="ignore"):
            value = self.function(np.asarray(points, np.float64)) - self.minimum
        return np.clip(np.where(np.isfinite(value), value, _WORST), floor, _WORST)


_SQUARE = ((-2.0, 2.0), (-2.0, 2.0))
_LANDSCAPES = {
    landscape.name: landscape
    for landscape in (
        Landscape(
            "beale", "Beale", functions.beale, ((3.0, 0.5),), 0.0, _SQUARE, 0.1,
            functions.beale_residuals,
        ),
        Landscape(
            "rosenbrock", "Rosenbrock", functions.rosenbrock, ((1.0, 1.0),), 0.0, _SQUARE, 0.1,
            functions.rosenbrock_residuals,
        ),
        Landscape(
            "matyas", "Matyas", functions.matyas, ((0.0, 0.0),), 0.0, ((-10.0, 10.0),) * 2, 0.1,
            functions.matyas_residuals,
        ),
        Landscape(
            "goldstein_price", "Goldstein–Price", functions.goldstein_price, ((0.0, -1.0),), 3.0,
            _SQUARE, 1.0,
        ),
        Landscape(
            "saddle", "saddle", functions.saddle, ((0.0, 2**0.5), (0.0, -(2**0.5))), 0.0, _SQUARE,
            0.05,
        ),
        Landscape(
            "beale_3d", "Beale, 3-D", functions.beale_3d, ((3.0, 0.5, 3.0),), 0.0,
            ((-2.0, 2.0),) * 3, 0.1, functions.beale_3d_residuals,
        ),
    )
}  # fmt: skip


def landscapes() -> dict[str, Landscape]:
    """All test functions by name.

    Examples:
      >>> list(landscapes())[:3]
      ['beale', 'rosenbrock', 'matyas']
    """
    return dict(_LANDSCAPES)


# Descents ---------------------------------------------------------------------------------------


class Descent(NamedTuple):
    """One run."""

    params: chex.Array  # after the last step, shape (n,)
    records: Any  # what was recorded, leading axis: steps


# (state after the step, parameters before it, noisy gradient, updates) -> what to record
Record = Callable[[Any, chex.Array, chex.Array, chex.Array], Any]


def descend(
    function: Callable[[Any], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    start: chex.Array,
    noise: chex.Array,
    record: Record | None = None,
) -> Descent:
    """Follows noisy gradients from one start; to be used inside `jax.jit` and `jax.vmap`.

    Args:
      function: coordinates (n,) -> value.
      optimizer: any that needs no more than gradients and parameters.
      start: shape (n,).
      noise: added to the gradients, shape (steps, n).
      record: what to keep of every step; nothing by default.
    """

    def step(carry: Any, added: chex.Array) -> tuple[Any, Any]:
        params, state = carry
        gradient = jax.grad(function)(params) + added
        updates, state = optimizer.update(gradient, state, params)
        kept = record(state, params, gradient, updates) if record else None
        return (optax.apply_updates(params, updates), state), kept

    (params, _), records = jax.lax.scan(step, (start, optimizer.init(start)), noise)
    return Descent(params, records)


def gaussian_noise(seed: int, shape: Sequence[int], deviation: float) -> chex.Array:
    """Independent N(0, deviation²) entries."""
    return deviation * jax.random.normal(jax.random.key(seed), tuple(shape))


def final_points(
    landscape: Landscape,
    method: str,
    starts: npt.ArrayLike,
    noise: chex.Array,
    *,
    hyperparams: Mapping[str, Any] | None = None,
    sweep: Mapping[str, npt.ArrayLike] | None = None,
) -> _Float:
    """Where descents end from every start, with every noise and every swept setting.

    Args:
      landscape: the function.
      method: registered name.
      starts: shape (S, n).
      noise: shape (seeds, S, steps, n).
      hyperparams: the fixed ones, static arguments among them.
      sweep: hyperparameter -> values, all of one length V; they change together, and are traced.

    Returns:
      Final parameters, shape (V, seeds, S, n); V = 1 without a sweep.
    """
    dimension = len(landscape.box)
    program = _program(method, tuple((hyperparams or {}).items()), dimension)
    index = _of_dimension(dimension).index(landscape.name)
    settings = {name: jnp.asarray(values, jnp.float32) for name, values in (sweep or {}).items()}
    settings = settings or {_UNSWEPT: jnp.zeros(1)}
    return np.asarray(program(index, settings, jnp.asarray(starts, jnp.float32), noise))


_UNSWEPT = ""  # in place of a swept hyperparameter, where there is none


def _of_dimension(dimension: int) -> list[str]:
    return [name for name, place in _LANDSCAPES.items() if len(place.box) == dimension]


@functools.lru_cache(maxsize=64)
def _program(method: str, hyperparams: tuple[tuple[str, Any], ...], dimension: int) -> Any:
    """(index of the landscape, settings, starts, noise) -> final points, compiled.

    The landscape is an argument, because compilation takes longer than most runs: each method is
    compiled once for all landscapes of a dimension.
    """
    functions = [_LANDSCAPES[name].function for name in _of_dimension(dimension)]

    def one(
        index: chex.Array, setting: dict[str, chex.Array], start: chex.Array, added: chex.Array
    ) -> chex.Array:
        swept = {name: value for name, value in setting.items() if name != _UNSWEPT}
        optimizer = optgrad.create(method, **dict(hyperparams), **swept)
        return descend(
            lambda x: jax.lax.switch(index, functions, x), optimizer, start, added
        ).params

    over_starts = jax.vmap(one, in_axes=(None, None, 0, 0))
    over_seeds = jax.vmap(over_starts, in_axes=(None, None, None, 0))
    return jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, None, None)))


def geometric_mean(values: npt.ArrayLike, axis: Any = None) -> Any:
    """exp(mean(log x)) of positive numbers.

    Examples:
      >>> print(f"{geometric_mean([1e-4, 1.0]):g}")
      0.01
    """
    return np.exp(np.mean(np.log(values), axis=axis))

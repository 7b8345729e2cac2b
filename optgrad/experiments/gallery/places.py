"""The landscapes of the gallery: eight functions of two variables, where runs start, what is shown.

Functions are shifted to a minimum of 0. Methods that use the loss itself assume such a bound; here
it is exact, which helps them.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from optgrad.experiments import functions
from optgrad.experiments.landscapes import Landscape

Float = npt.NDArray[np.floating[Any]]
NOISES = ("none", "small", "large")
RESIDUALS = 3  # as many as the function with most of them has; the others are filled with zeros


@dataclasses.dataclass(frozen=True)
class Place:
    """A landscape of the gallery.

    Attributes:
      landscape: its function, of minimum 0.
      text: what it is, for captions.
      source: where it is from.
      start: the named start, from which the paths that are shown begin.
      jitter: other starts differ from it by at most that, in each coordinate.
      view: (low, high) of what is shown, for each coordinate.
      noises: standard deviation of each component of a minibatch gradient, for `NOISES`.
      noise: which of them the methods are tuned with.
      noisy_residuals: (x, slope s) -> r with ½ Σ r² = f + sᵀx + a constant, where there is such.
    """

    landscape: Landscape
    text: str
    source: str
    start: tuple[float, float]
    jitter: tuple[float, float]
    view: tuple[tuple[float, float], tuple[float, float]]
    noises: tuple[float, float, float]
    noise: str = "none"
    noisy_residuals: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """Its key in `places`."""
        return self.landscape.name

    @property
    def title(self) -> str:
        """For figures."""
        return self.landscape.title

    @property
    def has_residuals(self) -> bool:
        """Whether it is a sum of squares."""
        return self.landscape.residuals is not None

    @property
    def own_noise(self) -> int:
        """The number in `noises` of the level that the methods are tuned with."""
        return NOISES.index(self.noise)

    def residuals(self, x: Any, slope: Any) -> Any:
        """`RESIDUALS` of them, zeros where there are none; with the noise if that is possible."""
        if self.noisy_residuals is not None:
            found = self.noisy_residuals(x, slope)
        elif self.landscape.residuals is not None:
            found = self.landscape.residuals(x)
        else:
            return jnp.zeros(RESIDUALS, x.dtype)
        return jnp.concatenate([found, jnp.zeros(RESIDUALS - found.shape[-1], found.dtype)])

    def starts(self, count: int, purpose: str) -> Float:
        """Random starts around the named one, always the same; shape (count, 2)."""
        generator = np.random.default_rng(_seed(self.name, purpose))
        offsets = generator.uniform(-1.0, 1.0, (count, 2)) * self.jitter
        return np.asarray(self.start + offsets, np.float32)

    def log_excess(self, points: Any) -> Float:
        """log₁₀ (f − f*), between −12 and 12, where 12 also stands for what is not finite."""
        return np.log10(self.landscape.excess(points))


def normal_noise(place: Place, purpose: str, shape: tuple[int, ...]) -> Float:
    """Standard normal numbers, always the same for a landscape and purpose."""
    generator = np.random.default_rng(_seed(place.name, purpose, "noise"))
    return generator.standard_normal(shape, np.float32)


def _seed(*words: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in words]


def _shifted(function: Callable[[Any], Any], minimum: float) -> Callable[[Any], Any]:
    return lambda x: function(x) - minimum


def _landscape(  # noqa: PLR0917
    name: str,
    title: str,
    function: Callable[[Any], Any],
    minimizers: tuple[tuple[float, float], ...],
    noise: float,
    residuals: Callable[[Any], Any] | None = None,
) -> Landscape:
    """Of minimum 0; where it starts is said by its `Place`."""
    box = ((0.0, 0.0), (0.0, 0.0))
    return Landscape(name, title, function, minimizers, 0.0, box, noise, residuals)


_VALLEY, _NOISY = 1000.0, 20.0  # condition numbers
_LOWEST = functions.STYBLINSKI_TANG_MINIMIZER

_PLACES = (
    Place(
        _landscape("rosenbrock", "Rosenbrock", functions.rosenbrock, ((1.0, 1.0),), 0.1,
                   functions.rosenbrock_residuals),
        "a curved valley whose floor hardly falls",
        "Rosenbrock, 1960, from his start (−1.2, 1)",
        (-1.2, 1.0), (0.15, 0.15), ((-2.0, 2.0), (-1.0, 3.0)), (0.0, 0.1, 1.0),
    ),
    Place(
        _landscape("beale", "Beale", functions.beale, ((3.0, 0.5),), 0.1,
                   functions.beale_residuals),
        "steep at the corners and flat between them; to the left a valley that leads astray",
        "Beale, 1958",
        (0.7, 1.4), (0.15, 0.15), ((-1.0, 4.5), (-2.0, 2.5)), (0.0, 0.1, 1.0),
    ),
    Place(
        _landscape("saddle", "Saddle", functions.saddle, ((0.0, 2**0.5), (0.0, -(2**0.5))), 0.05,
                   functions.saddle_residuals),
        "x² − y² + y⁴/4 + 1, from close to the line on which gradients lead into the saddle",
        "the saddle of `optgrad reproduce survey_slides`",
        (1.8, 0.01), (0.3, 0.02), ((-2.2, 2.2), (-2.2, 2.2)), (0.0, 0.05, 0.5),
    ),
    Place(
        _landscape("narrow_valley", "Narrow valley",
                   functools.partial(functions.rotated_quadratic, curvature=_VALLEY),
                   ((0.0, 0.0),), 1.0,
                   functools.partial(functions.rotated_quadratic_residuals, curvature=_VALLEY)),
        "a quadratic with the curvatures 1 and 1000, along axes rotated by 30°",
        "made for this gallery",
        (-2.2, 0.6), (0.3, 0.3), ((-3.0, 3.0), (-3.0, 3.0)), (0.0, 1.0, 10.0),
        noisy_residuals=lambda x, s: functions.rotated_quadratic_residuals(x, _VALLEY, s),
    ),
    Place(
        _landscape("noisy_quadratic", "Noisy quadratic",
                   functools.partial(functions.rotated_quadratic, curvature=_NOISY),
                   ((0.0, 0.0),), 2.0,
                   functools.partial(functions.rotated_quadratic_residuals, curvature=_NOISY)),
        "a quadratic with the curvatures 1 and 20, whose gradients are seen through noise of "
        "deviation 2 in each component",
        "made for this gallery",
        (-2.5, 1.5), (0.3, 0.3), ((-3.0, 3.0), (-3.0, 3.0)), (0.0, 0.2, 2.0), "large",
        noisy_residuals=lambda x, s: functions.rotated_quadratic_residuals(x, _NOISY, s),
    ),
    Place(
        _landscape("plateau", "Plateau", functions.plateau, ((0.0, 0.0),), 0.005,
                   functions.plateau_residuals),
        "a basin in a plain, s/(1 + s) with s = (x² + 10y²)/2; at the start the gradient is 0.05, "
        "and the curvature negative",
        "after the loss of Geman & McClure, 1987",
        (-4.0, 1.0), (0.3, 0.2), ((-5.0, 3.0), (-2.5, 2.5)), (0.0, 0.005, 0.05),
    ),
    Place(
        _landscape("styblinski_tang", "Styblinski–Tang",
                   _shifted(functions.styblinski_tang, 2 * functions.STYBLINSKI_TANG_MINIMUM),
                   ((_LOWEST, _LOWEST),), 1.0),
        "four minima, of which one is global; to the start the nearest is another one, of "
        "log₁₀ excess 1.15",
        "Styblinski & Tang, 1990",
        (4.5, -1.0), (0.3, 0.3), ((-5.0, 5.0), (-5.0, 5.0)), (0.0, 1.0, 10.0),
    ),
    Place(
        _landscape("goldstein_price", "Goldstein–Price",
                   _shifted(functions.goldstein_price, 3.0), ((0.0, -1.0),), 1.0),
        "six decades of values, curvatures of 50,000 at the start, and three local minima, of "
        "log₁₀ excess 1.4, 1.9 and 2.9",
        "Goldstein & Price, 1971",
        (1.0, -0.5), (0.15, 0.15), ((-2.0, 2.0), (-2.5, 1.5)), (0.0, 10.0, 100.0),
    ),
)  # fmt: skip


def places() -> dict[str, Place]:
    """The landscapes by name.

    Examples:
      >>> ", ".join(places())
      'rosenbrock, beale, saddle, narrow_valley, noisy_quadratic, plateau, styblinski_tang, goldstein_price'
    """  # noqa: E501  one line of output
    return {place.name: place for place in _PLACES}

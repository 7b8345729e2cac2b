"""Runs of every method on all landscapes, charged in gradient equivalents.

One compiled program per method serves all landscapes, tried values, starts and noises: the
landscape's number is an argument of it. One program per landscape would have to hold all methods,
and would be compiled again for each landscape; compilation takes longer than the runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optgrad
from optgrad import registry
from optgrad.core import transforms
from optgrad.experiments.gallery import places as places_lib
from optgrad.experiments.gallery.places import Float, Place
from optgrad.experiments.reproduce import survey_runs

EXAMPLES = 4  # in a minibatch: their gradients differ by noise alone
VALUES = 17  # tried of what a method tunes
CHUNK = 25  # steps between looks at what has been spent
_DECADES = 8.0  # over which a scale is tried
_SCALE = 4.0  # a range of that many decades or more is one of a scale

# What a function of two variables has. Beside it ``residual_fn``, if it is a sum of squares.
_ALWAYS = frozenset({
    "params", "value", "grad", "value_fn", "per_example_grads", "gradient_variance",
    "curvature_diagonal",
})  # fmt: skip
_OF_SQUARES = frozenset({"residual_fn", "outputs_fn", "out_loss_fn"})


# Who takes part ---------------------------------------------------------------------------------


def reason_left_out(method: registry.Method, place: Place) -> str:
    """Why a method cannot run on a landscape; empty if it can."""
    needs = method.extras(has_layers=False)
    if "kfac_stats" in needs:
        return "it needs the layers of a network; without them it would be its fallback alone"
    if unknown := needs - _ALWAYS - _OF_SQUARES:
        return f"it needs {', '.join(sorted(unknown))}, which a function of two variables has not"
    if needs & _OF_SQUARES and not place.has_residuals:
        return "it needs a sum of squares, which this function is not"
    if missing := _required(method):
        return f"{', '.join(missing)} has no default, and is not what its record tunes"
    return ""


def is_blind_to_noise(method: registry.Method, place: Place) -> bool:
    """Whether the method's residuals could not hold the noise of the gradients."""
    needs_squares = bool(method.needs & {"residual_fn"})
    return needs_squares and place.noisy_residuals is None


def _required(method: registry.Method) -> list[str]:
    known = set(method.published) | ({method.tunes.hyperparameter} if method.tunes else set())
    empty = [k for k, p in method.hyperparameters.items() if p.default is p.empty]
    variadic = [k for k, p in method.hyperparameters.items() if p.kind in (p.VAR_KEYWORD,)]
    return [k for k in empty if k not in known and k not in variadic]


def tried_values(method: registry.Method, count: int = VALUES) -> Float:
    """The values of what the method tunes, ascending; a NaN alone where it tunes nothing.

    ``count`` of them, equidistant in their logarithm. A record's range of four decades or more is
    that of a scale, which depends on the problem's: it is widened to eight decades, two thirds of
    that upwards, because few steps want large ones. A narrower one is that of a ratio and is taken
    as it is, and so is one that the method does not allow to be widened.

    Examples:
      >>> print(*(f"{value:.2g}" for value in tried_values(optgrad.get_method("sgd"))[[0, 1, -1]]))
      1e-05 3.2e-05 1e+03
    """
    if method.tunes is None:
        return np.array([np.nan])
    low, high = math.log10(method.tunes.low), math.log10(method.tunes.high)
    if high - low >= _SCALE:
        extra = max(0.0, _DECADES - (high - low))
        below = math.floor(2 * extra / 3) / 2  # half decades, so that powers of ten are tried
        wide = low - below, high + extra - below
        if all(_is_accepted(method, 10**end) for end in wide):
            low, high = wide
    return np.logspace(low, high, count)


def _is_accepted(method: registry.Method, value: float) -> bool:
    assert method.tunes is not None
    try:
        method.factory(**{**method.published, method.tunes.hyperparameter: value})
    except ValueError:
        return False
    return True


# The program of a method ------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a step sees: the landscape, and noise that is added to gradients of the examples."""

    place: chex.Array  # its number, int32, shape ()
    noise: chex.Array  # shape (EXAMPLES, 2)


@dataclasses.dataclass(frozen=True)
class Oracles:
    """The extra arguments of a method, for the stochastic loss f(x) + mean(ξ)ᵀ(x − start).

    The loss of a minibatch is off at the minimum, by more than its gradient's noise explains there:
    with a noise that vanished at the minimum, Polyak's step size would end there.

    Attributes:
      places: those among which a batch chooses.
      names: of the arguments.
    """

    places: tuple[Place, ...]
    names: frozenset[str]

    def __call__(self, x: chex.Array, batch: Batch) -> dict[str, Any]:
        """The gradient, as ``grad``, and the other arguments that were named."""
        slope = jnp.mean(batch.noise, axis=0)
        origin = jnp.array([p.start for p in self.places], x.dtype)[batch.place]
        functions = [p.landscape.function for p in self.places]
        smooth = functools.partial(jax.lax.switch, batch.place, functions)

        def value_fn(x: chex.Array) -> chex.Array:
            return smooth(x) + jnp.dot(slope, x - origin)

        def residuals(x: chex.Array) -> chex.Array:
            branches = [functools.partial(p.residuals, slope=slope) for p in self.places]
            return jax.lax.switch(batch.place, branches, x)

        def exact_residuals(x: chex.Array) -> chex.Array:
            branches = [functools.partial(p.residuals, slope=jnp.zeros(2)) for p in self.places]
            return jax.lax.switch(batch.place, branches, x)

        def out_loss(z: Any) -> chex.Array:
            return 0.5 * jnp.sum(z[0] ** 2) + jnp.dot(slope, z[1] - origin)

        def diagonal() -> chex.Array:
            squares = jnp.array([p.has_residuals for p in self.places])[batch.place]
            gauss_newton = jnp.sum(jax.jacfwd(exact_residuals)(x) ** 2, axis=0)
            return jnp.where(squares, gauss_newton, jnp.abs(jnp.diagonal(jax.hessian(smooth)(x))))

        value, grad = jax.value_and_grad(value_fn)(x)
        builders: dict[str, Callable[[], Any]] = {
            "value": lambda: value,
            "value_fn": lambda: value_fn,
            "per_example_grads": lambda: grad - slope + batch.noise,
            "gradient_variance": lambda: jnp.var(batch.noise, axis=0, ddof=1) / EXAMPLES,
            "curvature_diagonal": diagonal,
            "residual_fn": lambda: residuals,
            "outputs_fn": lambda: lambda x: (exact_residuals(x), x),
            "out_loss_fn": lambda: out_loss,
        }
        return {"grad": grad, **{k: build() for k, build in builders.items() if k in self.names}}


def charged(method: registry.Method, state: Any, spent: chex.Array) -> chex.Array:
    """Gradient equivalents after a step.

    As the method or its line search counts; a method that counts nothing spends what its record
    says, a constant.
    """
    has_count = "gradient_equivalents" in optgrad.diagnostics(state)
    if has_count or optax.tree.get_all_with_path(state, "num_linesearch_steps"):
        return survey_runs.charged(state, spent)
    return spent + method.cost


class Program:
    """All runs of a method, compiled when it is first used.

    Args:
      method: its record.
      places: the landscapes among which it can be run.
    """

    def __init__(self, method: registry.Method, places: tuple[Place, ...]) -> None:
        self._method, self._places = method, places
        names = method.extras(has_layers=False) | {"grad"}
        self._oracles = Oracles(places, frozenset(names))
        over_starts = jax.vmap(self._begin, in_axes=(None, 0))
        self._start = jax.jit(jax.vmap(over_starts, in_axes=(0, None)))
        over_runs = jax.vmap(self._steps, in_axes=(None, None, 0, 0))
        self._advance = jax.jit(jax.vmap(over_runs, in_axes=(None, 0, 0, None)))

    def _optimizer(self, value: chex.Array) -> optax.GradientTransformationExtraArgs:
        swept = {self._method.tunes.hyperparameter: value} if self._method.tunes else {}
        return survey_runs.create(self._method.name, **{**self._method.published, **swept})

    def _begin(self, value: chex.Array, start: chex.Array) -> Any:
        return survey_runs.start(self._optimizer(value), start)

    def _steps(self, place: chex.Array, value: chex.Array, carry: Any, noise: chex.Array) -> Any:
        """One run's next `CHUNK` steps: the new carry, and (cost, point) after each of them."""
        optimizer = self._optimizer(value)

        def step(carry: Any, noise: chex.Array) -> Any:
            x, state, spent = carry
            extras = self._oracles(x, Batch(place, noise))
            updates, state = optimizer.update(extras["grad"], state, x, **extras)
            x, state = optax.apply_updates(x, updates), transforms.strongly_typed(state)
            spent = charged(self._method, state, spent)
            return (x, state, spent), jnp.append(spent, self._method.evaluated(state, x))

        return jax.lax.scan(step, carry, noise)

    def run(self, place: str, values: Float, starts: Float, noise: Float, budget: float) -> "Runs":
        """Runs from every start with every value, until all have spent the budget.

        Args:
          place: the landscape's name.
          values: shape (V,).
          starts: shape (R, 2).
          noise: added to the gradients of the examples, shape (R, steps, EXAMPLES, 2); no run
            takes more steps.
          budget: gradient equivalents.
        """
        index = jnp.int32([p.name for p in self._places].index(place))
        tried = jnp.asarray(values, jnp.float32)
        carry = self._start(tried, jnp.asarray(starts, jnp.float32))
        records = []
        for first in range(0, noise.shape[1], CHUNK):
            carry, record = self._advance(index, tried, carry, noise[:, first : first + CHUNK])
            records.append(np.asarray(record))
            if np.min(records[-1][..., -1, 0]) >= budget:
                break
        found = np.concatenate(records, axis=2)
        return Runs(np.asarray(starts, np.float32), found[..., 0], found[..., 1:])


class Runs(NamedTuple):
    """Runs with V values from R starts, over T steps."""

    starts: Float  # shape (R, 2)
    costs: Float  # gradient equivalents spent after each step, shape (V, R, T)
    points: Float  # parameters that are evaluated then, shape (V, R, T, 2)

    def at(self, budgets: Float) -> Float:
        """Where the runs are when the next step would exceed a budget, shape (V, R, budgets, 2)."""
        steps = self.steps_within(budgets)
        starts = np.broadcast_to(self.starts[:, None], (*self.points.shape[:2], 1, 2))
        points = np.concatenate([starts, self.points], axis=2)
        return np.take_along_axis(points, steps[..., None], axis=2)

    def steps_within(self, budgets: Float) -> Any:
        """How many steps cost no more than a budget, shape (V, R, budgets)."""
        return np.sum(self.costs[:, :, None] <= np.asarray(budgets)[:, None], axis=-1)


def noises(place: Place, purpose: str, runs: int, steps: int, deviation: float) -> Float:
    """Noise of the examples, whose mean has that deviation; shape (runs, steps, EXAMPLES, 2)."""
    scale = np.float32(deviation * math.sqrt(EXAMPLES))
    return scale * places_lib.normal_noise(place, purpose, (runs, steps, EXAMPLES, 2))

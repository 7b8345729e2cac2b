"""Steps of the saddle-free Newton method on a Krylov space, and which damping they get."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import checks, linalg, oracles, transforms
from optgrad.curvature import krylov, trial

DAUPHIN = (
    "Y. Dauphin, R. Pascanu, C. Gulcehre, K. Cho, S. Ganguli, Y. Bengio, Identifying and attacking "
    "the saddle point problem in high-dimensional non-convex optimization, 2014"
)
_MODES = ("search", "lm", "fixed")
_DECADES = (-3.0, 2.0)  # of the dampings that are tried, relative to the last one
_LEAST, _MOST = 1e-8, 1e6  # damping of the search
_FLAT = 1e-4  # a gradient smaller than that share of the curvature is one at a stationary point


class Options(NamedTuple):
    """All arguments of the method but the learning rate."""

    k: int
    damping: Any
    damping_mode: str
    n_search: int
    start: str
    mix: Any
    use_prev: bool
    complement: str
    kick: Any
    max_norm: Any
    hvp: str
    seed: int

    def check(self) -> None:
        """Refuses what is outside its range."""
        checks.check_count("k", self.k, 1)
        checks.check_one_of("damping_mode", self.damping_mode, _MODES)
        fixed = self.damping_mode == "fixed"
        checks.check_in_range("damping", self.damping, 0.0, low_open=not fixed, high_open=True)
        checks.check_count("n_search", self.n_search, 1)
        checks.check_one_of("start", self.start, ("mixed", "gradient"))
        checks.check_in_range("mix", self.mix, 0.0, high_open=True)
        checks.check_one_of("use_prev", self.use_prev, (False, True))
        checks.check_one_of("complement", self.complement, ("scaled", "ignore"))
        checks.check_in_range("kick", self.kick, 0.0, high_open=True)
        if self.max_norm is not None:
            checks.check_in_range("max_norm", self.max_norm, 0.0, low_open=True, or_infinite=True)
        checks.check_one_of("hvp", self.hvp, oracles.HESSIAN_PRODUCT_COST)
        checks.check_count("seed", self.seed, 0)


class Step(NamedTuple):
    """One step and its promise."""

    vector: chex.ArrayTree  # what would be added to the parameters, in at least float32
    predicted: chex.Array  # decrease of the loss by its model, shape ()


class Steps(NamedTuple):
    """The steps of all dampings at one point."""

    model: krylov.Model
    along: chex.Array  # c = QᵀVᵀg, shape (rows,)
    outside: chex.ArrayTree | None  # g − VVᵀg, None if it is ignored
    kick: chex.Array  # step along the smallest curvature, shape ()
    rate: chex.Array  # learning rate, shape ()
    max_norm: chex.Numeric  # of a step before the learning rate, infinite for no limit

    def at(self, damping: chex.Array) -> Step:
        """The step with a damping λ."""
        curvatures, size = self.model.curvatures, self.model.size
        divisor = jnp.abs(curvatures) + damping + linalg.epsilon() * size
        nothing = divisor == 0  # neither a curvature nor a damping; a NaN is neither
        step = jnp.where(nothing, 0.0, -self.along / jnp.where(nothing, 1.0, divisor))
        step = step.at[0].add(self.kick.astype(step.dtype))
        vector = self.model.vector(step)
        slope, bend = jnp.sum(self.along * step), 0.5 * jnp.sum(curvatures * step * step)
        if self.outside is not None:
            # No curvature is known there: none is taken to be larger than those that are.
            rate = 1.0 / jnp.where(size + damping == 0, 1.0, size + damping)
            rest = linalg.dot(self.outside, self.outside)
            vector = linalg.axpy(-rate, self.outside, vector)
            slope, bend = slope - rate * rest, bend + 0.5 * size * rate * rate * rest
        length = linalg.norm(vector)
        scale = self.rate * jnp.minimum(1.0, self.max_norm / jnp.where(length > 0, length, 1.0))
        return Step(linalg.scale(scale, vector), -scale * (slope + scale * bend))


def steps_at(
    options: Options,
    product: linalg.Product,
    gradient: optax.Updates,
    *,
    previous: chex.ArrayTree | None,
    key: chex.PRNGKey,
    rate: chex.Array,
    count: chex.Array,
) -> Steps:
    """The space that the options ask for, and the gradient in it.

    Args:
      options: of the method.
      product: with the Hessian.
      gradient: what is to be descended.
      previous: the last step, if it is one of the directions.
      key: of the random numbers.
      rate: factor of each step.
      count: number of the step, for schedules.
    """

    def at(value: Any) -> chex.Numeric:
        return transforms.hyperparameter_at(value, count)

    direction_key, sign_key = jax.random.split(key)
    gradient = linalg.widened(gradient)
    length = linalg.norm(gradient)
    start = gradient
    if options.start == "mixed":
        random = linalg.random_unit(direction_key, gradient)
        mixed = linalg.axpy(at(options.mix) * length, random, gradient)
        start = linalg.where(length == 0, random, mixed)
    model = krylov.model(product, start, krylov.rows_of(options.k, gradient), previous)
    along = model.coordinates(gradient)
    outside = None
    if options.complement == "scaled":
        outside = linalg.orthogonalize(gradient, model.basis)
    is_flat = (length <= _FLAT * model.size) & (model.curvatures[0] < 0)
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    sign = jnp.where(along[0] == 0, sign, -jnp.sign(along[0]))
    kick = jnp.where(is_flat, trial.scalar(at(options.kick)) * sign, 0.0)
    limit = jnp.inf if options.max_norm is None else at(options.max_norm)
    return Steps(model, along, outside, kick, rate, limit)


Adapted = tuple[optax.Updates, chex.Array, chex.Array]  # updates, accepted, next damping


def search(
    value_fn: Callable[[Any], chex.Array],
    params: optax.Params,
    steps: Steps,
    *,
    damping: chex.Array,
    value: chex.Array,
    n_search: int,
) -> Adapted:
    """The best of several dampings; the largest one of those that cannot be told apart."""
    decades = np.linspace(*_DECADES, n_search)[::-1] if n_search > 1 else np.zeros(1)
    dampings = jnp.clip(damping * jnp.asarray(10.0**decades, damping.dtype), _LEAST, _MOST)

    def value_at(damping: chex.Array) -> chex.Array:
        updates = transforms.cast_like(steps.at(damping).vector, params)
        reached = jnp.asarray(value_fn(optax.apply_updates(params, updates)), value.dtype)
        return jnp.where(jnp.isfinite(reached) & linalg.all_finite(updates), reached, jnp.inf)

    values = jax.lax.map(value_at, dampings)
    best = jnp.min(values)
    alike = values <= jnp.minimum(best + 10.0 * linalg.epsilon() * jnp.abs(best), value)
    chosen = dampings[jnp.argmax(alike)]  # the first one, from the largest damping down
    accepted = (best <= value) & jnp.isfinite(value)
    # A decrease within the roundings of the loss says nothing about the damping.
    floor = 10.0 * linalg.epsilon() * jnp.abs(value)
    following = jnp.where(best < value - floor, chosen, damping)
    following = jnp.where(best > value, 10.0 * damping, following)
    updates = transforms.cast_like(steps.at(chosen).vector, params)
    return trial.taken(accepted, updates), accepted, jnp.clip(following, _LEAST, _MOST)


def follow(
    value_fn: Callable[[Any], chex.Array],
    params: optax.Params,
    steps: Steps,
    *,
    damping: chex.Array,
    value: chex.Array,
) -> Adapted:
    """One damping, which follows the gain ratio."""
    step = steps.at(damping)
    tried = trial.attempt(value_fn, params, step.vector, value, step.predicted)
    following = trial.rescaled_damping(damping, tried.ratio, up=1.5, down=1.5)
    return tried.updates, tried.accepted, following

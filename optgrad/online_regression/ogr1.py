"""What the methods that model one direction share: their options, the step rule, the reductions.

A direction v̂ is the unit vector of the momentum. It is refreshed as a linear combination
a·v + b·v̂ of what is stored, with scalars a and b, so that all inner products of a step are taken
in one pass over the tree and the update is the second and last one.
"""

import numbers
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, leafwise, transforms, trees
from optgrad.online_regression import parabola
from optgrad.online_regression.parabola import Parabola

STEPS = ("regression", "last_point", "sigma_ratio")
NEGATIVE_CURVATURES = ("reverse", "gradient_descent", "tanh")

LOW_PRECISION = "momentum and directions: by state_dtype or low_precision_state; never the origin"


class Settings(NamedTuple):
    """Hyperparameters: numbers, traced scalars or schedules."""

    eta: Any
    alpha: Any
    beta: Any
    gamma: Any
    epsilon: Any
    clip_sigmas: Any
    lr_max: Any

    def at(self, count: chex.Array) -> "Settings":
        """Their values at step ``count``."""
        return Settings(*(transforms.hyperparameter_at(value, count) for value in self))


class Rule(NamedTuple):
    """How a step along the direction is made; static."""

    step: str
    negative_curvature: str
    paper: bool


def check_settings(
    settings: Settings, rule: Rule, warmup_steps: int, state_dtype: Any | None
) -> None:
    """Refuses numbers outside their ranges and unknown options."""
    checks.check_in_range("eta", settings.eta, 0.0, high_open=True)
    checks.check_in_range("alpha", settings.alpha, 0.0, high_open=True)
    checks.check_in_range("beta", settings.beta, 0.0, 1.0, high_open=True)
    checks.check_in_range("gamma", settings.gamma, 0.0, 1.0, high_open=True)
    for name in ("epsilon", "clip_sigmas", "lr_max"):
        value = getattr(settings, name)
        checks.check_in_range(name, value, 0.0, low_open=True, or_infinite=True)
    checks.check_one_of("step", rule.step, STEPS)
    checks.check_one_of("negative_curvature", rule.negative_curvature, NEGATIVE_CURVATURES)
    limit = settings.lr_max
    is_infinite = isinstance(limit, numbers.Real) and limit == np.inf
    if rule.negative_curvature == "tanh" and is_infinite and not rule.paper:
        raise ValueError(
            "negative_curvature = 'tanh' with lr_max = inf; accepted: a finite lr_max, the scale "
            "1/λ0 of tanh(λ/λ0), or negative_curvature = 'reverse', which is its limit"
        )
    checks.check_count("warmup_steps", warmup_steps, 1)
    checks.check_float_dtype("state_dtype", state_dtype)


def preset(value: Any, paper: bool, robust: float) -> Any:
    """A guard's value: as given, else off (infinite) in the paper's preset."""
    if value is not None:
        return value
    return np.inf if paper else robust


# --- the model along the direction -------------------------------------------------------------


def step_along(
    model: Parabola, position: chex.Array, slope: chex.Array, at: Settings, rule: Rule
) -> chex.Array:
    """Signed length δ of the step along the direction.

    Args:
      model: regression statistics that contain the newest sample.
      position: x, where the newest sample was taken.
      slope: q, the gradient along the direction there.
      at: hyperparameters at this step.
      rule: how.
    """
    m, n, v, c, _ = model
    curvature = c / v if rule.paper else parabola.curvature(model)
    sign = jnp.where(curvature < 0, -1.0, 1.0)
    bounded = jnp.maximum(jnp.abs(curvature), 1 / jnp.asarray(at.lr_max, v.dtype))
    if rule.step == "sigma_ratio":
        step = -jnp.minimum(_ratio(model, rule), at.lr_max) * slope
    elif rule.negative_curvature == "tanh":
        # tanh(λ/λ0)·(p − x) with λ0 = 1/lr_max, finite as λ → 0, where it is −n/λ0.
        lr_max = 1.0 if rule.paper else at.lr_max
        z = curvature * lr_max
        is_flat = jnp.abs(z) < 1e-4
        rate = lr_max * jnp.where(is_flat, 1.0, jnp.tanh(z) / jnp.where(is_flat, 1.0, z))
        toward_minimum = jnp.tanh(z) * (m - position) - rate * n
        step = -rate * slope if rule.step == "last_point" else toward_minimum
    elif rule.step == "last_point":
        step = -slope / bounded
    else:
        step = sign * (m - position) - n / bounded
    limit = jnp.minimum(at.epsilon, _clip_length(v, at.clip_sigmas))
    step = at.alpha * jnp.clip(step, -limit, limit)
    plain = -at.eta * slope
    if rule.negative_curvature == "gradient_descent" and rule.step != "sigma_ratio":
        step = jnp.where(curvature < 0, plain, step)
    if rule.paper:
        return step
    has_model = (v > np.finfo(v.dtype).tiny) & jnp.isfinite(step)
    return jnp.where(has_model, step, plain)


def _ratio(model: Parabola, rule: Rule) -> chex.Array:
    if rule.paper:
        return jnp.sqrt(model.position_variance / model.gradient_variance)
    return parabola.sigma_ratio(model)


def _clip_length(variance: chex.Array, sigmas: chex.Numeric) -> chex.Array:
    """κ·σθ; infinite without that clip, also where σθ is 0."""
    sigmas = jnp.asarray(sigmas, variance.dtype)
    bounded = jnp.where(jnp.isinf(sigmas), 0.0, sigmas) * jnp.sqrt(variance)
    return jnp.where(jnp.isinf(sigmas), jnp.inf, bounded)


# --- directions and inner products ---------------------------------------------------------------


class Mix(NamedTuple):
    """The new direction a·v + b·v̂, coefficients of shape () or (leaves,)."""

    momentum: chex.Array  # a
    direction: chex.Array  # b, 0 or 1

    def __call__(self, of_momentum: chex.Array, of_direction: chex.Array) -> chex.Array:
        """Inner product with the new direction, from those with v and with the old v̂.

        Selected, not summed: a product with a v that was not taken may be infinite.
        """
        return jnp.where(self.direction > 0, of_direction, self.momentum * of_momentum)


def refresh(do: chex.Array, vv: chex.Array, vd: chex.Array) -> Mix:
    """The direction ±v/‖v‖ where ``do``, else the old one.

    The sign keeps the new direction's angle to the old one below 90°: averages of positions and
    gradients are carried over, and they would have to change sign with it.

    Args:
      do: whether the direction changes now.
      vv: ⟨v, v⟩.
      vd: ⟨v, v̂⟩ with the old direction.
    """
    usable = do & (vv > np.finfo(vv.dtype).tiny) & jnp.isfinite(vv)
    scale = jax.lax.rsqrt(jnp.where(usable, vv, 1.0))
    return Mix(
        momentum=jnp.where(usable, jnp.where(vd < 0, -scale, scale), 0.0),
        direction=jnp.where(usable, 0.0, 1.0),
    )


def mix_directions(mix: Mix, momentum: optax.Updates, direction: optax.Updates) -> optax.Updates:
    """The new direction, with the types of the old one."""

    def one(v: chex.Array, d: chex.Array, a: chex.Array, b: chex.Array) -> chex.Array:
        # Selected: a direction that was not refreshed keeps its bits.
        refreshed = a.astype(d.dtype) * v.astype(d.dtype)
        return jnp.where(b > 0, d, refreshed)

    spread = (trees.spread(x, momentum) for x in mix)
    return leafwise.tree_map(one, momentum, direction, *spread)


def select_after(
    measured: chex.Array, condition: chex.Array, new: optax.Updates, old: optax.Updates
) -> optax.Updates:
    """``new`` where the condition holds, else ``old``, both as they were when measured.

    A measurement that is NaN changes nothing. That makes the result depend on it, so that XLA
    may overwrite ``old`` in place.
    """
    do = trees.spread(condition & ~jnp.isnan(measured), old)
    return leafwise.tree_map(lambda x, y, c: jnp.where(c, x.astype(y.dtype), y), new, old, do)


def update_momentum(
    momentum: optax.Updates, gradient: optax.Updates, gamma: chex.Numeric, direction: optax.Updates
) -> optax.Updates:
    """The sum γv + g, after the new direction was computed from the old v."""
    new = averages.update_sum(momentum, gradient, gamma)
    return leafwise.tree_map(trees.ordered_after, new, direction)


def inner_products(per_tensor: bool, *pairs: tuple[optax.Updates, optax.Updates]) -> list[Any]:
    """⟨x, y⟩ of each pair, of shape (leaves,) with a direction for every tensor, else ()."""
    return list(trees.inner_products(*pairs) if per_tensor else trees.dots(*pairs))


def model_shape(params: optax.Params, per_tensor: bool) -> tuple[int, ...]:
    """Shape of everything that exists once per direction."""
    return (len(jax.tree.leaves(params)),) if per_tensor else ()


def momentum_scale(count: chex.Array, at: Settings, rule: Rule) -> chex.Array:
    """Coefficient of the momentum sum in the warm-up: −η times what makes it an average.

    In the paper −η alone: there the sum is up to 1/(1−γ) times larger than a gradient.
    """
    if rule.paper:
        return jnp.asarray(-at.eta)
    total = averages.sample_weights(count + 1, at.gamma).total
    return jnp.asarray(-at.eta * (1 - at.gamma) / total)


def emit(
    vectors: tuple[optax.Updates, optax.Updates, optax.Updates],
    params: optax.Params,
    *,
    warming_up: chex.Array,
    coefficient: chex.Array,
    along: chex.Array,
    eta: chex.Numeric,
) -> optax.Updates:
    """Momentum steps while warming up, then δ·v̂ − η(g − q·v̂).

    Args:
      vectors: momentum, direction, gradient.
      params: for the types.
      warming_up: whether this step is one of the first 2m.
      coefficient: of the momentum in such a step.
      along: δ + ηq, coefficient of the direction afterwards.
      eta: η.
    """

    def one(v: chex.Array, d: chex.Array, g: chex.Array, c: chex.Array) -> chex.Array:
        wide = jnp.result_type(averages.average_dtype(g), v.dtype)
        v, d, g = v.astype(wide), d.astype(wide), g.astype(wide)
        modelled = c.astype(wide) * d - jnp.asarray(eta, wide) * g
        return jnp.where(warming_up, coefficient.astype(wide) * v, modelled)

    steps = leafwise.tree_map(one, *vectors, trees.spread(along, params))
    return transforms.cast_like(steps, params)


def model_diagnostics(model: Parabola, position: chex.Array, step: chex.Array) -> dict[str, Any]:
    """What the modelled direction looks like; see the states' ``diagnostics``."""
    curvature = parabola.curvature(model)
    is_curved = curvature != 0
    minimum = model.mean_position - model.mean_gradient / jnp.where(is_curved, curvature, 1.0)
    return {
        "curvature": curvature,
        "minimum": jnp.where(is_curved, minimum, model.mean_position),
        "sigma_ratio": jnp.where(model.gradient_variance > 0, parabola.sigma_ratio(model), 0.0),
        "correlation": parabola.correlation(model),
        "position": position,
        "mean_position": model.mean_position,
        "mean_gradient": model.mean_gradient,
        "step": step,
    }


# --- the methods with one direction that turns at every step -------------------------------------


class OneDirectionState(NamedTuple):
    """State of `ogr1d` and `ogr1dc`."""

    count: chex.Array  # number of updates, int32, shape ()
    momentum: optax.Updates  # v = Σ γˢ g, like the parameters, at least float32
    direction: optax.Updates  # v̂, of length 1 (0 while there is none), like the momentum
    origin: optax.Params | None  # where positions are 0 (ogr1dc, measured), at least float32
    model: Parabola  # statistics along v̂, shape () or (leaves,)
    position: chex.Array  # x of the last sample, shape () or (leaves,)
    step: chex.Array  # expected motion along v̂ since, shape () or (leaves,)

    def diagnostics(self) -> dict[str, Any]:
        """The parabola along the direction, entries of shape () or (leaves,).

        ``curvature`` λ and ``minimum`` p; ``sigma_ratio`` σθ/σg; ``correlation`` of gradient and
        position, the confidence in λ; ``position``, ``mean_position``, ``mean_gradient``;
        ``step`` δ, the step made along the direction.
        """
        return model_diagnostics(self.model, self.position, self.step)


def turning_direction(
    settings: Settings,
    rule: Rule,
    *,
    warmup_steps: int,
    stage_steps: int,
    centred: bool,
    measured: bool,
    per_tensor: bool,
    state_dtype: Any | None,
) -> optax.GradientTransformationExtraArgs:
    """`ogr1d` and `ogr1dc`: one set of statistics that turns with the direction.

    Args:
      settings: hyperparameters.
      rule: how steps are made.
      warmup_steps: m ≥ 1, twice.
      stage_steps: steps between changes of the direction.
      centred: whether it turns about the current position (else about 0).
      measured: whether that position is measured from the parameters (else trusted).
      per_tensor: whether each leaf has a direction of its own.
      state_dtype: type of momentum and direction.
    """
    check_settings(settings, rule, warmup_steps, state_dtype)
    checks.check_count("stage_steps", stage_steps, 1)
    m = warmup_steps
    first_turn = 2 * m if centred else 2 * m + 1  # 1d turns after its first modelled step

    def init(params: optax.Params) -> OneDirectionState:
        shape = model_shape(params, per_tensor)
        zero = jnp.zeros(shape, averages.scalar_dtype())
        return OneDirectionState(
            count=jnp.zeros((), jnp.int32),
            momentum=averages.zeros_like_average(params, state_dtype),
            direction=averages.zeros_like_average(params, state_dtype),
            origin=jax.tree.map(_wide_copy, params) if measured else None,
            model=parabola.init_parabola(shape),
            position=zero,
            step=zero,
        )

    def update(
        updates: optax.Updates,
        state: OneDirectionState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OneDirectionState]:
        del extra
        params = transforms.require_params(params)
        t, v, old = state.count, state.momentum, state.direction
        at = settings.at(t)

        # First pass: every inner product of this step.
        turns = (t == m) | ((t >= first_turn) & ((t - first_turn) % stage_steps == 0))
        pairs = [(v, v), (v, old), (updates, v), (updates, old)]
        if measured:
            pairs.append((leafwise.tree_map(_difference, params, state.origin), old))
        elif not centred:
            pairs += [(params, v), (params, old)]
        vv, vd, gv, gd, *positions = inner_products(per_tensor, *pairs)
        mix = refresh(turns, vv, vd)
        slope = mix(gv, gd)
        model = state.model
        if centred:
            moved = positions[0] if measured else state.position + state.step
            model = parabola.shift(model, jnp.where(turns, moved, 0.0))
            position = jnp.where(turns, 0.0, moved)
        else:
            position = mix(*positions)

        # Scalars: the statistics and the step.
        weights = averages.sample_weights(jnp.maximum(t - m + 1, 1), at.beta)
        sampled = parabola.update_parabola(model, position, slope, weights)
        model = jax.tree.map(lambda new, kept: jnp.where(t >= m, new, kept), sampled, model)
        step = step_along(model, position, slope, at, rule)
        warming_up, coefficient = t < 2 * m, momentum_scale(t, at, rule)
        momentum_along = at.gamma * mix(vv, vd) + slope
        mix, along = leafwise.computed_once((mix, step + at.eta * slope))

        # Second pass: direction, momentum, update, each in place.
        direction = mix_directions(mix, v, old)
        momentum = update_momentum(v, updates, at.gamma, direction)
        emitted = emit(
            (momentum, direction, updates),
            params,
            warming_up=warming_up,
            coefficient=coefficient,
            along=along,
            eta=at.eta,
        )
        origin = None
        if measured:
            origin = select_after(moved, turns, params, state.origin)
            emitted = leafwise.tree_map(trees.ordered_after, emitted, origin)
        return emitted, OneDirectionState(
            count=optax.safe_increment(t),
            momentum=momentum,
            direction=direction,
            origin=origin,
            model=model,
            position=position,
            step=jnp.where(warming_up, coefficient * momentum_along, step),
        )

    return transforms.transformation(init, update)


def _difference(x: chex.Array, y: chex.Array) -> chex.Array:
    return trees.wide(x) - trees.wide(y)


def _wide_copy(x: chex.Array) -> chex.Array:
    return jnp.array(x, averages.average_dtype(x))  # a buffer of its own, which may be donated

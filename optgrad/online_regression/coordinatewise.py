r"""What the methods with one parabola per coordinate share.

Each coordinate has its own mean position m, and the *deviation* :math:`d = \theta - m` of the new
position from the mean that already contains it is all that the models need. It is carried in one
of three forms:

================ =================================================================================
``mean``         m is stored (in at least float32). Its rounding, about 6e-8·|θ| in float32, is the
                 error of d: right while θ moves by more than 1e-5 of its size.
``displacement`` θ − m and the previous parameters are stored; exact however small the moves, and in
                 16 bits too, at the price of one more vector.
``trusted``      :math:`\theta_{next} - m` is stored: the same, without the further vector, if the
                 update is applied exactly as it was returned (nothing after it in the chain, no
                 edits of the parameters).
================ =================================================================================
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, diagnostics, leafwise, transforms, trees

FORMS = ("mean", "displacement", "trusted")
LOW_PRECISION = (
    f"{averages.LOW_PRECISION}; never the mean position, whose place the distance from it takes "
    "with position = displacement or trusted"
)


class Position(NamedTuple):
    """Where each coordinate is relative to its mean."""

    stored: optax.Params  # m, θ − m or θ_next − m: see the forms above; like the parameters
    previous: optax.Params | None  # the previous parameters, for ``displacement`` only


class Sample(NamedTuple):
    """A gradient and where it was found, for one leaf, in at least float32."""

    gradient: chex.Array  # g
    deviation: chex.Array  # d = θ − m, m the mean position that already contains θ
    opposite: chex.Array  # m − θ, for a third use of d: see `adaptive_sgd_c`
    skip: bool  # whether coordinates with g = 0 keep their statistics

    def keep(self, new: chex.Array, old: chex.Array) -> chex.Array:
        """``new``, but ``old`` in the coordinates that are skipped.

        To be applied to each statistic before others are computed from it: XLA can then update all
        of them in place.
        """
        return jnp.where(self.gradient == 0, old, new) if self.skip else new

    def mean_gradient(self, mean: chex.Array, beta: chex.Numeric) -> chex.Array:
        """ḡ + (1−β)(g − ḡ)."""
        weight = jnp.asarray(1 - beta, mean.dtype)
        return self.keep(mean + weight * (self.gradient - mean), mean)

    def moment(
        self, moment: chex.Array, square: chex.Array, old: chex.Numeric, new: chex.Numeric
    ) -> chex.Array:
        """old·moment + new·square, the square or product of deviations from the new means."""
        weights = (jnp.asarray(w, moment.dtype) for w in (old, new))
        return self.keep(next(weights) * moment + next(weights) * square, moment)


# (sample, *vectors) -> (update, *new vectors), of one leaf, all in at least float32.
Rule = Callable[..., tuple[chex.Array, ...]]


def init_position(
    params: optax.Params, form: str, dtype: Any | None, *, at_origin: bool = False
) -> Position:
    """The position before the first step: on its mean, or with its mean at 0."""

    def stored(param: chex.Array) -> chex.Array:
        kind = dtype or averages.average_dtype(param)
        if form == "mean":  # never below float32
            kind = averages.average_dtype(kind)
        is_param = at_origin != (form == "mean")
        return jnp.array(param, kind, copy=True) if is_param else jnp.zeros_like(param, kind)

    previous = jax.tree.map(jnp.copy, params) if form == "displacement" else None
    return Position(jax.tree.map(stored, params), previous)


def update_coordinates(
    rule: Rule,
    grads: optax.Updates,
    params: optax.Params,
    position: Position,
    vectors: tuple[Any, ...],
    *,
    beta: chex.Numeric,
    form: str,
    skip: bool,
    as_meant: bool = False,
    given: tuple[Any, ...] = (),
) -> tuple[optax.Updates, Position, tuple[Any, ...]]:
    """One step of a rule on every leaf.

    Args:
      rule: what to do with one leaf.
      grads: gradients.
      params: the parameters at which they were evaluated.
      position: as of the last step.
      vectors: the method's further statistics, each a tree like ``params``; a leaf may be a scalar
        that is shared by its coordinates.
      beta: decay of the mean position.
      form: one of `FORMS`.
      skip: whether coordinates whose gradient is exactly 0 are left alone, statistics and all.
      as_meant: whether ``trusted`` takes a step for what it is before it is rounded to the
        parameter's type, so that D shows steps that are lost in the rounding.
      given: further trees, handed to the rule behind the vectors.

    Returns:
      Updates in the parameters' types, the new position and the new vectors.
    """

    def one(
        theta: chex.Array, g: chex.Array, stored: chex.Array, *old: chex.Array
    ) -> tuple[chex.Array, ...]:
        old, others = old[: len(old) - len(given)], old[len(old) - len(given) :]
        old, before = (old[:-1], old[-1]) if form == "displacement" else (old, None)
        dtype = averages.average_dtype(theta)

        def wide(x: chex.Array) -> chex.Array:
            return x.astype(averages.widest_dtype(x, theta))

        none = jnp.zeros((), dtype)
        sample = Sample(g.astype(dtype), none, none, skip)
        sample, centre = _located(form, sample, wide(stored), before, wide(theta), beta)
        step, *new = rule(sample, *map(wide, old), *map(wide, others))
        meant = sample.keep(step, jnp.zeros_like(step))
        step = meant.astype(theta.dtype)
        rest: tuple[chex.Array, ...] = ()
        if form == "trusted":
            moved = meant if as_meant else wide(_applied(theta, step))
            centre = sample.keep(sample.deviation + moved, wide(stored))
            step = trees.ordered_after(step, centre)
        if form == "displacement":
            rest = (sample.keep(trees.ordered_after(theta, centre), before),)
            step = trees.ordered_after(step, rest[0])
        kept = (x.astype(y.dtype) for x, y in zip((centre, *new), (stored, *old), strict=True))
        return step, *kept, *rest

    stores = [position.stored, *vectors]
    stores += [position.previous] if form == "displacement" else []
    results = trees.map_several(1 + len(stores), one, params, grads, *stores, *given)
    updates, stored, *rest = results
    previous = rest.pop() if form == "displacement" else None
    return updates, Position(stored, previous), tuple(rest)


def deviations(
    params: optax.Params, position: Position, *, beta: chex.Numeric, form: str
) -> optax.Params:
    """θ − m as `update_coordinates` is going to find it, if no coordinate is skipped.

    Trees like the parameters, in at least float32, for what has to be known before the step.
    """

    def one(theta: chex.Array, stored: chex.Array, *rest: chex.Array) -> chex.Array:
        dtype = averages.average_dtype(theta)
        none = jnp.zeros((), dtype)
        sample = Sample(none, none, none, skip=False)
        before = rest[0] if rest else None
        theta, stored = theta.astype(dtype), stored.astype(averages.widest_dtype(stored, theta))
        return _located(form, sample, stored, before, theta, beta)[0].deviation

    before = () if position.previous is None else (position.previous,)
    return leafwise.tree_map(one, params, position.stored, *before)


def mean_position(params: optax.Params, position: Position, form: str) -> optax.Params:
    """The mean position m itself, in at least float32."""
    if form == "mean":
        return position.stored
    origin = position.previous if form == "displacement" else params
    return leafwise.tree_map(lambda x, d: trees.wide(x) - trees.wide(d), origin, position.stored)


def _located(  # noqa: PLR0917
    form: str,
    sample: Sample,
    stored: chex.Array,
    before: Any,
    theta: chex.Array,
    beta: chex.Numeric,
) -> tuple[Sample, chex.Array]:
    """The sample with its deviations, and what is stored of them before the step is known."""
    past, fresh = jnp.asarray(beta, theta.dtype), jnp.asarray(1 - beta, theta.dtype)
    if form == "mean":
        mean = sample.keep(stored + fresh * (theta - stored), stored)
        centre = mean.astype(theta.dtype)
        return sample._replace(deviation=theta - centre, opposite=centre - theta), mean
    moved = theta - before.astype(theta.dtype) if form == "displacement" else 0.0
    deviation = sample.keep(past * (stored + moved), stored)
    return sample._replace(deviation=deviation, opposite=-deviation), deviation


def _applied(theta: chex.Array, step: chex.Array) -> chex.Array:
    """By how much `optax.apply_updates` moves ``theta``, its rounding included."""
    info: Any = jnp.finfo(theta.dtype)  # type: ignore[no-untyped-call]
    dtype = averages.average_dtype(theta)
    # Without this the compiler may leave out the rounding to 16 bits.
    moved = jax.lax.reduce_precision(theta + step, info.nexp, info.nmant)
    return moved.astype(dtype) - theta.astype(dtype)


def direction(mean: chex.Array, g: chex.Array, total: chex.Array, momentum: bool) -> chex.Array:
    """The bias-corrected mean gradient ḡ/(1−βᵗ), or the gradient itself."""
    return mean / total.astype(mean.dtype) if momentum else g


def descend(direction: chex.Array, rate: chex.Array) -> chex.Array:
    """−rate·direction; 0 where the direction is 0, whatever the rate."""
    return jnp.where(direction == 0, 0.0, -rate * direction)


def root(x: chex.Array) -> chex.Array:
    """√x, with derivative 0 instead of infinity at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def limited(rate: chex.Array, lr_min: chex.Numeric, lr_max: chex.Numeric) -> chex.Array:
    """The rate within its limits."""
    low, high = jnp.asarray(lr_min, rate.dtype), jnp.asarray(lr_max, rate.dtype)
    return jnp.minimum(jnp.maximum(rate, low), high)


def check_common(
    *,
    alpha: Any,
    beta: Any,
    lr_min: Any,
    lr_max: Any,
    sigma_theta: Any,
    position: str,
    state_dtype: Any | None,
) -> None:
    """Raises unless the arguments that all methods have are in range."""
    checks.check_float_dtype("state_dtype", state_dtype)
    checks.check_in_range("alpha", alpha, 0.0, low_open=True, high_open=True)
    checks.check_in_range("beta", beta, 0.0, 1.0, low_open=True, high_open=True)
    check_limits(lr_min, lr_max)
    checks.check_in_range("sigma_theta", sigma_theta, 0.0, low_open=True, high_open=True)
    checks.check_one_of("position", position, FORMS)


def check_limits(lr_min: Any, lr_max: Any) -> None:
    """Raises unless 0 ≤ lr_min ≤ lr_max, where lr_max may be infinite."""
    checks.check_in_range("lr_max", lr_max, 0.0, low_open=True, or_infinite=True)
    is_number = isinstance(lr_max, numbers.Real)
    checks.check_in_range("lr_min", lr_min, 0.0, float(lr_max) if is_number else math.inf)


def at(value: Any, count: chex.Array) -> Any:
    """`transforms.hyperparameter_at`."""
    return transforms.hyperparameter_at(value, count)


def default(value: Any, preset: Any) -> Any:
    """``value``, or what the preset says if it is None."""
    return preset if value is None else value


def divide(x: chex.Array, y: chex.Array) -> chex.Array:
    """x/y, and 0 where y is 0 or subnormal."""
    valid = y >= np.finfo(y.dtype).tiny
    return jnp.where(valid, x / jnp.where(valid, y, 1.0), 0.0)


def mean_of(tree: Any) -> chex.Array:
    """Mean of all entries of a tree; 0 of none."""
    dtype = averages.scalar_dtype()
    leaves = jax.tree.leaves(tree)
    total = sum((jnp.sum(x, dtype=dtype) for x in leaves), start=jnp.zeros((), dtype))
    return total / max(sum(x.size for x in leaves), 1)


def per_parameter(position_variance: Any, covariance: Any) -> dict[str, chex.ArrayTree]:
    """``curvature`` |λ| = |c|/v and ``step_size`` 1/|λ|, before confidence and limits."""
    return {
        "curvature": diagnostics.ratio(covariance, position_variance),
        "step_size": diagnostics.ratio(position_variance, covariance),
    }


def curvatures(position_variance: Any, covariance: Any) -> dict[str, chex.Array]:
    """Curvatures λ = c/v and step sizes 1/|λ| over the coordinates that have one.

    Returns:
      ``curvature_geomean``, ``curvature_min``, ``curvature_max`` of |λ|; ``curvature_negative``,
      the fraction of all coordinates where λ < 0; ``step_size_geomean``, ``step_size_min``,
      ``step_size_max`` of 1/|λ|, before confidence and limits. Scalars, 0 where there is none.
    """
    size = diagnostics.summarize(jax.tree.map(jnp.abs, covariance), position_variance)
    inverse = (size.geomean, size.max, size.min)
    reciprocals = diagnostics.Summary(*(divide(jnp.ones_like(x), x) for x in inverse))
    return {
        **{f"curvature_{name}": x for name, x in size._asdict().items()},
        "curvature_negative": mean_of(jax.tree.map(lambda c: c < 0, covariance)),
        **{f"step_size_{name}": x for name, x in reciprocals._asdict().items()},
    }

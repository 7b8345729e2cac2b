r"""What vSGD and vSGD-fd share: averages whose memory adapts to the noise of each coordinate.

Where the paper keeps :math:`\bar v`, the average of :math:`g^2`, the central
:math:`s = \bar v - \bar g^2` is carried here, by the recursion that the two averages imply,

.. math:: s \leftarrow (1-\kappa)\,s + \kappa(1-\kappa)(g-\bar g)^2 + \kappa\,\hat v, \quad
   \kappa = 1/\tau

with the variance :math:`\hat v` of the examples within the batch (0 if they are not known). It
cannot become negative by rounding, and the share of the signal is
:math:`r = \bar g^2/\bar v = \bar g^2/(\bar g^2 + s)`. The memory τ is carried as its inverse κ.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, leafwise, oracles, transforms, trees
from optgrad.step_size import coordinates

REFERENCE = 'T. Schaul, S. Zhang, Y. LeCun, "No more pesky learning rates", 2013'
REFERENCE_FD = (
    'T. Schaul, Y. LeCun, "Adaptive learning rates and parallelization for stochastic, sparse, '
    'non-smooth gradients", 2013'
)
LOW_PRECISION = (
    "averages and memories: by low_precision_state; with state_dtype, rounding to nearest, "
    "memories of more than 256 samples stand still"
)


class VSGDState(NamedTuple):
    """Averages of gradient and curvature, each coordinate with a memory of its own."""

    count: chex.Array  # number of updates, int32, shape ()
    mean_gradient: optax.Updates  # ḡ, like the parameters, at least float32
    gradient_variance: optax.Updates  # s = v̄ − ḡ² ≥ 0, like the parameters
    mean_curvature: optax.Updates  # h̄ ≥ 0, like the parameters
    mean_square_curvature: optax.Updates | None  # average of h² of vsgd_fd, like the parameters
    weight: (
        optax.Updates
    )  # κ = 1/τ in (0, 1], of a new sample after the warm-up, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled, over the coordinates where it is positive; scalars, 0 if that is none.

        Returns:
          ``step_size_geomean``, ``step_size_min``, ``step_size_max`` of the rates for one sample
          (before ``max_rate``; with per-example gradients the rates used are larger),
          ``signal_geomean``, … of r = ḡ²/v̄, ``memory_geomean``, … of τ.
        """
        found: dict[str, chex.Array] = {}
        for name, tree in self.per_parameter().items():
            found |= coordinates.summarize(name, tree)
        return found

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``step_size``, ``signal`` r and ``memory`` τ, of which `diagnostics` tells the range."""
        signals = jax.tree.map(
            lambda m, s: _signal(*_wide(m, s)), self.mean_gradient, self.gradient_variance
        )
        curvatures = [self.mean_curvature]
        if self.mean_square_curvature is not None:
            curvatures.append(self.mean_square_curvature)
        rates = jax.tree.map(lambda *x: _limited(_rate(*_wide(*x)), None), signals, *curvatures)
        memories = jax.tree.map(lambda k: 1 / k, self.weight)
        return {"step_size": rates, "signal": signals, "memory": memories}


class Settings(NamedTuple):
    """The arguments that both methods have."""

    inflation: Any
    warmup_steps: int
    max_rate: Any | None
    outliers: bool
    state_dtype: Any | None

    def check(self) -> None:
        """Refuses what is out of range."""
        checks.check_in_range("inflation", self.inflation, 1.0, high_open=True)
        checks.check_count("warmup_steps", self.warmup_steps, 2)
        if self.max_rate is not None:
            checks.check_in_range("max_rate", self.max_rate, 0.0, low_open=True)
        checks.check_one_of("outliers", self.outliers, (False, True))
        checks.check_float_dtype("state_dtype", self.state_dtype)


class Sample(NamedTuple):
    """What one call of ``update`` knows."""

    gradient: optax.Updates  # of the batch
    curvature: optax.Updates  # h ≥ 0, a tree like the gradient
    variance: optax.Updates | None  # v̂ of the examples within the batch, a tree like the gradient
    examples: int  # n ≥ 1, as many as ``variance`` is about


def init_state(params: optax.Params, settings: Settings, *, squares: bool) -> VSGDState:
    """The state before the first sample; ``squares`` for the average of h²."""
    dtype = settings.state_dtype
    return VSGDState(
        count=jnp.zeros((), jnp.int32),
        mean_gradient=averages.zeros_like_average(params, dtype),
        gradient_variance=averages.zeros_like_average(params, dtype),
        mean_curvature=averages.zeros_like_average(params, dtype),
        mean_square_curvature=averages.zeros_like_average(params, dtype) if squares else None,
        weight=averages.full_like_average(params, 1 / settings.warmup_steps, dtype),
    )


def variance_within(
    per_example_grads: optax.Updates | None, gradient: optax.Updates
) -> tuple[optax.Updates | None, int]:
    """The variance of the examples of a batch and their number; None and 1 if there are none.

    Raises:
      ValueError: if their shapes do not fit the gradient.
    """
    if per_example_grads is None or not jax.tree.leaves(per_example_grads):
        return None, 1
    coordinates.check_like("per_example_grads", per_example_grads, gradient, batched=True)
    size = oracles.batch_size(per_example_grads, "per_example_grads")
    return leafwise.tree_map(lambda g: jnp.var(trees.wide(g), axis=0), per_example_grads), size


def advance(
    sample: Sample, state: VSGDState, params: optax.Params | None, settings: Settings
) -> tuple[optax.Updates, VSGDState]:
    """One update, −η⊙g in the parameters' types, and the averages that the sample is part of."""
    count = optax.safe_increment(state.count)
    is_warmup, ends_warmup = count <= settings.warmup_steps, count == settings.warmup_steps
    inflation = transforms.hyperparameter_at(settings.inflation, state.count)
    cap = settings.max_rate
    cap = None if cap is None else transforms.hyperparameter_at(cap, state.count)
    has_squares = state.mean_square_curvature is not None

    def rule(
        gradient: chex.Array, curvature: chex.Array, within: chex.Array, *stored: chex.Array
    ) -> tuple[chex.Array, ...]:
        old = _Leaf(*_wide(*stored))
        g, h, v = (x.astype(old.mean.dtype) for x in (gradient, curvature, within))
        weight = old.weight
        if settings.outliers:
            longer = _is_outlier(old, g, h, sample.examples) & ~is_warmup
            weight = jnp.where(longer, weight / (1 + weight), weight)
        kappa = jnp.where(is_warmup, 1 / count.astype(weight.dtype), weight)
        new = _averaged(old, g, h, v, kappa)
        new = optax.tree.where(ends_warmup, _inflated(new, jnp.asarray(inflation, g.dtype)), new)
        variance = new.variance / sample.examples
        rate = _limited(_rate(_signal(new.mean, variance), new.curvature, new.square), cap)
        step = jnp.where(is_warmup, 0.0, -rate * g)
        weight = jnp.where(is_warmup, weight, _next_weight(weight, new.mean, variance))
        # Written after all that is averaged with it; the minimum, since h̄ may be infinite.
        new = new._replace(weight=trees.ordered_after(weight, jnp.minimum(new.curvature, 1.0)))
        kept = [x for x in new if x is not None]
        return step, *(x.astype(y.dtype) for x, y in zip(kept, stored, strict=True))

    vectors = [state.mean_gradient, state.gradient_variance, state.mean_curvature, state.weight]
    vectors += [state.mean_square_curvature] if has_squares else []
    within = sample.variance
    if within is None:
        within = jax.tree.map(lambda _: jnp.zeros((), jnp.float32), sample.gradient)
    steps, mean, variance, curvature, weight, *square = trees.map_several(
        1 + len(vectors), rule, sample.gradient, sample.curvature, within, *vectors
    )
    like = sample.gradient if params is None else params
    state = VSGDState(count, mean, variance, curvature, square[0] if square else None, weight)
    return transforms.cast_like(steps, like), state


class _Leaf(NamedTuple):
    """The averages of one leaf, in at least float32."""

    mean: chex.Array
    variance: chex.Array
    curvature: chex.Array
    weight: chex.Array
    square: chex.Array | None = None  # of vsgd_fd


def _is_outlier(old: _Leaf, g: chex.Array, h: chex.Array, examples: int) -> chex.Array:
    """Whether gradient or curvature are two standard deviations away from their means."""
    is_far = jnp.abs(g - old.mean) > 2 * jnp.sqrt(old.variance / examples)
    if old.square is None:
        return is_far
    variance = jnp.maximum(old.square - jnp.square(old.curvature), 0.0)
    return is_far | (jnp.abs(h - old.curvature) > 2 * jnp.sqrt(variance))


def _averaged(old: _Leaf, g: chex.Array, h: chex.Array, v: chex.Array, kappa: chex.Array) -> _Leaf:
    """The averages after one more sample of weight κ."""

    def blend(past: chex.Array, new: chex.Array) -> chex.Array:
        # A past of weight 0 is forgotten even if it has overflowed.
        return jnp.where(kappa < 1, (1 - kappa) * past, 0.0) + kappa * new

    # From whichever end is nearer: with κ = 1 the mean is g whatever came before.
    deviation = g - old.mean
    mean = jnp.where(kappa > 0.5, g - (1 - kappa) * deviation, old.mean + kappa * deviation)
    # Through the new mean, (1−κ)(g − old)² = (g − new)²/(1−κ): XLA then updates both in place.
    rest = jnp.where(kappa < 1, 1 - kappa, 1.0)
    square = jnp.where(kappa < 1, jnp.square(g - mean) / rest, 0.0)
    return old._replace(
        mean=mean,
        variance=blend(old.variance, square + v),
        curvature=blend(old.curvature, h),
        square=None if old.square is None else blend(old.square, jnp.square(h)),
    )


def _inflated(leaf: _Leaf, factor: chex.Array) -> _Leaf:
    """The slow start: v̄ and h̄ overestimated by that factor, ḡ as it is."""
    more = jnp.where(factor == 1, 0.0, (factor - 1) * jnp.square(leaf.mean))
    return leaf._replace(
        variance=jnp.maximum(factor * leaf.variance + more, 0.0),
        curvature=factor * leaf.curvature,
        square=None if leaf.square is None else jnp.square(factor) * leaf.square,
    )


def _signal(mean: chex.Array, variance: chex.Array) -> chex.Array:
    """Share r = m²/(m² + s) of the signal; 0 where the squares are 0 or overflow."""
    total = jnp.square(mean) + variance
    usable = _is_usable(total)
    return jnp.where(usable, jnp.square(mean) / jnp.where(usable, total, 1.0), 0.0)


def _next_weight(weight: chex.Array, mean: chex.Array, variance: chex.Array) -> chex.Array:
    """The weight κ of which 1/κ ← (1−r)/κ + 1, without the quotient r, which is not stored."""
    total = jnp.square(mean) + variance
    usable = _is_usable(total)
    total, noise = jnp.where(usable, total, 1.0), jnp.where(usable, variance, 1.0)
    return weight * total / (weight * total + noise)


def _is_usable(total: chex.Array) -> chex.Array:
    """Whether a sum of squares has neither over- nor underflown."""
    return (total >= np.finfo(total.dtype).tiny) & (total < jnp.inf)


def _rate(
    signal: chex.Array, curvature: chex.Array, square: chex.Array | None = None
) -> chex.Array:
    """Rate r/h̄, or r·h̄/mean(h²); infinite where there is no curvature."""
    numerator = signal if square is None else signal * curvature
    denominator = curvature if square is None else square
    is_curved = denominator >= np.finfo(denominator.dtype).tiny
    rate = numerator / jnp.where(is_curved, denominator, 1.0)
    return jnp.where(jnp.isnan(denominator) | is_curved, rate, jnp.inf)


def _limited(rate: chex.Array, cap: chex.Numeric | None) -> chex.Array:
    """The rate up to its cap; where it is infinite without a cap, 0."""
    if cap is None:
        return jnp.where(jnp.isposinf(rate), 0.0, rate)
    return jnp.minimum(rate, jnp.asarray(cap, rate.dtype))


def _wide(*leaves: chex.Array) -> list[chex.Array]:
    """The leaves in their widest type, at least float32."""
    dtype = averages.widest_dtype(*leaves)
    return [x.astype(dtype) for x in leaves]

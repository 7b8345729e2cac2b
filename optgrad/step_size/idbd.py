"""Incremental delta-bar-delta."""

import math
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, transforms, trees
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import coordinates


class IDBDState(NamedTuple):
    """Each coordinate's rate, and the trace of its recent changes."""

    count: chex.Array  # number of updates, int32, shape ()
    rate: optax.Params  # α = e^β, the step size, like the parameters
    trace: optax.Params  # h, decaying sum of updates, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """The learned rates α: ``step_size_geomean``, ``step_size_min``, ``step_size_max``."""
        return coordinates.summarize("step_size", self.rate)

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``step_size``: the learned rates."""
        return {"step_size": self.rate}


def idbd(
    eta: float | optax.Schedule = 0.01,
    *,
    initial_rate: float | optax.Schedule = 0.05,
    clip: float | optax.Schedule = 2.0,
    floor: float | optax.Schedule = -10.0,
    max_rate: float | optax.Schedule | None = None,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Incremental delta-bar-delta (IDBD): a learned step size for every coordinate.

    .. math::
      \beta &\leftarrow \max\bigl(\beta + \operatorname{clip}(-\eta\,g h, \pm 2),\, -10\bigr),
      \quad \alpha = e^\beta \\
      \theta &\leftarrow \theta - \alpha g \\
      h &\leftarrow h\,\max(1 - \alpha c, 0) - \alpha g

    with the curvature :math:`c\ge 0` of the sample's loss. For a linear model with inputs x and
    the loss ½δ² of one sample it is :math:`c_i=x_i^2`, and :math:`-g_i=\delta x_i`: Sutton's rule.
    (The loss δ², without the ½, doubles both g and c.) The trace h holds the recent changes of a
    coordinate; while gradients go on in their direction the rate grows, where they turn it shrinks.

    ``update`` takes one of two extra arguments: ``features``, the inputs :math:`x_i` that belong to
    each parameter of a linear model, or ``curvature_diagonal``, for instance from
    `optgrad.gauss_newton_diagonal`. Where both are given, ``curvature_diagonal`` is used.

    It shines in online learning of a few relevant inputs among many: on Sutton's tracking task (20
    inputs, 5 of them relevant) the mean squared error is 1.6 against 3.3 of the best fixed rate of
    LMS, and the rates of relevant inputs become 15 times those of the others. It fails where η does
    not fit the gradients: β changes by :math:`\eta\alpha g^2` at first, so that **η scales like
    1/g²**. With 0.01 the tracking task works, with 0.02 it diverges now and then, with 0.05 always.
    Where gradients are small 0.01 does nothing: on the full batch of 20-dimensional least squares
    no rate grows by more than two fifths in 2000 steps, and the result is that of gradient descent
    with ``initial_rate``, which must be stable for itself.

    Args:
      eta: η ≥ 0, rate at which rates are learned; in units of 1/(α·g²).
      initial_rate: α > 0 of every coordinate before the first step.
      clip: > 0, largest change of β in one step.
      floor: smallest β; −10 is a rate of 4.5e-5.
      max_rate: > 0, largest α; by default what has a finite square.
      state_dtype: floating-point type of α and h; default the parameter's, but at least float32.
        In 16 bits changes of β below 1/256 are lost.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size.
      `optgrad.diagnostics` reads the range of the step sizes.

    Raises:
      ValueError: if an argument is outside its range; by ``update``, if both extra arguments are
        missing or do not fit the gradient.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.idbd(0.1, initial_rate=0.1)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = optimizer.update(gradient, state, features=jnp.ones(2))
      >>> print([f"{u:.3f}" for u in updates])
      ['-0.101', '0.099']

    The rate of the coordinate whose gradients agree has grown, the other's has shrunk.

    References:
      R. S. Sutton, "Adapting bias by gradient descent: an incremental version of delta-bar-delta",
      AAAI 1992, Fig. 2 (the bounds on β are in its text). H. Yao, "Learning to Accelerate by the
      Methods of Step-size Planning", 2022, Section 2.5.

    Deviations from the paper: any loss with a diagonal curvature; ``max_rate``.
    """
    checks.check_in_range("eta", eta, 0.0, high_open=True)
    checks.check_in_range("initial_rate", initial_rate, 0.0, low_open=True, high_open=True)
    checks.check_in_range("clip", clip, 0.0, low_open=True)
    checks.check_in_range("floor", floor, -math.inf, math.inf, high_open=True)
    if max_rate is not None:
        checks.check_in_range("max_rate", max_rate, 0.0, low_open=True)
    checks.check_float_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> IDBDState:
        count = jnp.zeros((), jnp.int32)
        start = transforms.hyperparameter_at(initial_rate, count)
        return IDBDState(
            count=count,
            rate=averages.full_like_average(params, start, state_dtype),
            trace=averages.zeros_like_average(params, state_dtype),
        )

    def update(
        updates: optax.Updates,
        state: IDBDState,
        params: optax.Params | None = None,
        *,
        features: optax.Updates | None = None,
        curvature_diagonal: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, IDBDState]:
        del extra
        curvature = coordinates.curvature(
            updates, curvature_diagonal, features, "features or curvature_diagonal"
        )
        speed, most, least = (
            transforms.hyperparameter_at(x, state.count) for x in (eta, clip, floor)
        )
        cap = None if max_rate is None else transforms.hyperparameter_at(max_rate, state.count)

        def rule(
            gradient: chex.Array, c: chex.Array, rate: chex.Array, trace: chex.Array
        ) -> tuple[chex.Array, ...]:
            dtype = averages.average_dtype(rate)
            g, c, alpha, h = (x.astype(dtype) for x in (gradient, c, rate, trace))
            bound = jnp.asarray(most, dtype)
            change = jnp.clip(-(jnp.asarray(speed, dtype) * g) * h, -bound, bound)
            highest = _largest(dtype) if cap is None else cap
            low, high = jnp.asarray(least, dtype), jnp.log(jnp.asarray(highest, dtype))
            # The exponential comes last: XLA does not compute it twice, and so stores no second
            # copy of the rates.
            alpha = jnp.exp(jnp.minimum(jnp.maximum(jnp.log(alpha) + change, low), high))
            step = -alpha * g
            decay = jnp.maximum(1 - alpha * c, 0.0)
            h = jnp.where(decay > 0, h * decay, 0.0) + step
            return step, alpha.astype(rate.dtype), h.astype(trace.dtype)

        steps, rate, trace = trees.map_several(3, rule, updates, curvature, state.rate, state.trace)
        like = updates if params is None else params
        count = optax.safe_increment(state.count)
        return transforms.cast_like(steps, like), IDBDState(count, rate, trace)

    return transforms.transformation(init, update)


def _largest(dtype: Any) -> float:
    """The rate whose square does not overflow."""
    return math.sqrt(float(np.finfo(dtype).max))


register(
    Method(
        name="idbd",
        factory=idbd,
        scale_by=None,
        family="step_size",
        title="Incremental delta-bar-delta (IDBD)",
        reference='R. S. Sutton, "Adapting bias by gradient descent: an incremental version of '
        'delta-bar-delta", 1992',
        equation="Fig. 2: β ← β − η·g·h, θ ← θ − e^β·g, h ← h·max(1 − e^β·c, 0) − e^β·g",
        needs=frozenset({"features", "curvature_diagonal"}),
        static_args=("state_dtype",),
        tunes=Tunable("eta", 1e-5, 1.0),
        test_hyperparams={"eta": 0.1, "initial_rate": 0.2},
        state_size=2,
        low_precision="rates and traces: by low_precision_state; state_dtype, rounding to nearest, "
        "loses changes of β below 1/256",
    )
)

"""Delta-bar-delta."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, transforms, trees
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import coordinates


class DeltaBarDeltaState(NamedTuple):
    """Each coordinate's rate, and the average of its past gradients."""

    count: chex.Array  # number of updates, int32, shape ()
    rate: optax.Params  # ε, the step size, like the parameters
    average: optax.Updates  # δ̄, average gradient without the last one, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """The learned rates ε: ``step_size_geomean``, ``step_size_min``, ``step_size_max``."""
        return coordinates.summarize("step_size", self.rate)

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``step_size``: the learned rates."""
        return {"step_size": self.rate}


def delta_bar_delta(
    kappa: float | optax.Schedule = 1e-3,
    phi: float | optax.Schedule = 0.1,
    theta: float | optax.Schedule = 0.7,
    *,
    initial_rate: float | optax.Schedule = 0.01,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Delta-bar-delta: rates that grow linearly while gradients agree and shrink geometrically.

    .. math::
      \epsilon &\leftarrow \begin{cases}
        \epsilon + \kappa & \bar\delta\,g > 0 \\
        (1-\phi)\,\epsilon & \bar\delta\,g < 0 \\
        \epsilon & \text{else}
      \end{cases} \\
      \bar\delta &\leftarrow (1-\theta)\,g + \theta\bar\delta \\
      w &\leftarrow w - \epsilon g

    in every coordinate, where the test uses the *old* average of gradients and the step the *new*
    rate. It shines on full batches whose coordinates differ in scale: 20-dimensional least squares
    of condition 100 are within 1e-18 of the minimum after 2000 steps, where gradient descent at
    0.1 still is 1e-4 above it. It is made for full batches only. Under noise the signs agree
    half of the time, and the rates settle around κ/φ whatever the curvature; κ is then a learning
    rate. Since the growth is additive, κ must be small against 1/L for the largest curvature L:
    otherwise the rates overshoot before a sign turns.

    Args:
      kappa: κ ≥ 0, growth of a rate in one step, small against 1/L.
      phi: φ in [0, 1), share of a rate that is lost where signs disagree; 0.1 … 0.5.
      theta: θ in [0, 1), decay of the average gradient.
      initial_rate: ε > 0 of every coordinate before the first step.
      state_dtype: floating-point type of ε and δ̄; default the parameter's, but at least float32.
        In 16 bits a κ below 1/256 of the rate is lost.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds two vectors of parameter size.
      `optgrad.diagnostics` reads the range of the step sizes.

    Raises:
      ValueError: if an argument is outside its range.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.delta_bar_delta(0.5, 0.5, initial_rate=1.0)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> print(updates)
      [-1.5  0.5]

    The first coordinate's gradients agree, the second one's do not.

    References:
      R. A. Jacobs, "Increased rates of convergence through learning rate adaptation", Neural
      Networks 1, 1988, the delta-bar-delta rule. H. Yao, "Learning to Accelerate by the Methods of
      Step-size Planning", 2022.

    Deviations from the paper: none known; the paper has no defaults for κ and the initial rate.
    """
    checks.check_in_range("kappa", kappa, 0.0, high_open=True)
    checks.check_in_range("phi", phi, 0.0, 1.0, high_open=True)
    checks.check_in_range("theta", theta, 0.0, 1.0, high_open=True)
    checks.check_in_range("initial_rate", initial_rate, 0.0, low_open=True, high_open=True)
    checks.check_float_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> DeltaBarDeltaState:
        count = jnp.zeros((), jnp.int32)
        start = transforms.hyperparameter_at(initial_rate, count)
        return DeltaBarDeltaState(
            count=count,
            rate=averages.full_like_average(params, start, state_dtype),
            average=averages.zeros_like_average(params, state_dtype),
        )

    def update(
        updates: optax.Updates,
        state: DeltaBarDeltaState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, DeltaBarDeltaState]:
        del extra
        growth, loss, decay = (
            transforms.hyperparameter_at(x, state.count) for x in (kappa, phi, theta)
        )
        fresh = 1 - decay  # before it is rounded to float32

        def rule(
            gradient: chex.Array, rate: chex.Array, average: chex.Array
        ) -> tuple[chex.Array, ...]:
            dtype = averages.average_dtype(rate)
            g, e, bar = (x.astype(dtype) for x in (gradient, rate, average))
            agreement = jnp.sign(bar) * jnp.sign(g)  # the product may underflow
            grown, shrunk = e + jnp.asarray(growth, dtype), e * jnp.asarray(1 - loss, dtype)
            e = jnp.where(agreement > 0, grown, jnp.where(agreement < 0, shrunk, e))
            bar = jnp.asarray(fresh, dtype) * g + jnp.asarray(decay, dtype) * bar
            bar = trees.ordered_after(bar, e)
            return -e * g, e.astype(rate.dtype), bar.astype(average.dtype)

        steps, rate, average = trees.map_several(3, rule, updates, state.rate, state.average)
        like = updates if params is None else params
        count = optax.safe_increment(state.count)
        return transforms.cast_like(steps, like), DeltaBarDeltaState(count, rate, average)

    return transforms.transformation(init, update)


register(
    Method(
        name="delta_bar_delta",
        factory=delta_bar_delta,
        scale_by=None,
        family="step_size",
        title="Delta-bar-delta",
        reference='R. A. Jacobs, "Increased rates of convergence through learning rate adaptation"'
        ", 1988",
        equation="ε ← ε + κ where δ̄·g > 0, (1 − φ)·ε where δ̄·g < 0; w ← w − ε⊙g",
        static_args=("state_dtype",),
        tunes=Tunable("kappa", 1e-6, 1.0),
        test_hyperparams={"kappa": 0.01, "initial_rate": 0.1},
        state_size=2,
        low_precision="rates and averages: by low_precision_state; state_dtype, rounding to "
        "nearest, loses a κ below 1/256 of the rate",
    )
)

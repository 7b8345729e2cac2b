"""Variance-based stochastic gradient descent with finite-difference curvature."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, leafwise, transforms, trees
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import coordinates, variance_rate
from optgrad.step_size.variance_rate import Sample, Settings, VSGDState


def vsgd_fd(
    inflation: float | optax.Schedule = 2.0,
    *,
    warmup_steps: int = 10,
    probe_floor: float | optax.Schedule = 1e-8,
    max_rate: float | optax.Schedule | None = None,
    outliers: bool = False,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-based SGD whose curvature is a difference of two gradients (vSGD-fd).

    .. math::
      h &= |\nabla f(\theta+\bar g) - \nabla f(\theta)|/|\bar g|
        \quad\text{(on the same batch)} \\
      (\bar g, \bar v, \bar h, \overline{hh}) &\leftarrow (1-\tfrac1\tau)(\ldots)
        + \tfrac1\tau(g, g^2, h, h^2) \\
      r &= \bar g^2/\bar v, \quad
      \theta \leftarrow \theta - \frac{\bar h}{\overline{hh}}\,r\,g, \quad
      \tau \leftarrow (1-r)\,\tau + 1

    `vsgd` for any loss: the second gradient of each step is taken through ``value_fn`` at a point
    one mean gradient away. During the ``warmup_steps``, which do not move, that is one gradient
    away. Fluctuating curvature shrinks the rates, by the factor :math:`\bar h^2/\overline{hh}`.

    It shines where `vsgd` does and nobody computes the curvature, with 5 to 7 times its excess loss
    on noisy least squares. The quotient compares a change along *all* coordinates with the move of
    one: neighbours of larger curvature or move enter, mostly as too large an h. Without noise and
    with coupled coordinates it is erratic, and diverges on rotated quadratics. One mean gradient is
    a long way where gradients are large: from (−1, 0), where Rosenbrock's function has a gradient
    of 450, it sees a curvature of 10⁸ and hardly moves in 20,000 steps.

    ``value_fn`` must be the loss on the batch that the gradient was computed on. If something
    precedes in the chain, hand over the optional ``grad``, the gradient as it was before that; it
    is what the second gradient is compared with. ``per_example_grads`` is optional as in `vsgd`.
    A difference that is not finite (the loss overflowed at the probed point) does not count.

    Args:
      inflation: C ≥ 1, by which :math:`\bar v`, :math:`\bar h` and the root of
        :math:`\overline{hh}` are overestimated at the end of the warm-up (slow start).
      warmup_steps: n₀ ≥ 2, calls that do not move.
      probe_floor: > 0, smallest distance at which a coordinate is probed, in the parameters' units
        and in place of :math:`|\bar g_i|`, also as denominator; never less than :math:`\sqrt{eps}`
        of the parameter, below which the difference is rounding. Under noise larger floors are
        better (10⁻³ halves the excess loss above), without noise they are worse.
      max_rate: > 0, cap of the rates. Default none; then coordinates without any curvature, whose
        rate is infinite, do not move at all.
      outliers: whether a gradient or curvature further than two standard deviations from its mean
        lengthens its coordinate's memory by one sample before it is averaged.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32. In 16 bits memories of more than 256 samples stand still.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds five vectors of parameter size; a step
      costs two gradients. `optgrad.diagnostics` reads rates, shares of signal and memories.

    Raises:
      ValueError: if an argument is outside its range; by ``update``, if ``params`` or ``value_fn``
        is missing or an extra argument does not fit the gradient.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.vsgd_fd(inflation=1.0, warmup_steps=2)
      >>> loss = lambda w: 0.5 * w[0] ** 2 + 4.0 * w[1] ** 2
      >>> params = jnp.array([1.0, 1.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(
      ...         jax.grad(loss)(params), state, params, value_fn=loss)
      ...     params = params + updates
      >>> print(abs(params).max() < 1e-5)
      True

    References:
      T. Schaul, Y. LeCun, "Adaptive learning rates and parallelization for stochastic, sparse,
      non-smooth gradients", ICLR 2013, Algorithm 1.

    Deviations from the paper: the floor, and :math:`\bar v-\bar g^2` instead of :math:`\bar v` as
    in `vsgd`. The authors' first code (py-optim) divides by the signed :math:`\bar g` and keeps the
    rate :math:`r/\bar h`.
    """
    settings = Settings(inflation, warmup_steps, max_rate, outliers, state_dtype)
    settings.check()
    checks.check_in_range("probe_floor", probe_floor, 0.0, low_open=True, high_open=True)

    def init(params: optax.Params) -> VSGDState:
        return variance_rate.init_state(params, settings, squares=True)

    def update(
        updates: optax.Updates,
        state: VSGDState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], chex.Array] | None = None,
        grad: optax.Updates | None = None,
        per_example_grads: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, VSGDState]:
        del extra
        params = transforms.require_params(params)
        if value_fn is None:
            raise ValueError(
                "value_fn = None; accepted: a function of the parameters that returns the loss on "
                "the batch of this gradient, optimizer.update(…, value_fn=value_fn)"
            )
        gradient = updates if grad is None else grad
        coordinates.check_like("grad", gradient, updates)
        within, examples = variance_rate.variance_within(per_example_grads, updates)
        floor = transforms.hyperparameter_at(probe_floor, state.count)
        is_warmup = state.count < warmup_steps
        moves = leafwise.tree_map(
            lambda g, m, p: _probe(jnp.where(is_warmup, g.astype(m.dtype), m), p, floor),
            gradient,
            state.mean_gradient,
            params,
        )
        probed = leafwise.tree_map(lambda p, m: (trees.wide(p) + m).astype(p.dtype), params, moves)
        second = jax.grad(value_fn)(probed)
        curvature = leafwise.tree_map(_quotient, second, gradient, moves, state.mean_curvature)
        return variance_rate.advance(
            Sample(updates, curvature, within, examples), state, params, settings
        )

    return transforms.transformation(init, update)


def _probe(direction: chex.Array, param: chex.Array, floor: chex.Numeric) -> chex.Array:
    """How far to move: along the direction, but at least so far that it can be told from 0."""
    wide = trees.wide(direction)
    info: Any = jnp.finfo(param.dtype)  # type: ignore[no-untyped-call]
    relative = math.sqrt(float(info.eps)) * jnp.abs(param.astype(wide.dtype))
    least = jnp.maximum(jnp.asarray(floor, wide.dtype), relative)
    size = jnp.maximum(jnp.abs(wide), least)
    return jnp.where(wide < 0, -size, size)


def _quotient(
    second: chex.Array, first: chex.Array, move: chex.Array, mean: chex.Array
) -> chex.Array:
    """|difference of gradients|/|move|, and the mean of the past where that is not finite."""
    change = trees.wide(second) - trees.wide(first)
    curvature = jnp.abs(change).astype(move.dtype) / jnp.abs(move)
    return jnp.where(jnp.isfinite(curvature), curvature, mean.astype(curvature.dtype))


register(
    Method(
        name="vsgd_fd",
        factory=vsgd_fd,
        scale_by=None,
        family="step_size",
        title="Variance-based SGD with finite-difference curvature (vSGD-fd)",
        reference=variance_rate.REFERENCE_FD,
        equation="Algorithm 1: θ ← θ − (h̄/mean(h²))·(ḡ²/v̄)⊙g, h = |∇f(θ + ḡ) − ∇f(θ)|/|ḡ|",
        needs=frozenset({"params", "value_fn"}),
        static_args=("warmup_steps", "outliers", "state_dtype"),
        tunes=Tunable("inflation", 1.0, 1e2),
        test_hyperparams={"inflation": 2.0, "warmup_steps": 2},
        state_size=5,
        cost=2.0,
        low_precision=variance_rate.LOW_PRECISION,
    )
)

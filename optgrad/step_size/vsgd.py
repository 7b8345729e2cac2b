"""Variance-based stochastic gradient descent."""

from typing import Any

import jax.numpy as jnp
import optax

from optgrad.core import leafwise, transforms
from optgrad.registry import Method, Tunable, register
from optgrad.step_size import coordinates, variance_rate
from optgrad.step_size.variance_rate import Sample, Settings, VSGDState


def vsgd(
    inflation: float | optax.Schedule = 2.0,
    *,
    warmup_steps: int = 10,
    max_rate: float | optax.Schedule | None = None,
    outliers: bool = False,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-based SGD (vSGD): the optimal rate of a noisy quadratic, in every coordinate.

    .. math::
      \bar g &\leftarrow (1-\tfrac1\tau)\bar g + \tfrac1\tau g, \quad
      \bar v \leftarrow (1-\tfrac1\tau)\bar v + \tfrac1\tau g^2, \quad
      \bar h \leftarrow (1-\tfrac1\tau)\bar h + \tfrac1\tau|h| \\
      r &= \bar g^2/\bar v, \quad \theta \leftarrow \theta - \frac{r}{\bar h}\,g, \quad
      \tau \leftarrow (1-r)\,\tau + 1

    with the curvature h of the batch's loss, ``curvature_diagonal`` (for instance from
    `optgrad.gauss_newton_diagonal`). There is no learning rate: where gradients agree, r is near 1
    and the step is Newton's; where they are noise, r goes to 0 and the averages become long, so
    that the rate anneals like 1/t by itself. The first ``warmup_steps`` calls gather statistics and
    do not move.

    It shines where noise is what limits SGD and the curvature is nearly diagonal: after 5000 steps
    on 20-dimensional least squares (condition 100, label noise) the excess loss is 5 times smaller
    than with the best of three fixed rates, with batches of 20 it is 12 times smaller. It fails
    where the curvature couples coordinates: the diagonal Newton step is too long for a rotated
    quadratic, and as long as gradients agree nothing shortens it. Rotated, the same problem has 6
    times the excess loss at batch size 1, and without noise some runs diverge. The annealing has
    no quick way back: a small rate returns as fast as the memory, τ samples, forgets.

    The gradient that ``update`` is handed counts as one sample. A minibatch gradient then is a
    sample of the stream of minibatch gradients, for which :math:`\bar g^2/\bar v` is right. With
    the optional extra argument ``per_example_grads`` the n examples of the batch are the samples,

    .. math:: \bar v \leftarrow (1-\tfrac1\tau)\bar v + \tfrac1\tau\,\tfrac1n\sum_k g_k^2, \quad
       r = \frac{n\,\bar g^2}{\bar v + (n-1)\,\bar g^2},

    which estimates the same r from more data. (Squares of batch gradients in that formula would
    make r too large.)

    Args:
      inflation: C ≥ 1, by which :math:`\bar v` and :math:`\bar h` are overestimated at the end of
        the warm-up (slow start). The paper has d/10, which is slow for large d.
      warmup_steps: n₀ ≥ 2, calls that do not move.
      max_rate: > 0, cap of the rates. Default none; then coordinates without any curvature, whose
        rate is infinite, do not move at all.
      outliers: whether a gradient further than two standard deviations from the mean lengthens its
        coordinate's memory by one sample before it is averaged.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32. In 16 bits memories of more than 256 samples stand still.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds four vectors of parameter size.
      `optgrad.diagnostics` reads rates, shares of signal and memories.

    Raises:
      ValueError: if an argument is outside its range; by ``update``, if ``curvature_diagonal`` is
        missing or an extra argument does not fit the gradient.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.vsgd(inflation=1.0, warmup_steps=2)
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(
      ...         curvature * params, state, curvature_diagonal=curvature)
      ...     params = params + updates
      >>> print(params)
      [0. 0.]

    References:
      T. Schaul, S. Zhang, Y. LeCun, "No more pesky learning rates", ICML 2013, Algorithm 1. The
      rule for outliers and the formula for batches: T. Schaul, Y. LeCun, "Adaptive learning rates
      and parallelization for stochastic, sparse, non-smooth gradients", ICLR 2013.

    Deviations from the paper: :math:`\bar v-\bar g^2` is carried instead of :math:`\bar v`, which
    is the same in exact arithmetic and cannot be negative. Where :math:`\bar g` is 0, r is 0; the
    authors' code adds 1e-9 to averages instead and takes initial curvatures of at least 1.
    """
    settings = Settings(inflation, warmup_steps, max_rate, outliers, state_dtype)
    settings.check()

    def init(params: optax.Params) -> VSGDState:
        return variance_rate.init_state(params, settings, squares=False)

    def update(
        updates: optax.Updates,
        state: VSGDState,
        params: optax.Params | None = None,
        *,
        curvature_diagonal: optax.Updates | None = None,
        per_example_grads: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, VSGDState]:
        del extra
        curvature = coordinates.curvature(updates, curvature_diagonal)
        within, examples = variance_rate.variance_within(per_example_grads, updates)
        sample = Sample(updates, leafwise.tree_map(jnp.abs, curvature), within, examples)
        return variance_rate.advance(sample, state, params, settings)

    return transforms.transformation(init, update)


register(
    Method(
        name="vsgd",
        factory=vsgd,
        scale_by=None,
        family="step_size",
        title="Variance-based SGD (vSGD)",
        reference=variance_rate.REFERENCE,
        equation="Algorithm 1: θ ← θ − (ḡ²/(v̄·h̄))⊙g, memory τ ← (1 − ḡ²/v̄)·τ + 1",
        needs=frozenset({"curvature_diagonal"}),
        static_args=("warmup_steps", "outliers", "state_dtype"),
        tunes=Tunable("inflation", 1.0, 1e2),
        test_hyperparams={"inflation": 2.0, "warmup_steps": 2},
        state_size=4,
        low_precision=variance_rate.LOW_PRECISION,
    )
)

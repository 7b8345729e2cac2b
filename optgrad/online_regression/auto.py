"""A recommended default without a learning rate: steps as long as the recent path is wide."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, diagnostics, leafwise, transforms, trees
from optgrad.online_regression import coordinatewise as cw
from optgrad.online_regression import parabola
from optgrad.registry import Method, Tunable, register

_SAME = 1e-3  # a tensor's size, relative to that of all, below which it counts as 0
_OF_ZEROS = 0.2  # the size of parameters that are all 0
_SPREADS = (1e-30, 1e18)  # beyond, s and its quotients would leave float32
_PLANNED = 2.0  # κ of a run with an end, until it is annealed
_ANNEALED = 0.5  # the last part of it, in which α falls linearly to 0


class AutoState(NamedTuple):
    """Mean and spread of the gradients, mean of the positions, and how wide each path is."""

    count: chex.Array  # t, number of updates, int32, shape ()
    position: cw.Position  # mean position, like the parameters; see `coordinatewise`
    mean_gradient: optax.Updates  # m, not bias-corrected, like the parameters
    gradient_variance: optax.Updates  # v ≥ 0, not bias-corrected, like the parameters
    spread: chex.Array  # s > 0 of each leaf, shape (leaves,)

    def diagnostics(self) -> dict[str, chex.Array]:
        """The spreads of the path, to which the steps are proportional.

        Returns:
          ``spread_geomean``, ``spread_min``, ``spread_max``: of s over the tensors, in units of
          the parameters; scalars, 0 without tensors.
        """
        return {
            f"spread_{name}": x for name, x in diagnostics.summarize(self.spread)._asdict().items()
        }


def auto(
    total_steps: float | None = None,
    weight_decay: float | optax.Schedule = 0.0,
    *,
    beta: float | optax.Schedule = 0.9,
    beta_variance: float | optax.Schedule = 0.99,
    beta_position: float | optax.Schedule = 0.99,
    beta_spread: float | optax.Schedule = 0.97,
    initial_spread: float = 0.05,
    search_steps: float | optax.Schedule = 100.0,
    position: str = "mean",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A default that needs no tuning: Adam's direction, and steps as long as the path is wide.

    .. math::
      m &\leftarrow \beta m + (1-\beta)g, \quad
      v \leftarrow \beta' v + (1-\beta')(g-m)^2, \quad
      d = \hat m/\sqrt{\hat v + \hat m^2} \\
      \bar\theta &\leftarrow \beta_\theta\bar\theta + (1-\beta_\theta)\theta, \quad
      D = \theta - \bar\theta, \quad
      s^2 \leftarrow \beta_s s^2 + (1-\beta_s)\,\overline{D^2} \\
      \theta &\leftarrow \theta - \alpha_t s\,(d + \lambda\theta), \qquad
      \alpha_t^2 = \frac{\kappa_t}{c}, \quad \kappa_t = 1 + \frac{\tau}{t + \tau/2}

    with the bias-corrected :math:`\hat m, \hat v`. D is the distance from the mean position, and s,
    one number for each tensor, its root mean square: the σθ of `adaptive_sgd`, pooled. The constant

    .. math:: c = \frac{\beta_\theta^2(1-\beta)^2(1+\beta_\theta\beta)}
       {(1-\beta_\theta\beta)(1-\beta_\theta^2)(1-\beta^2)}

    is the mean of :math:`D^2` in units of :math:`(\alpha s)^2` if gradients are white noise. So
    with κ = 1 noise alone neither widens nor narrows the path (to 1 %, for Gaussian noise and
    tensors of hundreds of entries). A gradient that keeps its sign widens it, and the steps grow
    until it does not; one that turns back, as in a valley or around a minimum, narrows it, and the
    more the longer the steps: around a noisy minimum they fall as 1/t, for some thousand steps at
    least. This is annealing without a plan. It is the collapse criterion of σθ/σg, held at its
    edge; the term τ/t lets the steps grow in the beginning.

    Nothing depends on the units of the loss or (without weight decay) of the parameters: a loss
    times 1000 gives the same steps, and parameters in other units the same path in these. Each
    entry moves by :math:`\alpha_t s` at most, and by its weight decay.

    It shines as a first choice: at these defaults it is within 1 % of the best tuned constant rate,
    or ahead of it, on 12 of 14 studies (docs/research/auto.md), most clearly where noise asks for
    annealing. It is behind what knows more: a decay that was tuned to the problem, momentum on
    a quadratic without noise, and small rates for rare embedding rows. It fails where its path is
    no measure: tensors of a few entries (scalars above all) lose their steps by the fluctuations of
    s in runs of thousands of steps under noise; so do larger ones if noise has rare huge outliers
    (put a clip before it) or changes its size all the time; rows that are seen once in hundreds of
    steps hardly move; on a slope without end s grows e-fold in 16 steps. A run of a few dozen steps
    ends before s is found. Do not put a factor or a schedule behind it in a chain: that changes κ
    by its square.

    Args:
      total_steps: T ≥ 1, the length of the run if it is known. Then κ is larger by 1, so that steps
        do not become shorter on their own, and α falls linearly to 0 in the second half; after T
        nothing moves. None: no plan.
      weight_decay: λ ≥ 0, decoupled and proportional to the step size α_t·s, as in AdamW.
      beta: β in [0, 1), decay of the mean gradient.
      beta_variance: β' in (0, 1), decay of its variance.
      beta_position: β_θ in (0, 1), decay of the mean position; its window is what is asked for
        signs of drift or return.
      beta_spread: β_s in (0, 1), decay of s².
      initial_spread: s > 0 before the first step, relative to the root mean square of the tensor,
        or where that is below 0.001 of that of all parameters to the latter, or where all are 0 to
        0.2.
      search_steps: τ ≥ 0, in steps.
      position: ``"mean"`` stores the mean position, ``"displacement"`` and ``"trusted"`` distances
        from it, as in `adaptive_sgd`; for parameters in 16 bits, whose steps may be lost in their
        rounding, take ``"trusted"``.
      state_dtype: type of m and v; default the parameter's, but at least float32. The mean position
        is never kept in fewer bits: with bfloat16 the state is two vectors of float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds three vectors of parameter size (with
      ``position="displacement"`` four) and a number for each tensor. Its ``update`` needs the
      parameters. A coordinate whose gradient is exactly 0 (an embedding row that the batch does not
      have, a dead input) keeps its position and statistics and does not count in the mean of
      :math:`D^2`. `mean_position` gives the mean position, an average of the iterates.

    Raises:
      ValueError: if an argument is outside its range, or if ``update`` is not given the parameters.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.auto()
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(params)
      >>> for step in range(300):
      ...     updates, state = optimizer.update(curvature * params, state, params)
      ...     params = params + updates
      >>> print(max(abs(params)) < 1e-3)
      True

    References:
      optgrad's own, docs/research/auto.md; from J. Duda, "SGD momentum optimizer with step
      estimation by online parabola model", 2019, Algorithm 8 (σθ/σg), D. P. Kingma and J. Ba,
      "Adam", 2015, and I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    if total_steps is not None:
        checks.check_in_range("total_steps", total_steps, 1, high_open=True)
    checks.check_in_range("weight_decay", weight_decay, 0.0, high_open=True)
    checks.check_in_range("beta", beta, 0.0, 1.0, high_open=True)
    for name, decay in (
        ("beta_variance", beta_variance),
        ("beta_position", beta_position),
        ("beta_spread", beta_spread),
    ):
        checks.check_in_range(name, decay, 0.0, 1.0, low_open=True, high_open=True)
    checks.check_in_range("initial_spread", initial_spread, 0.0, low_open=True, high_open=True)
    checks.check_in_range("search_steps", search_steps, 0.0, high_open=True)
    checks.check_one_of("position", position, cw.FORMS)
    checks.check_float_dtype("state_dtype", state_dtype)
    at = transforms.hyperparameter_at

    def init(params: optax.Params) -> AutoState:
        count = jnp.zeros((), jnp.int32)
        return AutoState(
            count=count,
            position=cw.init_position(params, position, state_dtype),
            mean_gradient=averages.zeros_like_average(params, state_dtype),
            gradient_variance=averages.zeros_like_average(params, state_dtype),
            spread=_initial_spread(params, at(initial_spread, count)),
        )

    def update(
        updates: optax.Updates,
        state: AutoState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AutoState]:
        del extra
        params = transforms.require_params(params)
        values = (beta, beta_variance, beta_position, beta_spread, weight_decay)
        decay, decay_v, decay_x, decay_s, shrinking = (at(x, state.count) for x in values)
        count = optax.safe_increment(state.count)
        total = averages.sample_weights(count, decay).total
        total_v = averages.sample_weights(count, decay_v).total
        gain = _gain(count, *(at(x, state.count) for x in (search_steps, total_steps)))
        deviations = cw.deviations(updates, params, state.position, beta=decay_x, form=position)
        spread = _spread(state.spread, deviations, updates, decay_s)
        spread = jnp.where(state.count > 0, spread, state.spread)  # nothing has moved yet
        length = jnp.sqrt(gain / _noise(decay_x, decay)) * spread

        def rule(
            sample: cw.Sample, mean: chex.Array, v: chex.Array, theta: chex.Array, step: chex.Array
        ) -> tuple[chex.Array, ...]:
            mean = sample.mean_gradient(mean, decay)
            v = sample.moment(v, jnp.square(sample.gradient - mean), decay_v, 1 - decay_v)
            direction = _direction(mean / total.astype(mean.dtype), v / total_v.astype(v.dtype))
            if not (isinstance(shrinking, float | int) and shrinking == 0):
                direction += jnp.asarray(shrinking, theta.dtype) * theta
            return -step * direction, mean, v

        vectors = (state.mean_gradient, state.gradient_variance)
        steps, moved, vectors = cw.update_coordinates(
            rule, updates, params, state.position, vectors,
            beta=decay_x, form=position, skip=True, given=(params, trees.spread(length, params)),
        )  # fmt: skip
        return steps, AutoState(count, moved, *vectors, spread)

    return transforms.transformation(init, update)


def mean_position(state: Any, params: optax.Params, position: str = "mean") -> optax.Params:
    """The mean position of `auto`, the exponential average of the parameters with decay β_θ.

    What others keep beside the parameters, to evaluate or deploy it where gradients are noisy, is
    in this state anyway. It contains the start with the weight β_θᵗ, and the last update from the
    next step on. A coordinate that rests (its gradient is 0) averages in its own time.

    Args:
      state: the state of `auto`, alone or within any other (a chain's, a guard's, …).
      params: the parameters.
      position: what was given to `auto`.

    Raises:
      ValueError: if no such state is within ``state``, or ``position`` is unknown.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer, params = optgrad.auto(), jnp.array([1.0, -2.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> print(optgrad.mean_position(state, params + updates))
      [ 1. -2.]
    """
    checks.check_one_of("position", position, cw.FORMS)
    found = diagnostics.state_of(state, AutoState, "auto")
    return transforms.cast_like(cw.mean_position(params, found.position, position), params)


@jax.jit  # the same roundings whether or not it is called within another
def _initial_spread(params: optax.Params, relative: chex.Numeric) -> chex.Array:
    """The spread before the first step, shape (leaves,)."""
    (squares,) = trees.inner_products((params, params))
    numbers = np.array([max(trees.size(x), 1) for x in jax.tree.leaves(params)])
    each = jnp.sqrt(squares / numbers.astype(squares.dtype))
    of_all = jnp.sqrt(jnp.sum(squares) / max(numbers.sum(), 1))
    of_all = jnp.where((of_all > 0) & jnp.isfinite(of_all), of_all, _OF_ZEROS)
    has_size = (each > _SAME * of_all) & jnp.isfinite(each)
    return jnp.asarray(relative, squares.dtype) * jnp.where(has_size, each, of_all)


def _noise(decay_x: chex.Numeric, decay: chex.Numeric) -> chex.Numeric:
    """c: what white noise makes of the mean of D², in units of (αs)²."""
    both = decay_x * decay
    poles = (1 - both) * (1 - decay_x**2) * (1 - decay**2)
    return (decay_x * (1 - decay)) ** 2 * (1 + both) / poles


def _gain(
    count: chex.Array, search_steps: chex.Numeric, total_steps: chex.Numeric | None
) -> chex.Array:
    """κ, by which noise widens the path in 1/(1 − β_s) steps."""
    t = count.astype(averages.scalar_dtype())
    search = search_steps / (t + search_steps / 2)
    if total_steps is None:
        return 1 + search
    left = jnp.clip((total_steps + 1 - t) / (_ANNEALED * total_steps), 0.0, 1.0)
    return (_PLANNED + search) * jnp.square(left)


def _direction(mean: chex.Array, variance: chex.Array) -> chex.Array:
    """m̂/√(v̂ + m̂²), in [−1, 1]; 0 where the denominator vanishes."""
    square = variance + jnp.square(mean)
    vanishes = square <= np.finfo(square.dtype).tiny  # NaN does not: it must be seen
    return jnp.where(vanishes, 0.0, mean / jnp.sqrt(jnp.where(vanishes, 1.0, square)))


def _spread(
    spread: chex.Array, deviations: optax.Params, grads: optax.Updates, decay: chex.Numeric
) -> chex.Array:
    """The spread with one more sample, shape (leaves,); as it was where all gradients are 0."""

    def relative(x: chex.Array, g: chex.Array, s: chex.Array) -> chex.Array:
        return jnp.where(g == 0, 0.0, x / s.astype(x.dtype))  # s² may have no float

    ratios = leafwise.tree_map(relative, deviations, grads, trees.spread(spread, grads))
    moving = leafwise.tree_map(lambda g: (g != 0).astype(averages.average_dtype(g)), grads)
    squares, number = trees.inner_products((ratios, ratios), (moving, moving))
    mean = jnp.where(number > 0, squares / jnp.maximum(number, 1.0), 1.0)
    return jnp.clip(spread * jnp.sqrt(decay + (1 - decay) * mean), *_SPREADS)


register(
    Method(
        name="auto",
        factory=auto,
        scale_by=None,
        family="online_regression",
        title="Auto: a default without a learning rate",
        reference=f"optgrad; σθ/σg of {parabola.REFERENCE}",
        equation="θ ← θ − α s m̂/√(v̂ + m̂²), s² ← β_s s² + (1−β_s)·mean (θ−θ̄)² of each tensor",
        needs=frozenset({"params"}),
        static_args=("position", "state_dtype"),
        tunes=Tunable("search_steps", 1e0, 1e4),
        test_hyperparams={"search_steps": 100.0},
        state_size=3,
        low_precision=cw.LOW_PRECISION,
        wide_state=("position.stored", "position.previous"),
    )
)

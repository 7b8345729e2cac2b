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

_SAME = 1e-6  # a tensor's size, relative to that of all, below which it counts as 0
_OF_ZEROS = 0.2  # the size of parameters that are all 0
_STEP_SIZES = (1e-30, 1e18)  # beyond, their quotients would leave float32
_HEAVIEST = 1e12  # weight of an entry, so that sums of squared weights stay within float32
_LARGEST = 1e36  # mean square of a gradient, whose inverse is to have a float, too
_WIDEST = 10.0  # ρ has this limit; a straight path comes to about this
_FEW = 10.0  # entries from which a tensor's own evidence counts more than that of all
_AT_REST = 1e-3  # of the steps that the path remembers: what is below does not count as a step
_ANNEALED = 0.5  # the last part of a run with an end, in which the steps fall linearly to 0


class Expected(NamedTuple):
    """What the path would be if gradients were white noise; each of shape (leaves,)."""

    square: chex.Array  # P, weighted mean of D², in units of the step size squared
    product: chex.Array  # C, weighted mean of D·d, in units of the step size
    scale: chex.Array  # S, mean of v̂ + m̂²; 0 before there is a gradient


class AutoState(NamedTuple):
    """Mean and variance of the gradients, mean of the positions, a step size for each tensor."""

    count: chex.Array  # t, number of updates, int32, shape ()
    position: cw.Position  # mean position, like the parameters; see `coordinatewise`
    mean_gradient: optax.Updates  # m, not bias-corrected, like the parameters
    gradient_variance: optax.Updates  # v ≥ 0, not bias-corrected, like the parameters
    step_size: chex.Array  # η > 0 of each leaf, shape (leaves,)
    expected: Expected

    def diagnostics(self) -> dict[str, chex.Array]:
        """The step sizes.

        Returns:
          ``step_size_geomean``, ``step_size_min``, ``step_size_max``: over the tensors, in units of
          the parameters; scalars, 0 without tensors.
        """
        sizes = diagnostics.summarize(self.step_size)
        return {f"step_size_{name}": x for name, x in sizes._asdict().items()}


def auto(
    total_steps: float | None = None,
    weight_decay: float | optax.Schedule = 0.0,
    *,
    beta: float | optax.Schedule = 0.9,
    beta_variance: float | optax.Schedule = 0.99,
    beta_position: float | optax.Schedule = 0.99,
    adaptation: float | optax.Schedule = 0.02,
    initial_step: float = 0.01,
    search_steps: float | optax.Schedule = 100.0,
    position: str = "mean",
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A default that needs no tuning: Adam's direction, and steps that grow until the path turns.

    .. math::
      m &\leftarrow \beta m + (1-\beta)g, \quad
      v \leftarrow \beta' v + (1-\beta')(g-m)^2, \quad
      d = \hat m/\sqrt{\hat v + \hat m^2} \\
      \bar\theta &\leftarrow \beta_\theta\bar\theta + (1-\beta_\theta)\theta, \quad
      D = \theta - \bar\theta, \quad
      \rho = \frac{\langle D^2\rangle}{\eta^2 P} \\
      \eta &\leftarrow \eta\,e^{a(\kappa_t\rho - 1)}, \qquad
      \kappa_t = 1 + \frac{\tau}{t + \tau/2} \\
      \theta &\leftarrow \theta - \eta\,(d + \lambda\theta)

    with the bias-corrected :math:`\hat m, \hat v`. Each tensor has a step size η of its own.
    :math:`\langle x\rangle = \sum v x/\sum v` is a mean over its entries, weighted by the variance
    of their gradients, with m, v and d as they were before the new gradient. P is what
    :math:`\langle D^2\rangle` of steps η d would be if gradients were white noise:

    .. math:: P \leftarrow \beta_\theta^2(P + 2C + \langle d^2\rangle), \quad
       C \leftarrow \beta_\theta\beta\sqrt{S_{old}/S}\,(C + \langle d^2\rangle),

    the root, with S the mean of :math:`\hat v + \hat m^2`, because directions outlast a gradient
    whose size has fallen.

    So ρ is 1 if the path is as wide as noise would make it, and with κ = 1 noise alone leaves η
    where it is, but for a random walk (see below). A gradient that keeps its sign makes the path
    wider, and the steps grow until it does not; one that turns back, as in a valley or around a
    minimum, makes it narrower, and the more the longer the steps: with κ − 1 = τ/t the balance is
    at steps that fall as 1/t. This is annealing without a plan. It is the criterion of σθ/σg
    collapsing (α² ≤ 2(1−β)), turned into the method; in evolution strategies the comparison of a
    path with that of random steps is known as cumulative step-size adaptation.

    Small tensors cannot tell drift from luck. With :math:`n = (\sum v)^2/\sum v^2`, a tensor's
    entries as far as they count, and N the sum of all n, ρ is drawn towards the mean of all,
    :math:`(n\rho + 10\bar\rho)/(n + 10)`, and a multiplied by N/(N + 10). ρ and κρ are 10 at most.
    A tensor whose :math:`\langle d^2\rangle` is less than a thousandth of what P remembers is at
    rest: it keeps its η, and counts for nothing.

    Nothing depends on the units of the loss or (without weight decay) of the parameters: a loss
    times 1000 gives the same steps, and parameters in other units the same path in these. Each
    entry moves by η at most, and by its weight decay.

    It shines as a first choice, most clearly where noise asks for annealing; what was measured, and
    where it is behind, is in docs/research/auto.md. It fails where a path is no measure: a run of a
    few dozen steps ends before η is found; in trees of a few entries that count, η performs a
    random walk under noise, downwards on average; noise without a variance (tails as heavy as those
    of Student's t with 1.5 degrees of freedom) keeps the steps too long, unless a clip comes before
    it; on a slope without end η grows without end. Do not put a factor or a schedule behind it in a
    chain: the path would be measured against steps that were not made. Weight decay counts as
    drift, which a large λ makes felt.

    Args:
      total_steps: T ≥ 1, the length of the run if it is known. Then the steps do not become shorter
        on their own: the exponent is κρ − 1 + ρ(1 − ρ), and between ρ = 1/(κ+1) and 1 not below 0,
        below it (κ + 1)ρ − 1 at least. They are multiplied by a factor that falls linearly to 0 in
        the second half, which P takes into account. After T nothing moves. None: no plan.
      weight_decay: λ ≥ 0, decoupled and proportional to the step size η, as in AdamW.
      beta: β in (0, 1), decay of the mean gradient.
      beta_variance: β' in (0, 1), decay of its variance.
      beta_position: β_θ in (0, 1), decay of the mean position; its window is what is asked for
        signs of drift or return.
      adaptation: a ≥ 0, how fast η follows; with 0 it stays as it was.
      initial_step: η > 0 before the first step, relative to the root mean square of the tensor, or
        where that is below 1e-6 of that of all parameters to the geometric mean of the others', or
        where all are 0 to 0.2.
      search_steps: τ ≥ 0, in steps.
      position: ``"mean"`` stores the mean position, ``"displacement"`` and ``"trusted"`` distances
        from it, as in `adaptive_sgd`; for parameters in 16 bits, whose steps may be lost in their
        rounding, take ``"trusted"``, which counts them as they were meant and so makes them longer
        until they are not lost.
      state_dtype: type of m and v; default the parameter's, but at least float32. The mean position
        is never kept in fewer bits: with bfloat16 the state is two vectors of float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds three vectors of parameter size (with
      ``position="displacement"`` four) and four numbers for each tensor. Its ``update`` needs the
      parameters. A tensor that has not moved for a while, since its gradients are 0, keeps its η.
      `mean_position` gives the mean position, an average of the iterates.

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
      estimation by online parabola model", 2019, Algorithm 8 (σθ/σg); D. P. Kingma and J. Ba,
      "Adam", 2015; N. Hansen and A. Ostermeier, "Completely Derandomized Self-Adaptation in
      Evolution Strategies", 2001, equation (16) (step size from a path's length); and
      I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    if total_steps is not None:
        checks.check_in_range("total_steps", total_steps, 1, high_open=True)
    checks.check_in_range("weight_decay", weight_decay, 0.0, high_open=True)
    decays = {"beta": beta, "beta_variance": beta_variance, "beta_position": beta_position}
    for name, decay in decays.items():
        checks.check_in_range(name, decay, 0.0, 1.0, low_open=True, high_open=True)
    checks.check_in_range("adaptation", adaptation, 0.0, high_open=True)
    checks.check_in_range("initial_step", initial_step, 0.0, low_open=True, high_open=True)
    checks.check_in_range("search_steps", search_steps, 0.0, high_open=True)
    checks.check_one_of("position", position, cw.FORMS)
    checks.check_float_dtype("state_dtype", state_dtype)
    at = transforms.hyperparameter_at

    def init(params: optax.Params) -> AutoState:
        count = jnp.zeros((), jnp.int32)
        size = _initial_step_size(params, at(initial_step, count))
        return AutoState(
            count=count,
            position=cw.init_position(params, position, state_dtype),
            mean_gradient=averages.zeros_like_average(params, state_dtype),
            gradient_variance=averages.zeros_like_average(params, state_dtype),
            step_size=size,
            expected=Expected(*(jnp.zeros_like(size) for _ in Expected._fields)),
        )

    def update(
        updates: optax.Updates,
        state: AutoState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AutoState]:
        del extra
        params = transforms.require_params(params)
        values = (beta, beta_variance, beta_position, adaptation, search_steps, weight_decay)
        decay, decay_v, decay_x, speed, search, shrinking = (at(x, state.count) for x in values)
        end = at(total_steps, state.count)
        count = optax.safe_increment(state.count)
        before, part = _planned(state.count, end), _planned(count, end)

        deviations = cw.deviations(params, state.position, beta=decay_x, form=position)
        path = _path(state, deviations, decay, decay_v)
        expected = _expected(state.expected, path, before, decay_x, decay)
        gain = 1 + _search(count, search)
        exponent = _exponent(path, expected, before, _noise(decay_x, decay), gain, end)
        size = jnp.clip(state.step_size * jnp.exp(speed * exponent), *_STEP_SIZES)
        lengths = leafwise.computed_once(part * size)
        total, total_v = _totals(count, decay, decay_v)

        def rule(
            sample: cw.Sample, mean: chex.Array, v: chex.Array, theta: chex.Array, step: chex.Array
        ) -> tuple[chex.Array, ...]:
            fresh = trees.ordered_after(jnp.asarray(1 - decay, mean.dtype), step)  # reads m and v
            mean = mean + fresh * (sample.gradient - mean)
            v = sample.moment(v, jnp.square(sample.gradient - mean), decay_v, 1 - decay_v)
            direction = _direction(mean, v, total, total_v)
            if not (isinstance(shrinking, float | int) and shrinking == 0):
                direction += jnp.asarray(shrinking, theta.dtype) * theta
            return -step * direction, mean, v

        vectors = (state.mean_gradient, state.gradient_variance)
        steps, moved, vectors = cw.update_coordinates(
            rule, updates, params, state.position, vectors,
            beta=decay_x, form=position, skip=False, as_meant=True,
            given=(params, trees.spread(lengths, params)),
        )  # fmt: skip
        return steps, AutoState(count, moved, *vectors, size, expected)

    return transforms.transformation(init, update)


def mean_position(state: Any, params: optax.Params, position: str = "mean") -> optax.Params:
    """The mean position of `auto`, the exponential average of the parameters with decay β_θ.

    What others keep beside the parameters, to evaluate or deploy it where gradients are noisy, is
    in this state anyway. It contains the start with the weight β_θᵗ, and the last update from the
    next step on.

    Args:
      state: the state of `auto`, alone or within any other (a chain's, a guard's, …).
      params: the parameters that it trains (those of its group, within `optax.multi_transform`).
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


def _numbers(params: optax.Params) -> chex.Array:
    """How many entries each tensor has, on all devices; shape (leaves,)."""
    numbers = [max(trees.size(x), 1) for x in jax.tree.leaves(params)]
    return jnp.array(numbers, averages.scalar_dtype())


def _noise(decay_x: chex.Numeric, decay: chex.Numeric) -> chex.Numeric:
    """P of steps of constant energy, in units of that: the end of its recursion."""
    both = decay_x * decay
    return decay_x**2 * (1 + both) / ((1 - both) * (1 - decay_x**2))


@jax.jit  # the same roundings whether or not it is called within another
def _initial_step_size(params: optax.Params, relative: chex.Numeric) -> chex.Array:
    """The step size before the first step, shape (leaves,)."""
    (squares,) = trees.inner_products((params, params))
    numbers = _numbers(params)
    each = jnp.sqrt(squares / numbers)
    of_all = jnp.sqrt(jnp.sum(squares) / jnp.maximum(jnp.sum(numbers), 1.0))
    has_size = (each > _SAME * of_all) & jnp.isfinite(each)
    logs = jnp.sum(jnp.where(has_size, jnp.log(jnp.where(has_size, each, 1.0)), 0.0))
    typical = jnp.exp(logs / jnp.maximum(jnp.sum(has_size), 1))
    typical = jnp.where(jnp.any(has_size), typical, _OF_ZEROS)
    return jnp.asarray(relative, squares.dtype) * jnp.where(has_size, each, typical)


def _search(count: chex.Array, steps: chex.Numeric) -> chex.Array:
    """κ − 1: τ/(t + τ/2)."""
    return steps / (count.astype(averages.scalar_dtype()) + steps / 2)


def _planned(count: chex.Array, total: chex.Numeric | None) -> chex.Numeric:
    """What the length of step ``count`` is multiplied by, for the sake of a planned end."""
    if total is None:
        return 1.0
    t = count.astype(averages.scalar_dtype())
    return jnp.clip((total + 1 - t) / (_ANNEALED * total), 0.0, 1.0)


def _direction(
    mean: chex.Array, variance: chex.Array, total: chex.Array, total_v: chex.Array
) -> chex.Array:
    """m̂/√(v̂ + m̂²), in [−1, 1]; 0 where the denominator vanishes."""
    mean, variance = mean / total.astype(mean.dtype), variance / total_v.astype(variance.dtype)
    square = variance + jnp.square(mean)
    vanishes = square <= np.finfo(square.dtype).tiny  # NaN does not: it must be seen
    return jnp.where(vanishes, 0.0, mean / jnp.sqrt(jnp.where(vanishes, 1.0, square)))


def _totals(count: chex.Array, *decays: chex.Numeric) -> tuple[chex.Array, ...]:
    """1 − βᵗ of each decay."""
    return leafwise.computed_once(
        tuple(averages.sample_weights(count, decay).total for decay in decays)
    )


class _Path(NamedTuple):
    """What the path was; each of shape (leaves,), 0 where no entry has a weight."""

    square: chex.Array  # ⟨D²⟩/η²
    energy: chex.Array  # ⟨d²⟩ of the last step
    scale: chex.Array  # mean of v̂ + m̂²
    number: chex.Array  # (Σv)²/Σv², of how many entries the means are


def _path(
    state: AutoState, deviations: optax.Params, decay: chex.Numeric, decay_v: chex.Numeric
) -> _Path:
    """The means over each tensor, in one pass over it."""
    totals = _totals(jnp.maximum(state.count, 1), decay, decay_v)  # before, all is 0
    # Weights relative to the last scale, so that their squares have floats.
    scale = state.expected.scale
    units = 1 / jnp.where(scale > 1 / _LARGEST, scale, 1.0)

    def terms(  # noqa: PLR0917
        deviation: chex.Array, mean: chex.Array, v: chex.Array, shrink: chex.Array,
        unit: chex.Array, one: chex.Array, one_v: chex.Array,
    ) -> tuple[chex.Array, ...]:  # fmt: skip
        mean, v = trees.wide(mean), trees.wide(v)
        shrink, unit, one, one_v = (x.astype(v.dtype) for x in (shrink, unit, one, one_v))
        weight, relative = jnp.minimum(v * unit, _HEAVIEST), deviation * shrink
        mean = jnp.square(mean * one)
        square = v * one_v + mean
        valid = (square > np.finfo(square.dtype).tiny) & (square < jnp.inf)
        energy = jnp.where(valid, mean / jnp.where(valid, square, 1.0), 0.0)
        return weight * relative, relative, weight, energy, square, weight, jnp.ones_like(v)

    scalars = (1 / state.step_size, units, *(1 / x for x in totals))
    scalars = tuple(trees.spread(leafwise.computed_once(x), deviations) for x in scalars)
    wide, relative, weight, energy, square, again, ones = trees.map_several(
        7, terms, deviations, state.mean_gradient, state.gradient_variance, *scalars
    )
    pairs = ((wide, relative), (weight, energy), (square, ones), (weight, ones), (weight, again))
    square, energy, scale, weight, squares = trees.inner_products(*pairs)
    has_weight = squares > 0
    weight = jnp.where(has_weight, weight, 1.0)
    number = jnp.where(has_weight, jnp.square(weight) / jnp.where(has_weight, squares, 1.0), 0.0)
    scale = jnp.minimum(scale / _numbers(deviations), _LARGEST)
    return _Path(square / weight, energy / weight, scale, number)


def _expected(
    expected: Expected, path: _Path, part: chex.Numeric, decay_x: Any, decay: Any
) -> Expected:
    """P, C and S with the last step, which was ``part``·η·d."""
    step = part * path.energy
    square = decay_x**2 * (expected.square + part * (2 * expected.product + step))
    known = (expected.scale > 0) & (path.scale > 0)
    ratio = jnp.where(known, expected.scale, 1.0) / jnp.where(known, path.scale, 1.0)
    product = decay_x * decay * jnp.sqrt(ratio) * (expected.product + step)
    return Expected(square, product, path.scale)


def _exponent(  # noqa: PLR0917
    path: _Path,
    expected: Expected,
    before: chex.Numeric,
    noise: chex.Numeric,
    gain: chex.Array,
    end: chex.Numeric | None,
) -> chex.Array:
    """By what to change log η, in units of a; shape (leaves,)."""
    remembered = expected.square / noise
    moves = (before**2 * path.energy > _AT_REST * remembered) & jnp.isfinite(path.square)
    ratio = jnp.where(moves, path.square / jnp.where(moves, expected.square, 1.0), 1.0)
    number = jnp.where(moves, path.number, 0.0)
    ratio, trust = _pooled(jnp.minimum(ratio, _WIDEST), number)
    if end is None:
        exponent = gain * ratio - 1
    else:  # no fall before ρ is below 1/(κ + 1)
        growth = (gain + jnp.maximum(1 - ratio, 0.0)) * ratio - 1
        exponent = jnp.maximum(growth, jnp.minimum((gain + 1) * ratio - 1, 0.0))
    exponent = jnp.minimum(exponent, _WIDEST - 1)
    return jnp.where(moves, trust * exponent, 0.0)


def _pooled(ratio: chex.Array, numbers: chex.Array) -> tuple[chex.Array, chex.Array]:
    """ρ of each tensor, drawn towards that of all, and what all together are to be trusted."""
    everything = jnp.sum(numbers)
    of_all = jnp.sum(numbers * ratio) / jnp.where(everything > 0, everything, 1.0)
    return (numbers * ratio + _FEW * of_all) / (numbers + _FEW), everything / (everything + _FEW)


register(
    Method(
        name="auto",
        factory=auto,
        scale_by=None,
        family="online_regression",
        title="Auto: a default without a learning rate",
        reference=f"optgrad; σθ/σg of {parabola.REFERENCE}",
        equation="θ ← θ − η m̂/√(v̂ + m̂²), η ← η·exp(a(κρ − 1)), ρ = ⟨(θ−θ̄)²⟩/noise of each tensor",
        needs=frozenset({"params"}),
        static_args=("position", "state_dtype"),
        tunes=Tunable("search_steps", 1e0, 1e4),
        test_hyperparams={"search_steps": 100.0},
        state_size=3,
        low_precision=cw.LOW_PRECISION,
        wide_state=("position.stored", "position.previous"),
    )
)

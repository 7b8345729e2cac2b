"""`optgrad.auto` written a second time, for reading and for taking ingredients away.

The default is the same rule, without ``total_steps``. It is written for clarity: it copies and
holds more than it has to.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.registry import Method

POOLS = ("tensor", "tree", "coordinate")


class RuleState(NamedTuple):
    """Each field but the first a tree like the parameters."""

    count: chex.Array  # steps taken
    mean_position: Any
    mean_gradient: Any
    second_moment: Any  # of the gradient about its mean, or about 0
    step_size: Any  # its leaves scalars, or arrays if each coordinate has its own; so are the next
    square: Any  # P, of white noise, in units of the step size squared
    product: Any  # C
    scale: Any  # S, the mean square of the gradients
    limit: Any  # of the step sizes; does not change


def growth(t: chex.Array, search: float = 100.0) -> chex.Array:
    """κ of step t ≥ 1, as `auto` has it."""
    return 1 + search / (t + search / 2)


def rule(  # noqa: PLR0915  its parts are its ingredients
    *,
    pool: str = "tensor",
    kappa: Callable[[chex.Array], Any] = growth,
    beta: float = 0.9,
    ahead: bool = False,
    beta_position: float = 0.99,
    beta_variance: float = 0.99,
    adaptation: float = 0.02,
    central: bool = True,
    weighted: bool = True,
    measured: bool = True,
    as_they_were: bool = False,
    few: float = 10.0,
    effective: bool = True,
    fading: bool = True,
    initial_step: float = 0.01,
    relative: bool = True,
    adapted: bool = False,
    cap: float = math.inf,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with steps that grow while the path is wider than that of noise.

    Args:
      pool: what has a step size of its own, one of `POOLS`.
      kappa: step number -> κ.
      beta: decay of the mean gradient.
      ahead: whether the direction is that of β m + (1 − β) g, as Nesterov's and Nadam's.
      beta_position: decay of the mean position.
      beta_variance: decay of the gradient's second moment.
      adaptation: how fast the step size follows.
      central: whether that moment is about the mean gradient, whose square is then added.
      weighted: whether coordinates count by the variance of their gradients, or all the same.
      measured: whether P has the mean square of d as it is, or that of Gaussian noise.
      as_they_were: whether P has the step sizes that the steps had, or the present one.
      few: entries from which a tensor's own ratio counts more than that of all; 0: always.
      effective: whether entries are counted by their weights.
      fading: whether C takes into account that directions outlast gradients that become smaller.
      initial_step: the step size before the first step.
      relative: whether that is in units of each tensor's root mean square.
      adapted: whether the direction is multiplied by m̂²/(m̂² + ρ v̂), ρ = (1 − β)/(1 + β), the
        variance adaptation γ of M-SVAG; with ``central`` only.
      cap: the largest step size, relative to the root mean square of the tensor at the start.
      weight_decay: λ, in proportion to the step size.
    """
    variance, covariance = autocovariance(beta, ahead)

    def init(params: Any) -> RuleState:
        leaves, structure = jax.tree.flatten(params)
        sizes = jnp.stack([jnp.sqrt(jnp.mean(x**2)) for x in leaves])
        numbers = jnp.array([x.size for x in leaves])
        has_size = sizes > 1e-6 * jnp.sqrt(jnp.sum(numbers * sizes**2) / jnp.sum(numbers))
        logs = jnp.log(jnp.where(has_size, sizes, 1.0))
        typical = jnp.exp(jnp.sum(logs) / jnp.maximum(jnp.sum(has_size), 1))
        typical = jnp.where(jnp.any(has_size), typical, 0.2)
        if pool == "tree":
            sizes = jnp.full_like(sizes, typical)
        sizes = initial_step * jnp.where(has_size, sizes, typical)
        if not relative:
            sizes = jnp.full_like(sizes, initial_step)
        each = [
            jnp.full_like(x, size) if pool == "coordinate" else size
            for x, size in zip(leaves, sizes, strict=True)
        ]
        step_size = jax.tree.unflatten(structure, each)
        limit = jax.tree.map(lambda size: cap / initial_step * size, step_size)
        zeros, none = (jax.tree.map(jnp.zeros_like, tree) for tree in (params, step_size))
        return RuleState(
            jnp.zeros((), jnp.int32), params, zeros, zeros, step_size, none, none, none, limit
        )

    def mean_squares(state: RuleState, mean: Any, total: Any) -> Any:
        """v̂ + m̂², of a mean with this sum of weights."""

        def one(m: chex.Array, v: chex.Array) -> chex.Array:
            square = v / (1 - beta_variance ** jnp.maximum(state.count, 1))
            return square + (m / total) ** 2 if central else square

        return jax.tree.map(one, mean, state.second_moment)

    def direction(state: RuleState, mean: Any, total: Any) -> Any:
        """Such a mean over its size."""

        def one(m: chex.Array, s: chex.Array) -> chex.Array:
            known = jnp.where(s > 0, s, 1)
            found = jnp.where(s > 0, m / total / jnp.sqrt(known), 0)
            square = jnp.square(found)  # m̂²/(v̂ + m̂²)
            noisy = (1 - beta) / (1 + beta) * (1 - square)
            return found * square / (square + noisy) if adapted else found

        return jax.tree.map(one, mean, mean_squares(state, mean, total))

    def total_of(count: chex.Array) -> chex.Array:
        return 1 - beta ** jnp.maximum(count, 1)

    def energies(state: RuleState, last: tuple[Any, Any]) -> Any:
        """The mean square of the last direction (without look-ahead), over each pool."""
        found = _mean(jax.tree.map(jnp.square, direction(state, *last)), weights(state), pool)
        gaussian = (1 - beta) / (1 + beta)
        return found if measured else jax.tree.map(lambda x: jnp.full_like(x, gaussian), found)

    def weights(state: RuleState) -> Any:
        known = jnp.where(state.count > 0, 1.0, 0.0)
        moment = state.second_moment
        return moment if weighted else jax.tree.map(lambda v: known * jnp.ones_like(v), moment)

    def sizes_and_noise(state: RuleState, params: Any, centre: Any) -> tuple[Any, Any, Any, Any]:
        """Step sizes, P, C and S."""
        square, product = state.square, state.product
        last = state.mean_gradient, total_of(state.count)
        energy = energies(state, last)
        noise_square = jax.tree.map(
            lambda p, c, e: beta_position**2 * (p + 2 * c + variance * e), square, product, energy
        )
        same = jax.tree.map(jnp.ones_like, state.second_moment)
        scale = _mean(mean_squares(state, *last), same, pool)
        noise_product = jax.tree.map(
            lambda c, e, old, new: beta_position * beta * faded(old, new) * (c + covariance * e),
            product, energy, state.scale, scale,
        )  # fmt: skip
        squares = jax.tree.map(lambda p, x: (p - x) ** 2, params, centre)
        widths = _mean(squares, weights(state), pool)
        moves = jax.tree.map(
            lambda e, p: e > 1e-3 * p / noise(beta_position, beta, ahead), energy, noise_square
        )

        def ratio(width: Any, size: Any, p: Any, counts: Any) -> Any:
            found = jnp.where(counts, width / size**2 / jnp.where(counts, p, 1), 1)
            return jnp.minimum(found, 10.0)

        ratios = jax.tree.map(ratio, widths, state.step_size, noise_square, moves)
        numbers = jax.tree.map(entries, weights(state), moves)
        everything = sum(jnp.sum(n) for n in jax.tree.leaves(numbers))
        products = jax.tree.map(lambda n, r: jnp.sum(n * r), numbers, ratios)
        mean = sum(jax.tree.leaves(products)) / jnp.maximum(everything, 1)
        speed = adaptation * everything / jnp.maximum(everything + few, 1)

        def grown(size: Any, r: Any, n: Any, counts: Any, limit: Any) -> Any:
            r = (n * r + few * mean) / jnp.maximum(n + few, 1)
            r = jnp.minimum(kappa(state.count + 1) * r, 10.0)
            return jnp.where(counts, jnp.minimum(size * jnp.exp(speed * (r - 1)), limit), size)

        sizes = jax.tree.map(grown, state.step_size, ratios, numbers, moves, state.limit)
        if as_they_were:
            changes = jax.tree.map(lambda new, old: (new / old) ** 2, sizes, state.step_size)
            noise_square = jax.tree.map(lambda p, c: p / c, noise_square, changes)
            noise_product = jax.tree.map(lambda p, c: p / c, noise_product, changes)
        return sizes, noise_square, noise_product, scale

    def faded(old: Any, new: Any) -> Any:
        known = (old > 0) & (new > 0) & fading
        return jnp.sqrt(jnp.where(known, old, 1.0) / jnp.where(known, new, 1.0))

    def entries(weight: chex.Array, moves: Any) -> Any:
        """How many entries the means of a leaf are of, 0 where it rests."""
        if pool == "coordinate":
            return jnp.where(moves, 1.0, 0.0)
        squares = jnp.sum(weight**2)
        known = moves & (squares > 0)
        number = jnp.sum(weight) ** 2 / jnp.where(known, squares, 1.0)
        return jnp.where(known, number if effective else float(weight.size), 0.0)

    def update(grads: Any, state: RuleState, params: Any = None) -> tuple[Any, RuleState]:
        def average(decay: float, old: Any, new: Any) -> Any:
            return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)

        centre = average(beta_position, state.mean_position, params)
        found = sizes_and_noise(state, params, centre)
        mean = average(beta, state.mean_gradient, grads)
        about = mean if central else jax.tree.map(jnp.zeros_like, mean)
        squares = jax.tree.map(lambda g, m: (g - m) ** 2, grads, about)
        moment = average(beta_variance, state.second_moment, squares)
        state = RuleState(state.count + 1, centre, mean, moment, *found, state.limit)
        taken, total = mean, total_of(state.count)
        if ahead:
            taken, total = average(beta, mean, grads), total_of(state.count + 1)
        steps = direction(state, taken, total)

        def step(d: chex.Array, size: Any, theta: chex.Array) -> chex.Array:
            return -size * (d + weight_decay * theta)

        return jax.tree.map(step, steps, state.step_size, params), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def autocovariance(beta: float, ahead: bool) -> tuple[float, float]:
    """Variance of what is taken in white noise, and covariance with the next, over those of m."""
    if not ahead:
        return 1.0, 1.0
    rest = beta**4
    return (1 - beta**2) * (1 + beta) ** 2 + rest, (1 - beta**2) * (1 + beta) * beta + rest


def noise(beta_position: float, beta: float, ahead: bool = False) -> float:
    """The mean of D² under white noise, in units of the mean square of m̂/√(v̂ + m̂²)."""
    variance, covariance = autocovariance(beta, ahead)
    both = beta_position * beta
    product = both * covariance / (1 - both)
    return beta_position**2 * (2 * product + variance) / (1 - beta_position**2)


def mean_position(state: Any, params: Any) -> Any:
    """The mean position of a rule's state."""
    del params
    return state.mean_position


def record(average: bool = False) -> Method:
    """What the harness trains; not registered.

    Args:
      average: whether it is evaluated at the mean position.
    """
    return Method(
        name="auto_rule", factory=rule, scale_by=None, family="benchmarks",
        title="auto, in parts", reference="optgrad", equation="as auto's",
        static_args=(
            "pool", "kappa", "ahead", "central", "weighted", "measured", "as_they_were",
            "effective", "fading", "relative", "adapted",
        ),
        evaluation_params=mean_position if average else None,
    )  # fmt: skip


def _mean(values: Any, weights: Any, pool: str) -> Any:
    """The weighted mean over each pool, for each leaf; 0 where nothing has a weight."""
    if pool == "coordinate":
        return jax.tree.map(lambda x, w: jnp.where(w > 0, x, 0), values, weights)
    sums = jax.tree.map(lambda x, w: jnp.sum(w * x), values, weights)
    totals = jax.tree.map(jnp.sum, weights)
    if pool == "tree":
        sums, totals = _total(sums), _total(totals)
    return jax.tree.map(lambda x, w: jnp.where(w > 0, x / jnp.where(w > 0, w, 1), 0), sums, totals)


def _total(tree: Any) -> Any:
    """The sum of all leaves, in the place of each."""
    total = sum(jax.tree.leaves(tree))
    return jax.tree.map(lambda _: total, tree)

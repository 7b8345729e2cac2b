"""`optgrad.auto` written a second time, for reading and for taking ingredients away.

The default is the same rule, without weight decay and ``total_steps``. It is written for clarity:
it copies and holds more than it has to.
"""

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
    spread: Any  # its leaves scalars, or arrays if each coordinate has its own


def growth(t: chex.Array, search: float = 100.0) -> chex.Array:
    """κ of step t ≥ 1, as `auto` has it."""
    return 1 + search / (t + search / 2)


def rule(
    *,
    pool: str = "tensor",
    kappa: Callable[[chex.Array], Any] = growth,
    beta: float = 0.9,
    beta_position: float = 0.99,
    beta_variance: float = 0.99,
    beta_spread: float = 0.97,
    central: bool = True,
    rests: bool = True,
    spread: float = 0.05,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with steps in proportion to the spread of the path.

    Args:
      pool: over what the spread is pooled, one of `POOLS`.
      kappa: step number -> κ.
      beta: decay of the mean gradient.
      beta_position: decay of the mean position.
      beta_variance: decay of the gradient's second moment.
      beta_spread: decay of the spread's square.
      central: whether that moment is about the mean gradient, whose square is then added.
      rests: whether a coordinate whose gradient is 0 rests.
      spread: before the first step.
      relative: whether ``spread`` is in units of each tensor's root mean square.
    """

    def init(params: Any) -> RuleState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        leaves, structure = jax.tree.flatten(params)
        overall = jnp.sqrt(sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves))
        overall = jnp.where(overall > 0, overall, 0.2)

        def initial(x: chex.Array) -> chex.Array:
            own = jnp.sqrt(jnp.mean(x**2))
            size = overall if pool == "tree" else jnp.where(own > 1e-3 * overall, own, overall)
            first = spread * size if relative else jnp.full_like(size, spread)
            return jnp.full_like(x, first) if pool == "coordinate" else first

        spreads = jax.tree.unflatten(structure, [initial(x) for x in leaves])
        return RuleState(jnp.zeros((), jnp.int32), params, zeros, zeros, spreads)

    def update(grads: Any, state: RuleState, params: Any = None) -> tuple[Any, RuleState]:
        t = state.count + 1

        def average(old: chex.Array, new: chex.Array, decay: float, counts: Any) -> chex.Array:
            return jnp.where(counts, decay * old + (1 - decay) * new, old)

        def leafwise(function: Callable[..., Any], *trees: Any) -> Any:
            return jax.tree.map(function, *trees)

        counts = leafwise(lambda g: (g != 0) | (not rests), grads)
        centre = leafwise(
            lambda x, p, n: average(x, p, beta_position, n), state.mean_position, params, counts
        )
        squares = leafwise(lambda p, x, n: jnp.where(n, (p - x) ** 2, 0.0), params, centre, counts)
        pooled, known = _pooled(squares, counts, pool)
        spreads = leafwise(
            lambda s, d2, k: jnp.sqrt(average(s**2, d2, beta_spread, k & (t > 1))),
            state.spread, pooled, known,
        )  # fmt: skip
        mean = leafwise(lambda m, g, n: average(m, g, beta, n), state.mean_gradient, grads, counts)
        about = mean if central else leafwise(jnp.zeros_like, mean)
        moment = leafwise(
            lambda v, g, m, n: average(v, (g - m) ** 2, beta_variance, n),
            state.second_moment, grads, about, counts,
        )  # fmt: skip
        alpha = jnp.sqrt(kappa(t) / noise(beta_position, beta))

        def step(m: chex.Array, v: chex.Array, s: chex.Array, n: chex.Array) -> chex.Array:
            m, v = m / (1 - beta**t), v / (1 - beta_variance**t)
            square = v + m**2 if central else v
            direction = jnp.where(square > 0, m / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
            return jnp.where(n, -alpha * s * direction, 0.0)

        steps = leafwise(step, mean, moment, spreads, counts)
        return steps, RuleState(t, centre, mean, moment, spreads)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def noise(beta_position: float, beta: float) -> float:
    """c: the mean of D² under white noise, in units of (αs)².

    D answers a unit of noise by two decays one after the other, that of the mean gradient and that
    of the mean position; c is the sum of the squares of this answer.
    """
    poles = (1 - beta_position * beta) * (1 - beta_position**2) * (1 - beta**2)
    return (beta_position * (1 - beta)) ** 2 * (1 + beta_position * beta) / poles


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
        static_args=("pool", "kappa", "central", "rests", "relative"),
        evaluation_params=mean_position if average else None,
    )  # fmt: skip


def _pooled(squares: Any, counts: Any, pool: str) -> tuple[Any, Any]:
    """The mean of the squares over a pool, and whether anything in it counts; for each leaf."""
    if pool == "coordinate":
        return squares, counts
    sums, numbers = (jax.tree.map(jnp.sum, tree) for tree in (squares, counts))
    if pool == "tree":

        def total(tree: Any) -> Any:
            of_all = sum(jax.tree.leaves(tree))
            return jax.tree.map(lambda _: of_all, tree)

        sums, numbers = total(sums), total(numbers)
    means = jax.tree.map(lambda x, n: x / jnp.maximum(n, 1), sums, numbers)
    return means, jax.tree.map(lambda n: n > 0, numbers)

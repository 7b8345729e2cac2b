"""The state of any transformation in 16 bits, between its steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad import registry
from optgrad.core import checks, rewriting
from optgrad.core import rounding as rounding_lib

ROUNDINGS = ("stochastic", "nearest")


class LowPrecisionState(NamedTuple):
    """State of `low_precision_state`."""

    count: chex.Array  # number of updates, int32, shape ()
    inner: Any  # of the wrapped transformation, its arrays like the parameters in bfloat16


def low_precision_state(
    inner: optax.GradientTransformation,
    *,
    rounding: str = "stochastic",
    keep: Sequence[str] | None = None,
    seed: chex.Numeric = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the averages of an optimizer in bfloat16, and computes them in float32.

    .. math::
      s_{t+1} = \operatorname{round}\bigl(F(s_t, g_t)\bigr), \qquad
      \Pr\{\operatorname{round}(x) = b\} = \frac{x-a}{b-a}, \quad
      \mathrm{E}[\operatorname{round}(x)] = x

    where F is the recursion of the wrapped optimizer and a ≤ x ≤ b are the neighbours of x in
    bfloat16. An average with the decay β moves by (1−β)(x−s) at a time. Rounded to nearest it
    stands still once this is less than half a unit in its last place, 0.2 to 0.4 % of s: with
    β = 0.999 it may miss what it averages by any factor. Rounded at random it moves as often as is
    right, and has a relative noise of at most 0.16 %/√(1−β): 0.5 % for β = 0.9, 5 % for β = 0.999.

    Each array is rounded where the wrapped optimizer computes it, and all that it computes from it
    afterwards, the step included, is computed from the rounded values: state and step belong
    together, and XLA updates donated buffers in place, without a copy or a temporary of the
    parameters' size. (To that end ``update`` traces the wrapped one; outside of `jax.jit` it is
    slow.)

    Which arrays: those that the state's ``init`` lays out like a parameter of at least one axis
    (at the same path, of the same shape or with further axes before it: rings, bases), in more
    than 16 bits. Scalars, integers, keys, factors of other shapes and raveled copies stay as they
    are.

    float16 is not offered: its smallest number is 6·10⁻⁸, and a second moment that is rounded to 0
    is divided by.

    Args:
      inner: the transformation, optgrad's or optax's, or a chain.
      rounding: ``"stochastic"``, or ``"nearest"`` for decays up to 0.9 (0.99 with a little loss).
      keep: names of fields of the state that stay as wide as they are, such as ``"mu"`` or
        ``"position.stored"``. Default: those that any registered method lists in its
        ``wide_state``: positions, and what is used in differences only. Name what another
        transformation keeps of positions, such as ``"x0"`` of optax's ``mechanize``: those must
        not be rounded at all.
      seed: of the random bits, an integer or a traced one. Runs that are `jax.vmap`-ed share their
        bits unless they are given different ones.

    Returns:
      A `GradientTransformationExtraArgs` that takes what ``inner`` takes. Pass it the parameters if
      the gradients have another type. Under an automatically sharded ``jit`` the numbers do not
      depend on the number of devices, and nothing is communicated; within `jax.shard_map` shards
      share their bits. Derivatives go through the rounding as if it were not there.

    Raises:
      TypeError: if ``keep`` is a string, or holds something else than strings.
      ValueError: if ``rounding`` is unknown, ``seed`` is negative, or a name in ``keep`` is none of
        the state's fields.

    Examples:
      Half of Adam's memory, and a second moment that is right:

      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> adam = optax.scale_by_adam(b2=0.999)
      >>> gradient = jnp.full(1000, 0.1)
      >>> for rounding in ("nearest", "stochastic"):
      ...     optimizer = optgrad.low_precision_state(adam, rounding=rounding)
      ...     state = optimizer.init(gradient)
      ...     step = lambda state, _: (optimizer.update(gradient, state)[1], None)
      ...     state = jax.lax.scan(step, state, length=2000)[0]
      ...     relative = jnp.mean(state.inner.nu.astype(float)) / (0.01 * (1 - 0.999**2000))
      ...     print(rounding, state.inner.nu.dtype, f"{relative:.2f}")
      nearest bfloat16 0.28
      stochastic bfloat16 1.00

    References:
      S. Gupta, A. Agrawal, K. Gopalakrishnan, P. Narayanan, "Deep Learning with Limited Numerical
      Precision", 2015, Section 3.1: stochastic rounding.

    Deviations from the paper: floating-point instead of fixed-point numbers, and the state of an
    optimizer instead of the weights.
    """
    checks.check_one_of("rounding", rounding, ROUNDINGS)
    if isinstance(keep, str):
        raise TypeError(f"keep = {keep!r} is a string; accepted: a tuple of names")
    for name in keep or ():
        if not isinstance(name, str):
            raise TypeError(f"keep = {tuple(keep or ())!r} holds {name!r}; accepted: strings")
    if not isinstance(seed, jax.Array):
        checks.check_count("seed", seed, 0)
    tx = optax.with_extra_args_support(inner)
    kept = tuple(keep) if keep is not None else _wide_in_registry()

    def rounding_at(count: chex.Array, narrow: Sequence[int]) -> rewriting.Replace:
        if rounding == "nearest" or not narrow:
            return lambda leaf, x: x.astype(jnp.bfloat16)
        rows = {leaf: row for row, leaf in enumerate(narrow)}
        keys = rounding_lib.keys(seed, count, len(rows))
        return lambda leaf, x: rounding_lib.to_bfloat16(x, keys[rows[leaf]])

    def init(params: optax.Params) -> LowPrecisionState:
        state, count = tx.init(params), jnp.zeros((), jnp.int32)
        if keep is not None:
            _check_names(kept, state)
        narrow = _narrow_leaves(tx, params, kept)
        round_leaf = rounding_at(count, [*narrow])
        leaves, structure = jax.tree.flatten(state)
        for leaf in narrow:
            leaves[leaf] = round_leaf(leaf, jnp.asarray(leaves[leaf]))
        return LowPrecisionState(count, jax.tree.unflatten(structure, leaves))

    def update(
        updates: optax.Updates,
        state: LowPrecisionState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, LowPrecisionState]:
        count = optax.safe_increment(state.count)
        narrow = _narrow_leaves(tx, updates if params is None else params, kept)
        leaves, structure = jax.tree.flatten(state.inner)
        for leaf, dtype in narrow.items():
            leaves[leaf] = leaves[leaf].astype(dtype)

        def inner_update(given: Any) -> Any:
            gradient, leaves, at = given
            return tx.update(gradient, jax.tree.unflatten(structure, leaves), at, **extra)

        # If later operations saw what is not rounded, it would have to be stored beside the state
        # or be computed again from the old state, which could not be overwritten.
        round_leaf = rounding_at(count, [*narrow])
        new_updates, new_state = rewriting.replaced_where_computed(
            inner_update, (updates, leaves, params), round_leaf, [*narrow]
        )
        return new_updates, LowPrecisionState(count, new_state)

    return optax.GradientTransformationExtraArgs(init, update)


# Which arrays ---------------------------------------------------------------------------------


def _narrow_leaves(
    tx: optax.GradientTransformation, params: optax.Params, kept: Sequence[str]
) -> dict[int, Any]:
    """The numbers of the state's leaves that are rounded, and the types that ``init`` gives them.

    Args:
      tx: the transformation.
      params: the parameters, or a tree like them.
      kept: names of what is left out.
    """
    shapes = {path: jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def is_like_a_parameter(path: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
        for start in range(len(path) + 1):
            wanted = shapes.get(path[start:])
            if wanted and shape[-len(wanted) :] == wanted:
                return not any(name in _dotted(path[:start]) for name in map(_between_dots, kept))
        return False

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params))
    return {
        number: leaf.dtype
        for number, (path, leaf) in enumerate(leaves)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and leaf.dtype.itemsize > 2
        and is_like_a_parameter(path, leaf.shape)
    }


def _wide_in_registry() -> tuple[str, ...]:
    """What any registered method lists in its ``wide_state``."""
    return tuple({name: None for method in registry.methods() for name in method.wide_state})


def _check_names(kept: Sequence[str], state: Any) -> None:
    """Raises unless each name is one of the state's fields, whether it holds arrays or None."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: x is None)
    paths = [_dotted(path) for path, _ in leaves]
    for name in kept:
        if not any(_between_dots(name) in path for path in paths):
            fields = dict.fromkeys(field for path in paths for field in path.split(".") if field)
            raise ValueError(
                f"keep = {tuple(kept)!r}: {name!r} is no field of the state; "
                f"{checks.did_you_mean(name, fields)}"
            )


def _dotted(path: tuple[Any, ...]) -> str:
    """A path in a tree as text: ``.0.position.stored.``."""
    return _between_dots(jax.tree_util.keystr(path, simple=True, separator="."))


def _between_dots(name: str) -> str:
    return f".{name}."

"""Reductions over the shards of all devices, within `jax.shard_map`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import optax

from optgrad.core import partial_sums, shards


def across_devices(
    tx: optax.GradientTransformation, axis_name: str | Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    r"""A method within `jax.shard_map`, with the parameters divided along a mesh axis.

    A device holds one shard :math:`\theta_k` of the parameters, and so of gradients and state.
    What a method does entry by entry is right as it is; but an inner product over all parameters
    is a sum over the shards,

    .. math::
      \langle x, y \rangle = \sum_k \langle x_k, y_k \rangle,

    and this wrapper makes all of optgrad's reductions over parameters such sums: the partial sums
    of all leaves in one small all-reduce for each pass over the parameters. Numbers are those of
    one device up to rounding. Random directions (``basis="push"``, a Krylov space at a saddle) are
    drawn on each device for its shard, and are others than on one device.

    It is not needed under `jax.jit` alone, where XLA divides sums by itself, nor for plain data
    parallelism, where every device holds all parameters and is handed the same mean gradient.

    Leaves that are whole on every device (``PartitionSpec()``) are counted once. Which are whole is
    read from the types of ``updates``, ``params`` and state, so that `jax.shard_map` must keep its
    default ``check_vma=True``.

    Everything else must be that of the whole problem: the gradient of a whole leaf and ``value``
    the same on all devices (`jax.lax.pmean` over the devices of a batch), and functions of the
    parameters (``value_fn``, …) take a device's shards, do their own communication and return the
    whole loss on every device.

    ``init`` may be called within `jax.shard_map` or, with the whole arrays, outside of it.
    `optgrad.diagnostics` takes the state outside of it.

    Args:
      tx: the transformation; its state is that of the result.
      axis_name: the mesh axis, or several, along which parameters are divided.

    Returns:
      A `GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``axis_name`` is neither a name nor a sequence of names.
      ValueError: by ``update``, if no such axis is bound, if `jax.shard_map` does not keep track
        of what varies (``check_vma=False``), if ``value`` differs between devices, and for what
        cannot be divided: a method with a matrix over all parameters (``newton``, ``bfgs``, …),
        with a line search of optax (``nonlinear_cg``), with whole layers (``kfac``), or with a
        reduction of its own (``optax.polyak_sgd``, ``optax.clip_by_global_norm``).

    Examples:
      Two parameters, which would be one on each of two devices:

      >>> import jax, jax.numpy as jnp, optgrad
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
      >>> optimizer = optgrad.across_devices(optgrad.polyak(), "data")
      >>> def step(params):
      ...     value = jax.lax.psum(jnp.sum(params**2), "data")
      ...     updates, _ = optimizer.update(
      ...         2.0 * params, optimizer.init(params), params, value=value)
      ...     return params + updates
      >>> sharded = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
      >>> print(jax.jit(sharded)(jnp.array([3.0, 4.0])))
      [1.5 2. ]
    """
    names = _names(axis_name)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        if not any(map(_is_bound, names)):
            return tx.init(params)  # of the whole arrays
        _require_tracking(axis_name, names)
        with shards.across(names):
            return tx.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _require_tracking(axis_name, names)
        with shards.across(names):
            _require_common(updates, params, extra.get("value"))
            step = functools.partial(tx.update, updates, state, params, **extra)
            # A function of the parameters reduces as it likes: its result is the user's matter.
            found = step() if any(map(callable, extra.values())) else _without_partial_sums(step)
            _require_common_scalars(found)
        result: tuple[optax.Updates, optax.OptState] = found
        return result

    return optax.GradientTransformationExtraArgs(init, update)


def _names(axis_name: Any) -> tuple[str, ...]:
    sequence = axis_name if isinstance(axis_name, list | tuple) else (axis_name,)
    names = tuple(sequence)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name = {axis_name!r} is not accepted; accepted: the name of a mesh axis, or a "
            "tuple of names"
        )
    return names


def _is_bound(name: str) -> bool:
    """Whether the code is traced for one device along this axis."""
    try:
        jax.lax.axis_index(name)
    except NameError:
        return False
    return True


def _require_tracking(axis_name: Any, names: tuple[str, ...]) -> None:
    """Refuses axes that are not those of a `jax.shard_map` that knows what varies along them."""
    if unbound := [name for name in names if not _is_bound(name)]:
        raise ValueError(
            f"axis_name = {axis_name!r}: {unbound[0]!r} is not bound here; accepted: mesh axes of "
            "the jax.shard_map around update (under jax.jit alone no wrapper is needed)"
        )
    with shards.across(names):
        if all(shards.axes_of(jax.lax.axis_index(name)) for name in names):
            return
    raise ValueError(
        f"axis_name = {axis_name!r}: it is not known along this axis which arrays are shards; "
        "accepted: an axis of jax.shard_map with check_vma=True, its default"
    )


def _require_common(updates: Any, params: Any, value: Any) -> None:
    """Refuses a loss of one device, and its gradient of a parameter that all devices have."""
    if value is not None and (names := shards.axes_of(jax.numpy.asarray(value))):
        raise ValueError(
            f"value differs between the devices along {names}; accepted: the loss of all of them, "
            "jax.lax.pmean(value, axis_name)"
        )
    if params is None:
        return
    for (path, g), p in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        whole = [name for name in shards.axes_of(g) if name not in shards.axes_of(p)]
        if whole:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} differs between the devices along "
                f"{tuple(whole)}, but its parameter is the same on all of them; accepted: the mean "
                "gradient, jax.lax.pmean(updates, axis_name)"
            )


def _without_partial_sums(step: Callable[[], Any]) -> Any:
    """The step's results, refused if one depends on a sum over one device's shard alone."""
    closed, shapes = jax.make_jaxpr(step, return_shape=True)()
    flags = partial_sums.outputs(closed)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for path, is_partial in zip(paths, flags, strict=True):
        if is_partial:
            raise ValueError(_refusal(path, "depends on a reduction over one device's shard alone"))
    results = jax.extend.core.jaxpr_as_fun(closed)()
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _require_common_scalars(found: Any) -> None:
    """Refuses scalars that differ between devices: they come from reductions that were not ours."""
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        if not x.shape and shards.axes_of(x):
            raise ValueError(_refusal(path, "is a scalar that differs between devices"))


def _refusal(path: tuple[Any, ...], what: str) -> str:
    name = ("updates", "state")[path[0].idx] + jax.tree_util.keystr(path[1:])
    return (
        f"tx = a transformation whose {name} {what}; accepted by across_devices: "
        "transformations without reductions, and those of optgrad"
    )

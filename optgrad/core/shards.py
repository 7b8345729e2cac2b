"""Reductions over trees of which each device holds a shard.

Within `jax.shard_map` a function is traced for what one device holds, and the sum of an array is
that of the device's shard. While `across` is active, the functions here add up what the devices
found, and every reduction over parameters goes through one of them; otherwise they are plain sums.
Which arrays are shards is read from their types, in which `jax.shard_map` keeps the mesh axes along
which a value varies: what is the same on every device is counted once.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

_AXES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def across(axes: Sequence[str]) -> Iterator[None]:
    """Reductions that are traced in this context are over these mesh axes too.

    It is local to the thread, ends with the block whatever happens in it, and adds to the axes of
    a context around it.
    """
    outer = _AXES.get()
    token = _AXES.set((*outer, *(name for name in axes if name not in outer)))
    try:
        yield
    finally:
        _AXES.reset(token)


def are_summed() -> bool:
    """Whether reductions are over devices too."""
    return bool(_AXES.get())


def axes_of(x: chex.Array) -> tuple[str, ...]:
    """Those axes of the context along which ``x`` is a shard of something larger."""
    return varying_axes(jax.typeof(x)) if _AXES.get() else ()


def varying_axes(kind: Any) -> tuple[str, ...]:
    """Those axes of the context along which values of a type differ."""
    if hasattr(kind, "vma"):  # before jax 0.10
        varying = kind.vma
    else:  # types of other things than arrays, such as effects' tokens, have neither
        varying = getattr(getattr(kind, "manual_axis_type", None), "varying", ())
    return tuple(name for name in _AXES.get() if name in varying)


def number_of(x: chex.Array) -> int:
    """Into how many shards the array of which ``x`` is one is divided, 1 for a whole one."""
    sizes: list[Any] = [jax.lax.psum(1, name) for name in axes_of(x)]  # type: ignore[no-untyped-call]
    return math.prod(sizes)


def added(parts: Sequence[chex.Array]) -> list[chex.Array]:
    """Each of several results of one shape, summed over the devices, all in one all-reduce."""
    return _combined(jax.lax.psum, parts)


def maxima(parts: Sequence[chex.Array]) -> list[chex.Array]:
    """Each of several results of one shape, the maximum over the devices."""
    return _combined(jax.lax.pmax, parts)


def total(parts: Sequence[chex.Array]) -> chex.Array:
    """The sum of several results, one or more, and over the devices.

    Examples:
      >>> print(total([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])]))
      [4. 6.]
    """
    groups: dict[tuple[str, ...], list[chex.Array]] = {}
    for x in parts:
        groups.setdefault(axes_of(x), []).append(x)
    sums = [
        _over(jax.lax.psum, names, functools.reduce(operator.add, group))
        for names, group in groups.items()
    ]
    return functools.reduce(operator.add, sums)


def all_true(flags: Sequence[chex.Array]) -> chex.Array:
    """Whether all of several scalars are true, on every device."""
    if not _AXES.get():
        return jnp.all(jnp.stack(list(flags)))
    return total([jnp.logical_not(flag).astype(jnp.int32) for flag in flags]) == 0


def _combined(
    collective: Callable[..., chex.Array], parts: Sequence[chex.Array]
) -> list[chex.Array]:
    found = list(parts)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, x in enumerate(found):
        if names := axes_of(x):
            groups.setdefault(names, []).append(i)
    for names, indices in groups.items():
        whole = _over(collective, names, jnp.stack([found[i] for i in indices]))
        for row, i in enumerate(indices):
            found[i] = whole[row]
    return found


def _over(
    collective: Callable[..., chex.Array], names: tuple[str, ...], x: chex.Array
) -> chex.Array:
    return collective(x, names) if names else x


def key_of(key: chex.PRNGKey, x: chex.Array) -> chex.PRNGKey:
    """A random key for the entries of ``x``, another one for each of its shards."""
    for name in axes_of(x):
        key = jax.random.fold_in(key, jax.lax.axis_index(name))
    return key


def require_whole(tree: chex.ArrayTree, what: str) -> None:
    """Refuses a tree of shards.

    Args:
      tree: which must be whole on every device.
      what: what needs it, for the message.

    Raises:
      ValueError: if a leaf is a shard.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if names := axes_of(x):
            raise ValueError(
                f"axis_name = {names if len(names) > 1 else names[0]!r}: {what} needs whole "
                f"arrays, but the leaf {jax.tree_util.keystr(path) or 'itself'} is a shard of one; "
                "accepted by across_devices: a method that needs only sums over the parameters. "
                "Let jit divide the work (no jax.shard_map), or keep them whole on every device"
            )


def may_be_divided(*arrays: chex.Array) -> bool:
    """Whether XLA may have to divide the arrays among devices, as far as their types say.

    So it is under `jax.jit` for what comes from an array on a mesh of several devices; not for the
    local arrays within `jax.shard_map`.
    """
    return any(_mesh_size(x) > 1 for x in arrays)


def _mesh_size(x: chex.Array) -> int:
    """The number of devices along axes that are not manual."""
    mesh: Any = getattr(jax.typeof(x).sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return 1
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = jax.sharding.AxisType.Manual
    return math.prod(mesh.shape[name] for name, kind in kinds if kind != manual)

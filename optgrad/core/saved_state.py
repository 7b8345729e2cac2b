"""An optimizer's state as named NumPy arrays, and back; what does not fit is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

# The layout of all states together: to be increased with a release in which an array of any
# method's state has another name, shape, type or meaning (a contract test compares them).
LAYOUT = 1
LAYOUT_KEY = "optgrad.layout"
# Layout -> what makes arrays of the next one of it; a layout that is not here is refused.
MIGRATIONS: dict[int, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {}


class SavedStateError(ValueError):
    """A saved state does not fit the optimizer that is to continue with it."""


def state_to_dict(state: Any) -> dict[str, np.ndarray]:
    """The arrays of an optimizer's state by name, to be kept by ``numpy.savez`` or anything else.

    Orbax and flax' msgpack save states as well; they compare names and shapes, but cannot know
    whether another version of optgrad meant the same by them. Here the layout of the states is
    saved, too.

    Args:
      state: any optimizer state: a chain's, an injected one, one of a wrapper, of any run or shard
        that this process holds whole.

    Returns:
      Path -> array, as ``"[0].momentum['w']"``, and ``"optgrad.layout"``. Of types that NumPy's
      files do not know, and of typed random keys, the bits, and the type in the name:
      ``"[0].momentum['w']:bfloat16"``.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.m_ssd(0.1)
      >>> saved = optgrad.state_to_dict(optimizer.init({"w": jnp.zeros(2)}))
      >>> sorted(saved)
      ['[0].count', "[0].momentum['w']", 'optgrad.layout']
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {_name(path, leaf): _bits(np.asarray(_plain(leaf))) for path, leaf in leaves}
    return {LAYOUT_KEY: np.asarray(LAYOUT, np.int32), **arrays}


def state_from_dict(like: Any, saved: Mapping[str, np.ndarray]) -> Any:
    """The state that `state_to_dict` took apart.

    Args:
      like: a state of the same optimizer and parameters, as from ``init``: gives the structure, and
        the placement on devices.
      saved: the arrays by name, as `state_to_dict` or ``numpy.load`` gives them.

    Returns:
      A state with which the run continues bit by bit.

    Raises:
      SavedStateError: if it is of another layout of states from which there is no way, if arrays
        are missing or left over, or if one has another shape or type. Nothing is converted.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> saved = optgrad.state_to_dict(optgrad.m_ssd(0.1).init(jnp.zeros(2)))
      >>> optgrad.state_from_dict(optgrad.m_ssd(0.1).init(jnp.zeros(3)), saved)
      Traceback (most recent call last):
      ...
      optgrad.core.saved_state.SavedStateError: [0].momentum is float32[2] in the saved state; \
accepted: float32[3]
    """
    arrays = _in_this_layout(saved)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [_name(path, leaf) for path, leaf in leaves]
    missing, left = sorted({*names} - {*arrays}), sorted({*arrays} - {*names})
    if missing or left:
        raise SavedStateError(
            f"the saved state is one of another optimizer or other parameters: it lacks "
            f"{_listed(missing)} and has {_listed(left)} besides"
        )
    found = [
        _restored(name, leaf, arrays[name]) for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def _in_this_layout(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if LAYOUT_KEY not in saved:
        raise SavedStateError(
            f"the saved state has no {LAYOUT_KEY!r}; accepted: what optgrad.state_to_dict returned"
        )
    layout = int(saved[LAYOUT_KEY])
    arrays = {name: np.asarray(saved[name]) for name in saved if name != LAYOUT_KEY}
    while layout != LAYOUT:
        if layout not in MIGRATIONS:
            raise SavedStateError(
                f"the saved state has the layout {layout}; accepted: "
                f"{sorted([*MIGRATIONS, LAYOUT])}. Continue it with the version that saved it"
            )
        arrays, layout = MIGRATIONS[layout](arrays), layout + 1
    return arrays


def _restored(name: str, like: Any, found: np.ndarray) -> chex.Array:
    plain = jax.eval_shape(lambda: _plain(like))
    shape, dtype = plain.shape, _stored_type(plain.dtype)
    if (found.shape, found.dtype) != (shape, dtype):
        raise SavedStateError(
            f"{name} is {_described(found.shape, found.dtype)} in the saved state; accepted: "
            f"{_described(shape, dtype)}"
        )
    array = jnp.asarray(found.view(plain.dtype))
    if _is_key(like):
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return jax.device_put(array, like.sharding) if getattr(like, "committed", False) else array


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _name(path: Any, leaf: Any) -> str:
    dtype: Any = jnp.result_type(leaf)
    is_plain = not _is_key(leaf) and _stored_type(dtype) == dtype
    return jax.tree_util.keystr(path) + ("" if is_plain else f":{dtype}")


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(_stored_type(x.dtype))


def _stored_type(dtype: Any) -> Any:
    """NumPy's own types are stored as they are, others such as bfloat16 as unsigned integers."""
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind == "V" else dtype


def _described(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more

"""Checks of arguments at the door.

Every message names the argument, its value and what is accepted.
"""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_in_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    or_infinite: bool = False,
) -> None:
    """Raises unless a concrete number lies in a range.

    Traced values, arrays and schedules pass: they are not known yet, and looking into an
    array would wait for the device.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      low: smallest accepted value.
      high: largest accepted value.
      low_open: whether ``low`` itself is refused.
      high_open: whether ``high`` itself is refused.
      or_infinite: whether +∞, "no limit", is accepted.

    Raises:
      TypeError: for a bool, a string, ``None`` or another thing that is no number.
      ValueError: for a number outside the range, NaN included.

    Examples:
      >>> check_in_range("beta", 1.0, 0.0, 1.0, high_open=True)
      Traceback (most recent call last):
      ...
      ValueError: beta = 1.0 is outside its range [0, 1)
    """
    accepted = _interval(low, high, low_open, high_open, or_infinite)
    if callable(value) or isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} = {value!r} is not a number; accepted: {accepted}")
    number: Any = value  # compared as it is: a large integer has no float
    if or_infinite and number == math.inf:
        return
    above = number > low if low_open or low == -math.inf else number >= low
    below = number < high if high_open or high == math.inf else number <= high
    if not (above and below):
        raise ValueError(f"{name} = {value} is outside its range {accepted}")


def _interval(low: float, high: float, low_open: bool, high_open: bool, or_infinite: bool) -> str:
    left = "(" if low_open or low == -math.inf else "["
    right = ")" if (high_open or high == math.inf) and not or_infinite else "]"
    return f"{left}{low:g}, {high:g}{right}"


def check_one_of(name: str, value: Any, accepted: Iterable[Any]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``accepted``.

    Examples:
      >>> check_one_of("factor", "adm", ("adam", "optimal"))
      Traceback (most recent call last):
      ...
      ValueError: factor = 'adm' is not accepted; did you mean 'adam'? Accepted: 'adam', 'optimal'
    """
    accepted = tuple(accepted)
    if value not in accepted:
        raise ValueError(f"{name} = {value!r} is not accepted; {did_you_mean(value, accepted)}")


def did_you_mean(name: Any, accepted: Iterable[Any]) -> str:
    """The tail of an error message: the nearest accepted names, then all of them.

    Examples:
      >>> did_you_mean("m_svga", ["adam", "m_svag"])
      "did you mean 'm_svag'? Accepted: 'adam', 'm_svag'"
    """
    accepted = tuple(accepted)
    close = difflib.get_close_matches(str(name), [str(a) for a in accepted], n=3, cutoff=0.5)
    listing = "Accepted: " + (", ".join(repr(a) for a in accepted) if accepted else "nothing")
    if not close:
        return listing
    return f"did you mean {' or '.join(repr(c) for c in close)}? {listing}"


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises ``ValueError`` unless ``dtype`` is ``None`` or a floating-point type.

    Examples:
      >>> check_float_dtype("state_dtype", "int32")
      Traceback (most recent call last):
      ...
      ValueError: state_dtype = 'int32' is not accepted; accepted: None or a floating-point type
    """
    if dtype is None:
        return
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(
            f"{name} = {dtype!r} is not accepted; accepted: None or a floating-point type"
        )


def check_count(name: str, value: Any, low: int) -> None:
    """Raises unless ``value`` is an integer ≥ ``low``.

    Examples:
      >>> check_count("stage_steps", 1, 2)
      Traceback (most recent call last):
      ...
      ValueError: stage_steps = 1 is not accepted; accepted: an integer ≥ 2
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} = {value!r} is not an integer; accepted: an integer ≥ {low}")
    if value < low:
        raise ValueError(f"{name} = {value} is not accepted; accepted: an integer ≥ {low}")


def check_real_leaves(name: str, tree: Any) -> None:
    """Raises ``TypeError`` unless all leaves of ``tree`` are real floating-point numbers.

    Examples:
      >>> check_real_leaves("params", {"steps": 3})
      Traceback (most recent call last):
      ...
      TypeError: params['steps'] has the type int32; accepted: real floating-point numbers. \
    Leave other leaves to optax.masked, optax.partition or optgrad.on_subtree
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            dtype: Any = jnp.result_type(leaf)
        except TypeError:
            dtype = type(leaf).__name__
        if isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating):
            continue
        advice = "Leave other leaves to optax.masked, optax.partition or optgrad.on_subtree"
        if isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.complexfloating):
            advice = (
                "For complex parameters wrap the method in optax.contrib.split_real_and_imaginary, "
                "and hand it conjugated gradients of jax.grad"
            )
        raise TypeError(
            f"{name}{jax.tree_util.keystr(path)} has the type {dtype}; accepted: real "
            f"floating-point numbers. {advice}"
        )

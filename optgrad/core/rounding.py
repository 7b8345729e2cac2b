r"""Rounding of float32 to bfloat16 at random, without a bias.

A number x between two neighbours :math:`a < b` of the narrow type is rounded up with probability
:math:`(x-a)/(b-a)`, so that :math:`\mathrm{E}[\mathrm{round}(x)] = x`. An average whose increments
are smaller than half a unit in the last place stands still where it is rounded to nearest; here it
takes the right number of whole steps instead.

bfloat16 is float32 without its last 16 bits. Adding 16 random bits to these and cutting them off is
this rounding, exactly, from the smallest subnormal number to the largest finite one.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

_SIGN, _UPPER = np.uint32(0x7FFFFFFF), np.uint32(0xFFFF0000)
_LARGEST = np.uint32(0x7F7F0000)  # the largest finite bfloat16, as a float32

# The odd multipliers of MurmurHash3's 32-bit finaliser (A. Appleby), and 2³²/golden ratio.
_FIRST, _SECOND, _GOLDEN = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), 0x9E3779B1


def keys(seed: chex.Numeric, count: chex.Array, leaves: int) -> chex.Array:
    """Two random words for each leaf at one step, uint32 of shape (leaves, 2)."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    return jax.random.bits(key, (leaves, 2), jnp.uint32)


@jax.custom_jvp
def to_bfloat16(x: chex.Array, key: chex.Array) -> chex.Array:
    """``x`` in bfloat16, rounded up or down at random with the mean ``x``.

    Values of bfloat16 are unchanged. Beyond its largest finite number, values are rounded to
    nearest, as are infinities and NaN. The random bits are a function of the key and of the
    position in the array: nothing of the array's size is stored, and arrays that are divided among
    devices are rounded where they are. The derivative is that of the identity.

    Args:
      x: floating-point. Of more than 32 bits, it is rounded to float32 before.
      key: one row of `keys`.

    Examples:
      >>> x = jnp.full(100_000, 1.001)
      >>> rounded = to_bfloat16(x, keys(0, jnp.array(1), 1)[0])
      >>> sorted({float(r) for r in rounded}), f"{rounded.astype(jnp.float32).mean():.4f}"
      ([1.0, 1.0078125], '1.0010')
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + _random_bits(x, key)) & _UPPER, jnp.float32)
    # Between two float32 operations: XLA then computes the rounding within the update's loop.
    return jnp.where((bits & _SIGN) < _LARGEST, cut, x).astype(jnp.bfloat16)


@to_bfloat16.defjvp
def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    return to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _random_bits(x: chex.Array, key: chex.Array) -> chex.Array:
    """16 random bits for each entry of ``x``, in uint32.

    A hash of the entry's number, modulo 2³², with one word of the key before and one within.
    """
    mixed = jnp.broadcast_to(key[0], x.shape)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) * _GOLDEN % 2**32
        mixed += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
    mixed = (mixed ^ (mixed >> 16)) * _FIRST
    mixed = ((mixed ^ (mixed >> 13)) + key[1]) * _SECOND
    return mixed >> 16

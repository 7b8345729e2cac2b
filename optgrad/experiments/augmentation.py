"""Augmentation on the device: every image of a batch is changed at random, on its own.

Shifts and reflections act on normalised images, so that what comes in at the border is the data
set's mean colour; colours are distorted before, on the pixels' own scale.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

AUGMENTATIONS = ("crop", "mirror", "colour")
CROP_PADDING = 4  # pixels on each side
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors are drawn from [1 − s, 1 + s]
HUE = 0.1  # turns of the colour wheel, drawn from [−h, h]
_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue (ITU-R BT.601)


def augment_images(key: chex.PRNGKey, images: chex.Array, augment: Sequence[str]) -> chex.Array:
    """Randomly shifted and mirrored images [B, H, W, C], each on its own; zeros come in."""
    crop_key, mirror_key = jax.random.split(key)
    if "crop" in augment:
        pad = CROP_PADDING
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        offsets = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)
        images = jax.vmap(
            lambda image, offset: jax.lax.dynamic_slice(
                image, (offset[0], offset[1], 0), images.shape[1:]
            )
        )(padded, offsets)
    if "mirror" in augment:
        flip = jax.random.bernoulli(mirror_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
    return images


def distort_colours(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    r"""Images of other brightness, contrast, saturation and hue, each on its own.

    In this order, with :math:`x` in [0, 1], :math:`y` its grey value per pixel and
    :math:`\bar y` the mean of these over the image,

    .. math::
      x \leftarrow b\,x, \qquad x \leftarrow \bar y + c\,(x - \bar y), \qquad
      x \leftarrow y + s\,(x - y), \qquad b, c, s \sim U[0.6, 1.4],

    each clipped to [0, 1], then the hue is turned by :math:`U[-0.1, 0.1]` of the colour wheel at
    constant saturation and value (HSV). These are the transformations and strengths of the usual
    "colour jitter" (0.4, 0.4, 0.4, 0.1), in a fixed order. Images that are not RGB have no
    saturation and no hue: the first two alone are applied, with the channels' mean as grey value.

    Args:
      key: a PRNG key.
      images: [B, H, W, C], bytes or floats in [0, 255].

    Returns:
      float32 images in [0, 255].
    """
    keys = jax.random.split(key, 4)

    def factors(key: chex.PRNGKey, strength: float, around: float = 1.0) -> chex.Array:
        shape = (len(images), 1, 1, 1)
        return jax.random.uniform(key, shape, minval=around - strength, maxval=around + strength)

    def blend(origin: chex.Array, pixels: chex.Array, factor: chex.Array) -> chex.Array:
        return jnp.clip(origin + factor * (pixels - origin), 0.0, 1.0)

    pixels = images.astype(jnp.float32) / 255
    pixels = blend(jnp.zeros(()), pixels, factors(keys[0], BRIGHTNESS))
    mean = jnp.mean(_grey(pixels), axis=(1, 2, 3), keepdims=True)
    pixels = blend(mean, pixels, factors(keys[1], CONTRAST))
    if images.shape[-1] == len(_LUMA):
        pixels = blend(_grey(pixels), pixels, factors(keys[2], SATURATION))
        pixels = turn_hue(pixels, factors(keys[3], HUE, around=0.0)[..., 0])
    return 255 * pixels


def _grey(pixels: chex.Array) -> chex.Array:
    """[..., 1], of RGB pixels their luma, else the mean of the channels."""
    if pixels.shape[-1] != len(_LUMA):
        return jnp.mean(pixels, axis=-1, keepdims=True)
    return jnp.sum(pixels * jnp.array(_LUMA, pixels.dtype), axis=-1, keepdims=True)


def turn_hue(pixels: chex.Array, turns: chex.Numeric) -> chex.Array:
    """RGB pixels [..., 3] in [0, 1] with their hue turned, at constant saturation and value.

    Args:
      pixels: floats.
      turns: of the colour wheel, broadcast against [...]; 1/3 takes red to green.

    Examples:
      >>> print(turn_hue(jnp.array([1.0, 0.0, 0.0]), 1 / 3).round(3))
      [0. 1. 0.]
    """
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = jnp.max(pixels, axis=-1)
    chroma = value - jnp.min(pixels, axis=-1)
    scale = 1 / jnp.where(chroma > 0, chroma, 1.0)  # a grey has no hue
    sixths = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    turned = sixths + 6 * jnp.asarray(turns, pixels.dtype)

    def channel(offset: float) -> chex.Array:
        k = (offset + turned) % 6
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return jnp.stack([channel(offset) for offset in (5.0, 3.0, 1.0)], axis=-1)

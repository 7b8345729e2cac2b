"""Distortion of colours: each of the four alone, against its definition."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import pytest

from optgrad.experiments import augmentation, data, problems
from optgrad.experiments.augmentation import distort_colours, turn_hue

pytestmark = pytest.mark.slow  # together a minute, in CI's slow stage

LUMA = np.array([0.299, 0.587, 0.114])
COUNT = 300
DISTORT = jax.jit(distort_colours)


def some_images(channels=3, low=60, high=150):
    """Far enough from black and white that nothing is clipped."""
    random = np.random.RandomState(0)
    return random.randint(low, high, (COUNT, 4, 5, channels)).astype(np.uint8)


@pytest.fixture
def alone(monkeypatch):
    """Distorts with one of the four only; returns the images before and after, in [0, 1]."""

    def distort(name, images):
        for other in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"):
            if other != name:
                monkeypatch.setattr(augmentation, other, 0.0)
        traced_anew = functools.partial(distort_colours)
        after = jax.jit(traced_anew)(jax.random.key(1), jnp.asarray(images))
        assert after.dtype == jnp.float32
        return images / 255, np.asarray(after, np.float64) / 255

    return distort


def check_factors(ratios, strength):
    """One factor for each image, all different, uniform in [1 − s, 1 + s]."""
    flat = ratios.reshape(COUNT, -1)
    factors = flat.mean(axis=1)
    np.testing.assert_allclose(flat, np.broadcast_to(factors[:, None], flat.shape), rtol=2e-3)
    assert len(np.unique(factors)) == COUNT
    assert factors.min() >= 1 - strength - 1e-4
    assert factors.max() <= 1 + strength + 1e-4
    sd = 2 * strength / np.sqrt(12)
    np.testing.assert_allclose(factors.mean(), 1, atol=4 * sd / np.sqrt(COUNT))
    np.testing.assert_allclose(factors.std(), sd, rtol=0.15)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_is_a_factor(alone, channels):
    before, after = alone("BRIGHTNESS", some_images(channels))
    check_factors(after / before, 0.4)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_scales_around_the_mean_grey(alone, channels):
    before, after = alone("CONTRAST", some_images(channels))
    grey = before @ (LUMA if channels == 3 else np.ones(1))
    mean = grey.mean(axis=(1, 2))[:, None, None, None]
    distance = before - mean
    far = np.abs(distance) > 0.03
    ratios = np.where(far, (after - mean) / np.where(far, distance, 1), np.nan)
    factors = np.nanmean(ratios.reshape(COUNT, -1), axis=1)[:, None, None, None]
    check_factors(np.where(far, ratios, factors), 0.4)


def test_saturation_scales_around_the_grey_of_each_pixel(alone):
    before, after = alone("SATURATION", some_images())
    grey = (before @ LUMA)[..., None]
    np.testing.assert_allclose((after @ LUMA)[..., None], grey, atol=1e-5)
    norm = np.linalg.norm(before - grey, axis=-1)
    far = norm > 0.03
    ratios = np.linalg.norm(after - grey, axis=-1) / np.where(far, norm, 1)
    factors = np.nanmean(np.where(far, ratios, np.nan).reshape(COUNT, -1), axis=1)
    check_factors(np.where(far, ratios, factors[:, None, None]), 0.4)


def test_hue_is_turned_at_the_same_saturation_and_value(alone):
    before, after = alone("HUE", some_images())
    old, new = (matplotlib.colors.rgb_to_hsv(np.clip(x, 0, 1)) for x in (before, after))
    np.testing.assert_allclose(new[..., 1:], old[..., 1:], atol=1e-4)
    colourful = old[..., 1] > 0.1
    turns = (new[..., 0] - old[..., 0] + 0.5) % 1 - 0.5
    turn = np.nanmean(np.where(colourful, turns, np.nan).reshape(COUNT, -1), axis=1)
    np.testing.assert_allclose(turns[colourful], np.broadcast_to(
        turn[:, None, None], turns.shape)[colourful], atol=2e-3)  # fmt: skip
    assert np.abs(turn).max() <= 0.1 + 1e-4
    assert np.abs(turn.mean()) < 0.015
    assert turn.std() > 0.04


def test_turned_hue_equals_matplotlibs():
    corners = np.stack(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3), axis=-1).reshape(-1, 3)
    pixels = np.concatenate([corners, np.random.RandomState(0).rand(50, 3)])
    for turns in (0.0, 0.1, -0.1, 0.7):
        hsv = matplotlib.colors.rgb_to_hsv(pixels)
        hsv[:, 0] = (hsv[:, 0] + turns) % 1
        expected = matplotlib.colors.hsv_to_rgb(hsv)
        np.testing.assert_allclose(turn_hue(jnp.asarray(pixels), turns), expected, atol=1e-5)


def test_colours_stay_colours_and_are_a_function_of_the_key():
    images = jnp.asarray(some_images(low=0, high=256))
    first, again, other = (DISTORT(jax.random.key(k), images) for k in (0, 0, 1))
    assert first.shape == images.shape
    assert float(first.min()) >= 0
    assert float(first.max()) <= 255 + 1e-3
    assert ((first == 0) | (first >= 254.9)).any()  # what would go beyond is clipped
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first != other).mean(axis=(1, 2, 3)) > 0.5).all()
    # Neither is the mean much darker or brighter.
    np.testing.assert_allclose(first.mean(), images.mean(), rtol=0.1)


def test_an_image_that_is_grey_stays_grey():
    grey = jnp.broadcast_to(some_images(channels=1), (COUNT, 4, 5, 3))
    after = np.asarray(DISTORT(jax.random.key(0), grey))
    np.testing.assert_allclose(after, after[..., :1] + 0 * after, atol=1e-3)


@pytest.mark.slow
def test_batches_are_distorted_before_they_are_normalised():
    images = some_images()
    labels = (np.arange(COUNT) % 2).astype(np.int32)
    dataset = data.Dataset("noise", images, labels, images, labels, ("a", "b"))

    def batches(augment):
        one = problems.image_classification(
            dataset, "mlp", batch_size=COUNT, augment=augment, model_options={"hidden": (2,)}
        )
        return one, jax.jit(jax.vmap(one.batch, in_axes=(None, 0)))(one.data, (indices, keys))

    indices = jnp.stack([jnp.arange(COUNT), jnp.arange(COUNT)[::-1]])
    keys = jax.random.split(jax.random.key(3))
    one, distorted = batches(("colour",))
    plain = batches(())[1]
    np.testing.assert_array_equal(distorted.labels, plain.labels)
    assert (np.asarray(distorted.images != plain.images).mean(axis=(2, 3, 4)) > 0.9).all()
    raw = DISTORT(jax.random.fold_in(keys[1], 2), one.data["train"][0][indices[1]])
    expected = (raw - one.data["mean"]) * one.data["scale"]
    np.testing.assert_allclose(distorted.images[1], expected, atol=1e-5)
    # Shifts and reflections are those that there were without colours.
    key = jax.random.key(5)
    both, moved = (problems.augment_images(key, plain.images[0], a) for a in
                   (("crop", "mirror", "colour"), ("crop", "mirror")))  # fmt: skip
    np.testing.assert_array_equal(both, moved)

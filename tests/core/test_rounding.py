"""Stochastic rounding: unbiased, exact where it can be, and independent everywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.core import rounding

COPIES = 2**16


def key(seed=0, count=1, leaf=0):
    return rounding.keys(seed, jnp.array(count), leaf + 1)[leaf]


rounded = jax.jit(rounding.to_bfloat16)


def wide(x):
    return np.asarray(x).astype(np.float64)


def neighbours(x):
    """The bfloat16 numbers below and above, by the bits of its float32."""
    bits = np.float32(x).view(np.uint32)
    cut = bits & np.uint32(0xFFFF0000)
    ends = (cut, cut + np.uint32(0x10000))
    return sorted(float(end.view(np.float32)) for end in ends)


@pytest.mark.parametrize(
    "x", [1.0009765, -1.0009765, 0.1, -3.14159, 1e-30, 6.1e-5, 3.3e38, 1.9999999, 255.4]
)
def test_unbiased(x):
    """One of the two neighbours, and x in the mean: within 4½ standard errors."""
    below, above = neighbours(x)
    found = wide(rounded(jnp.full(COPIES, x, jnp.float32), key()))
    assert set(np.unique(found)) == {below, above}
    share = (float(np.float32(x)) - below) / (above - below)
    error = 4.5 * np.sqrt(share * (1 - share) / COPIES)
    assert abs(np.mean(found == above) - share) < error


def test_unbiased_for_random_numbers_of_all_sizes():
    """The mean of (rounded − x)/spacing over numbers of 60 decades is 0, its variance 1/6."""
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], 2**20) * 10.0 ** rng.uniform(-30, 30, 2**20)).astype(np.float32)
    below = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(below.astype(np.float64)))) - 7)
    error = (wide(rounded(jnp.asarray(x), key())) - x) / spacing
    assert np.all(np.abs(error) < 1)
    assert abs(error.mean()) < 4.5 * np.sqrt(1 / 6 / x.size)
    assert error.var() == pytest.approx(1 / 6, rel=0.01)


def test_every_bfloat16_number_is_unchanged():
    """All 2¹⁶ patterns of bits: zeros keep their sign, infinities stay, NaN stays NaN."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    float32 = jax.lax.bitcast_convert_type(jnp.asarray(bits.astype(np.uint32) << 16), jnp.float32)
    found = rounded(float32, key())
    is_nan = np.isnan(np.asarray(x).astype(np.float32))
    assert np.all(np.isnan(np.asarray(found).astype(np.float32)[is_nan]))
    is_subnormal = (bits & 0x7F80) == 0  # backends may flush them, but not their sign
    same = np.asarray(found).view(np.uint16)
    np.testing.assert_array_equal(same[~is_nan & ~is_subnormal], bits[~is_nan & ~is_subnormal])
    assert np.asarray(rounded(jnp.array([0.0, -0.0]), key())).view(np.uint16).tolist() == [
        0,
        0x8000,
    ]


def test_beyond_the_largest_number_it_is_rounding_to_nearest():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = np.array([largest, 3.3953e38, 3.3962e38, np.finfo(np.float32).max, np.inf, np.nan])
    x = jnp.asarray(np.concatenate([x, -x]), jnp.float32)
    for count in range(5):
        np.testing.assert_array_equal(
            wide(rounded(x, key(count=count))), wide(x.astype("bfloat16"))
        )
    assert np.isfinite(wide(rounded(x[:2], key()))).all()


def test_nan_with_low_bits_only_stays_nan():
    """Cut off, its bits would be those of infinity."""
    x = jnp.asarray(np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32))
    assert np.isnan(wide(rounded(x, key()))).all()


def bits_of(*, seed=0, count=1, leaf=0, shape=(COPIES,)):
    return np.asarray(rounding._random_bits(jnp.zeros(shape), key(seed, count, leaf)))


def streams():
    """8 leaves × 8 steps, then 16 other seeds: (80, 2¹⁶) uniform numbers of mean 0."""

    def block(seed, count, leaves):
        each = [
            rounding._random_bits(jnp.zeros(COPIES), k) for k in rounding.keys(seed, count, leaves)
        ]
        return jnp.stack(each)

    compiled = jax.jit(block, static_argnums=2)
    blocks = [compiled(0, t, 8) for t in range(1, 9)] + [compiled(s, 1, 1) for s in range(1, 17)]
    return (np.concatenate(blocks) + 0.5) / 2**16 - 0.5


def test_bits_are_uniform_and_independent():
    """Between elements, leaves, steps and seeds; every statistic within 5 standard errors."""
    u = streams()
    rows, n = u.shape
    assert abs(u.mean()) < 5 / np.sqrt(12 * u.size)
    for bit in range(16):  # each bit is fair
        share = np.mean(((u + 0.5) * 2**16).astype(np.uint32) >> bit & 1)
        assert abs(share - 0.5) < 2.5 / np.sqrt(u.size)
    correlation = np.corrcoef(u)[np.triu_indices(rows, 1)] * np.sqrt(n)
    assert correlation.std() == pytest.approx(1, abs=0.05)
    assert np.abs(correlation).max() < 5.5  # of 3,160
    for lag in (1, 2, 3, 4, 7, 8, 16, 28, 100, 128, 256, 784, 1024, 4096):
        product = 12 * np.mean(u[:, lag:] * u[:, :-lag], axis=1) * np.sqrt(n - lag)
        assert abs(product.mean()) < 5 / np.sqrt(rows), lag
        assert product.std() == pytest.approx(1, abs=0.35), lag
    over_time = u.mean(axis=0) * np.sqrt(12 * rows)  # no element is favoured
    assert over_time.std() == pytest.approx(1, abs=0.02)
    counts = [np.bincount(((row + 0.5) * 256).astype(int), minlength=256) for row in u]
    chi_square = np.sum((np.array(counts) - n / 256) ** 2 / (n / 256), axis=1)
    assert chi_square.mean() == pytest.approx(255, rel=0.03)


def test_bits_belong_to_the_entry_and_not_to_the_shape():
    flat = bits_of(shape=(24,))
    np.testing.assert_array_equal(bits_of(shape=(2, 3, 4)).ravel(), flat)
    np.testing.assert_array_equal(bits_of(shape=(24, 1)).ravel(), flat)
    assert bits_of(shape=()) == flat[0]
    assert bits_of(shape=(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(2**17, 2**17), (2**33,)])
def test_more_than_four_billion_elements(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(rounding.to_bfloat16, x, key()).shape == shape


def test_wider_and_narrower_types(x64):
    del x64
    x = jnp.full(COPIES, 1.001, jnp.float64)
    assert wide(rounding.to_bfloat16(x, key())).mean() == pytest.approx(1.001, rel=1e-4)
    same = jnp.full(4, 1.0078125, jnp.bfloat16)
    np.testing.assert_array_equal(rounding.to_bfloat16(same, key()), same)


def test_the_derivative_is_that_of_the_identity():
    def loss(x):
        return jnp.sum(rounding.to_bfloat16(x, key()).astype(jnp.float32) * jnp.arange(3.0))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([0.1, 0.2, 0.3])), [0, 1, 2])

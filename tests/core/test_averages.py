"""Averages against direct weighted sums: Σ wᵢxᵢ/s with wᵢ = (1−β)βᵗ⁻ⁱ, in extended precision."""

from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.core import averages

LONG = np.longdouble
STEPS, SIZE = 12, 3

# The `x64` fixture is the same for all examples of a property.
same_fixture = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
numbers = st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-12 else 0.0)  # squares underflow
samples = hnp.arrays(np.float64, (STEPS, SIZE), elements=numbers)
decays = st.one_of(
    st.sampled_from([0.0, 1e-3, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999]), st.floats(1e-4, 0.9999)
)


def moments(xs, ys, beta, start=None, prior=None):
    """All (mean x, mean y, var x, var y, cov) of two streams (T, D); β may be one per step."""
    betas = jnp.broadcast_to(beta, len(xs))
    zero = averages.zeros_like_average(xs[0])
    first = (zero,) * 5 if start is None else start

    def step(carry, inputs):
        count, (m, n, v, u, c) = carry
        x, y, beta = inputs
        if prior is None:
            weights = averages.sample_weights(count, beta)
        else:
            weights = averages.constant_sample_weights(beta)
        m = averages.update_mean(m, x, weights)
        n = averages.update_mean(n, y, weights)
        v = averages.update_variance(v, x, m, weights)
        u = averages.update_variance(u, y, n, weights)
        c = averages.update_covariance(c, x, m, y, n, weights)
        return (count + 1, (m, n, v, u, c)), (m, n, v, u, c)

    return jax.lax.scan(step, (jnp.ones((), jnp.int32), first), (xs, ys, betas))[1]


compiled = jax.jit(moments)
compiled_prior = jax.jit(lambda xs, ys, beta, start: moments(xs, ys, beta, start, prior=True))


def direct(xs, ys, beta):
    """The same from their definition, one weighted sum per step."""
    xs, ys, beta = xs.astype(LONG), ys.astype(LONG), LONG(beta)
    found = []
    for t in range(1, len(xs) + 1):
        weights = (1 - beta) * beta ** np.arange(t)[::-1]  # 0⁰ = 1
        found.append(weighted(weights, xs[:t], ys[:t]))
    return [np.stack(x) for x in zip(*found, strict=True)]


def weighted(weights, xs, ys):
    weights = (weights / weights.sum())[:, None]
    m, n = (weights * xs).sum(0), (weights * ys).sum(0)
    dx, dy = xs - m, ys - n
    return m, n, *((weights * p).sum(0) for p in (dx * dx, dy * dy, dx * dy))


def assert_close(found, expected, scale_x, scale_y, tolerance):
    """Means to ``tolerance`` of the largest sample, second moments to that of its square."""
    scales = (scale_x, scale_y, scale_x**2, scale_y**2, scale_x * scale_y)
    for name, ours, theirs, scale in zip("mnvuc", found, expected, scales, strict=True):
        error = np.max(np.abs(np.asarray(ours, LONG) - theirs))
        assert error <= tolerance * scale, (name, float(error), float(tolerance * scale))


@hypothesis.given(samples, samples, decays)
@same_fixture
def test_moments_are_direct_sums(x64, xs, ys, beta):
    found = compiled(jnp.asarray(xs), jnp.asarray(ys), jnp.asarray(beta))
    assert all(x.dtype == jnp.float64 for x in found)
    scales = np.max(np.abs(xs)), np.max(np.abs(ys))
    assert_close(found, direct(xs, ys, beta), *scales, 1e-13)
    m, _, v, u, c = map(np.asarray, found)
    assert np.all(v >= 0)
    assert np.all(u >= 0)
    assert np.all(np.abs(c) <= np.sqrt(v * u) * (1 + 1e-9) + 1e-13 * scales[0] * scales[1])
    assert np.all(m >= np.minimum.accumulate(xs) - 1e-12 * scales[0])
    assert np.all(m <= np.maximum.accumulate(xs) + 1e-12 * scales[0])
    assert np.all(v[0] == 0)  # one sample has no spread, whatever β
    np.testing.assert_array_equal(m[0], xs[0])


@hypothesis.given(samples, samples, decays)
def test_moments_in_32_bits(xs, ys, beta):
    """From the same float32 samples: errors of single operations, none of a difference."""
    xs, ys = xs.astype(np.float32), ys.astype(np.float32)
    found = compiled(jnp.asarray(xs), jnp.asarray(ys), jnp.float32(beta))
    assert all(x.dtype == jnp.float32 for x in found)
    expected = direct(xs, ys, np.float32(beta))
    scales = np.max(np.abs(xs)), np.max(np.abs(ys))
    assert_close(found, expected, *scales, 4e-6)
    assert np.all(np.asarray(found[2]) >= 0)


@hypothesis.given(samples, decays)
@same_fixture
def test_laws_of_scale_and_shift(x64, xs, beta):
    """Bit by bit where scaling is exact; a shift changes the mean alone."""
    ys = xs[::-1] * 0.5 + 1
    beta = jnp.asarray(beta)
    m, n, v, u, c = compiled(xs, ys, beta)
    scaled = compiled(xs * 8, ys * -0.25, beta)
    for ours, theirs in zip(scaled, (m * 8, n * -0.25, v * 64, u * 0.0625, c * -2), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shifted = compiled(xs + 100, ys - 7, beta)
    for ours, theirs in zip(shifted, (m + 100, n - 7, v, u, c), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10 * 1e3**2)
    swapped = compiled(ys, xs, beta)
    np.testing.assert_array_equal(swapped[4], c)
    np.testing.assert_array_equal(compiled(xs, xs, beta)[4], v)  # cov(x, x) = var(x)


@hypothesis.given(
    samples, hnp.arrays(np.float64, STEPS, elements=st.floats(1e-3, 0.999)), st.booleans()
)
@same_fixture
def test_decay_that_changes(x64, xs, betas, with_zero):
    """Moments of one set of weights that sum to 1: the new one is κₜ, the old ones shrink."""
    if with_zero:
        betas = np.where(np.arange(STEPS) == 6, 0.0, betas)
    found = compiled(xs, xs[::-1], betas)
    weights, expected = np.zeros(0, LONG), []
    for t, beta in enumerate(betas.astype(LONG), start=1):
        new = (1 - beta) / (1 - beta**t)
        weights = np.append((1 - new) * weights, new)
        np.testing.assert_allclose(float(weights.sum()), 1, rtol=1e-15)
        expected.append(weighted(weights, xs[:t].astype(LONG), xs[::-1][:t].astype(LONG)))
    scale = np.max(np.abs(xs))
    assert_close(found, [np.stack(x) for x in zip(*expected, strict=True)], scale, scale, 1e-12)


@hypothesis.given(samples, samples, decays, hnp.arrays(np.float64, (2, SIZE), elements=numbers))
@same_fixture
def test_full_prior(x64, xs, ys, beta, prior_means):
    """Initial statistics of weight 1: they keep βᵗ, and their distance to the mean is spread."""
    (m0, n0), v0, u0, c0 = prior_means, 4.0, 9.0, -3.0
    start = tuple(jnp.asarray(x) for x in (m0, n0, *(np.full(SIZE, s) for s in (v0, u0, c0))))
    found = compiled_prior(xs, ys, jnp.asarray(beta), start)
    b, expected = LONG(beta), []
    for t in range(1, STEPS + 1):
        weights = np.append(b**t, (1 - b) * b ** np.arange(t)[::-1])
        m, n, v, u, c = weighted(
            weights, np.vstack([m0, xs[:t]]).astype(LONG), np.vstack([n0, ys[:t]]).astype(LONG)
        )
        expected.append((m, n, v + b**t * v0, u + b**t * u0, c + b**t * c0))
    scales = [np.max(np.abs([*x.ravel(), *p])) for x, p in ((xs, m0), (ys, n0))]
    expected = [np.stack(x) for x in zip(*expected, strict=True)]
    assert_close(found, expected, scales[0] + 3, scales[1] + 3, 1e-13)


# --- rounding --------------------------------------------------------------------------------


def wandering(spread, steps=1500):
    """Parameters near 1 that wander by ``spread`` (an AR(1) path), in float32."""
    rng = np.random.default_rng(0)
    path = np.zeros((steps, 8))
    for t in range(1, steps):
        path[t] = 0.9 * path[t - 1] + np.sqrt(1 - 0.81) * rng.normal(size=8)
    return (1 + spread * path).astype(np.float32)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_no_cancellation_far_from_zero(spread):
    """Relative error of the variance ≈ 6e-8·θ/spread; raw averages are off by its square."""
    path = wandering(spread)
    variance = np.asarray(compiled(path, path, jnp.float32(0.9))[2], np.float64)
    wide = path.astype(np.float64) - 1  # exact, and without an offset
    weights = 0.1 * 0.9 ** np.arange(300)[::-1]
    raw_mean, raw_square = np.float32(0), np.float32(0)
    errors, raw_errors = [], []
    for t in range(len(path)):
        raw_mean = np.float32(0.9) * raw_mean + np.float32(0.1) * path[t]
        raw_square = np.float32(0.9) * raw_square + np.float32(0.1) * path[t] ** 2
        if t < 300:
            continue
        window = wide[t - 299 : t + 1]
        exact = weighted(weights, window, window)[2]
        errors.append(np.abs(variance[t] / exact - 1))
        raw_errors.append(np.abs((raw_square - raw_mean**2) / exact - 1))
    assert np.median(errors) < 4 * 6e-8 / spread
    assert np.max(errors) < 60 * 6e-8 / spread
    assert np.median(raw_errors) > 0.1 * 6e-8 / spread**2  # the problem is a problem


def test_samples_all_the_same():
    """No spread, at any offset: the mean is exact and the variance 0."""
    for value in (1e6, 0.1, -3e-20, 1e30):
        xs = np.full((STEPS, 1), value, np.float32)
        for beta in (0.0, 0.5, 0.9, 0.9999):
            m, _, v, _, c = compiled(xs, xs, jnp.float32(beta))
            np.testing.assert_array_equal(m, xs)
            np.testing.assert_array_equal(v, np.zeros_like(xs))
            np.testing.assert_array_equal(c, np.zeros_like(xs))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_samples_are_averaged_in_32_bits(dtype):
    """The averages are those of the same numbers in float32, bit by bit."""
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 4)) + 3, dtype)
    low = compiled(xs, xs[::-1], jnp.float32(0.9))
    wide = compiled(xs.astype(jnp.float32), xs[::-1].astype(jnp.float32), jnp.float32(0.9))
    for ours, theirs in zip(low, wide, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)


def test_moments_in_low_precision_state_are_rounded_once():
    """float32 arithmetic also where the averages are kept in bfloat16."""
    weights = averages.sample_weights(jnp.array(3), 0.9)
    x, m, v = (jnp.asarray(a, jnp.bfloat16) for a in ([1.7, -3.2], [0.9, 2.1], [0.3, 5.0]))
    wide = [a.astype(jnp.float32) for a in (x, m, v)]
    for low, full in (
        (averages.update_mean(m, x, weights), averages.update_mean(wide[1], wide[0], weights)),
        (
            averages.update_variance(v, x, m, weights),
            averages.update_variance(wide[2], wide[0], wide[1], weights),
        ),
        (averages.update_sum(m, x, 0.9), averages.update_sum(wide[1], wide[0], 0.9)),
    ):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", ["0", "1/1000", "1/2", "9/10", "99/100", "9999/10000"])
def test_weights_are_exact_fractions(x64, beta):
    """s = 1 − βᵗ, κ = (1 − β)/s, 1 − κ, κ/(1 − κ): every one to all digits, none by subtraction."""
    exact = Fraction(float(Fraction(beta)))  # the float64 number that stands for it
    for t in (1, 2, 3, 10, 100):
        weights = averages.sample_weights(jnp.array(t), float(exact))
        traced = jax.jit(averages.sample_weights)(jnp.array(t), jnp.asarray(float(exact)))
        total = 1 - exact**t
        new = (1 - exact) / total
        deviation = new / (1 - new) if new < 1 else 0
        expected = [float(x) for x in (total, new, 1 - new, deviation)]
        for found in (weights, traced):
            np.testing.assert_allclose(found, expected, rtol=2e-13)
            if t == 1:
                assert (found.new, found.old, found.deviation) == (1, 0, 0)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_weights_of_a_decay_close_to_one_in_32_bits(gap):
    """A Python float β is not rounded to float32 before 1 − β and βᵗ are formed."""
    new_weight = 1 - LONG(1 - gap)  # of the float64 number
    for t in (1, 2, 3, 100, 10_000):
        found = averages.sample_weights(jnp.array(t), 1 - gap)
        total = -np.expm1(t * np.log1p(-new_weight))
        past = -(1 - new_weight) * np.expm1((t - 1) * np.log1p(-new_weight))
        expected = np.float64([total, new_weight / total, past / total])
        np.testing.assert_allclose(found[:3], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_traced_decay_is_taken_as_the_number_it_is(dtype, beta):
    beta = jnp.asarray(beta, dtype)
    exact = Fraction(float(beta))
    for t in (1, 2, 5, 50):
        found = jax.jit(averages.sample_weights)(jnp.array(t), beta.astype(jnp.float32))
        np.testing.assert_allclose(found.new, float((1 - exact) / (1 - exact**t)), rtol=1e-5)
        np.testing.assert_allclose(found.new + found.old, 1, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999])
def test_weights_at_the_end_of_the_counter(beta):
    """t = 2³¹ − 1: βᵗ is 0, the weights are those of a full prior."""
    found = averages.sample_weights(jnp.array(2**31 - 1, jnp.int32), beta)
    np.testing.assert_allclose(found, averages.constant_sample_weights(beta), rtol=1e-6)
    np.testing.assert_allclose(found.new, 1 - beta, rtol=1e-6)


@pytest.mark.parametrize("beta", [1e-3, 1e-8, 1e-15, 1e-30, 1e-39])
def test_tiny_decay_is_almost_none(beta):
    """The mean is the last sample; the variance, β·(x − x₋)², is not rounding made large."""
    xs = (np.random.default_rng(0).normal(size=(60, 4)) * 3 + 1).astype(np.float32)
    m, _, v, *_ = compiled(xs, xs, jnp.float32(beta))
    np.testing.assert_allclose(m, xs, rtol=1e-5, atol=20 * beta)
    expected = direct(xs, xs, np.float32(beta))[2]
    assert np.all(np.abs(np.asarray(v) - expected) <= 1e-6 * np.max(np.abs(xs)) ** 2)


def test_weights_under_vmap():
    betas = jnp.array([0.0, 0.5, 0.9, 0.999])
    together = jax.vmap(averages.sample_weights, (None, 0))(jnp.array(7), betas)
    for i, beta in enumerate(betas):
        alone = averages.sample_weights(jnp.array(7), beta)
        np.testing.assert_allclose([x[i] for x in together], alone, rtol=1e-6)


def test_derivative_by_the_decay(x64):
    """Against central differences, and finite at β = 0 and at the first sample."""
    xs = np.random.default_rng(0).normal(size=(STEPS, SIZE))
    derivative = jax.jit(jax.jacfwd(lambda b: moments(xs, xs[::-1], b)))
    backward = jax.jit(jax.grad(lambda b: sum(jnp.sum(x) for x in moments(xs, xs[::-1], b))))
    step = 1e-6
    ahead, behind = (compiled(xs, xs[::-1], jnp.asarray(0.6 + d)) for d in (step, -step))
    for found, a, b in zip(derivative(0.6), ahead, behind, strict=True):
        np.testing.assert_allclose(found, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)
    for beta in (0.0, 1e-12, 0.6, 0.999999):
        assert np.all([np.all(np.isfinite(x)) for x in derivative(beta)])
        assert np.isfinite(backward(beta))
        assert np.all(np.abs(np.asarray(derivative(beta))[:, 0]) < 1e-9)  # of one sample


# --- sums, trees, types ----------------------------------------------------------------------


@hypothesis.given(samples, st.one_of(decays, st.just(1.0)))
@same_fixture
def test_sum_is_the_direct_sum(x64, xs, beta):
    total = jnp.zeros(SIZE)
    for x in xs:
        total = averages.update_sum(total, jnp.asarray(x), beta)
    powers = LONG(beta) ** np.arange(STEPS)[::-1]
    expected = (powers[:, None] * xs.astype(LONG)).sum(0)
    assert np.max(np.abs(np.asarray(total, LONG) - expected)) <= 1e-14 * np.sum(np.abs(xs))


def test_trees_and_types(x64):
    """Leaf by leaf; `None` stays; the average's type is kept whatever the sample's."""
    tree = {
        "a": (jnp.ones(2, jnp.bfloat16), None),
        "b": [jnp.ones((), jnp.float32), jnp.ones((0, 3), jnp.float64)],
        "c": {},
    }
    zero = averages.zeros_like_average(tree)
    types = [jnp.float32, jnp.float32, jnp.float64]
    assert jax.tree.structure(zero) == jax.tree.structure(tree)
    assert [x.dtype for x in jax.tree.leaves(zero)] == types
    forced = averages.zeros_like_average(tree, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(forced)} == {jnp.dtype("bfloat16")}
    weights = averages.sample_weights(jnp.array(1), 0.9)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    for sample in (tree, wide):
        mean = averages.update_mean(zero, sample, weights)
        variance = averages.update_variance(zero, sample, mean, weights)
        covariance = averages.update_covariance(zero, sample, mean, sample, mean, weights)
        total = averages.update_sum(zero, sample, 0.9)
        for found, value in ((mean, 1.0), (total, 1.0), (variance, 0.0), (covariance, 0.0)):
            assert jax.tree.structure(found) == jax.tree.structure(tree)
            assert [x.dtype for x in jax.tree.leaves(found)] == types
            assert all(np.all(x == value) for x in jax.tree.leaves(found))


def test_average_dtype():
    for dtype, wanted in (("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")):
        assert averages.average_dtype(jnp.ones(1, dtype)) == wanted
    assert averages.average_dtype(1.0) == jnp.float32
    assert averages.zeros_like_average(0.5).dtype == jnp.float32
    assert not averages.zeros_like_average(0.5).weak_type


def test_scalar_dtype_follows_x64(x64):
    assert averages.scalar_dtype() == jnp.float64
    assert averages.sample_weights(jnp.array(2), 0.9).new.dtype == jnp.float64

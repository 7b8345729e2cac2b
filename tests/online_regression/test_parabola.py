"""The parabola model against the paper's raw averages and direct weighted sums, Eqs. (1)–(12)."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.core import averages
from optgrad.online_regression import parabola
from optgrad.online_regression.parabola import Parabola

LONG = np.longdouble
BETAS = (0.5, 0.9, 0.99, 0.999)
STEPS = 40
SAMPLES = 12

# The `x64` fixture is the same for all examples of a property.
same_fixture = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def raw_averages(positions, gradients, weights):
    """Eq. (1), and avg(g²) for Eq. (7): (s, θ̄, ḡ, gθ, θ², g²) in extended precision."""
    x, g, w = (np.asarray(a, LONG) for a in (positions, gradients, weights))
    return [np.sum(w * a, axis=0) for a in (np.ones_like(x), x, g, g * x, x**2, g**2)]


def online(positions, gradients, beta):
    """The statistics after every sample, each field (T, …)."""

    def step(carry, sample):
        count, state = carry
        weights = averages.sample_weights(count, beta)
        state = parabola.update_parabola(state, *sample, weights)
        return (count + 1, state), state

    start = parabola.init_parabola(positions.shape[1:], positions.dtype)
    return jax.lax.scan(step, (jnp.ones((), jnp.int32), start), (positions, gradients))[1]


online_jit = jax.jit(online)


def path(seed=0, steps=STEPS, spread=1.0, curvature=2.0, noise=0.5, shape=()):
    """Positions about as far from 0 as they are spread, and noisy gradients of a parabola."""
    rng = np.random.default_rng(seed)
    positions = spread * (1 + rng.normal(size=(steps, *shape)))
    gradients = curvature * (positions - 0.3) + noise * rng.normal(size=(steps, *shape))
    return positions, gradients


def state_of(v=4.0, c=6.0, u=16.0, m=3.0, n=-1.5, dtype=jnp.float32):
    return Parabola(*(jnp.asarray(x, dtype) for x in (m, n, v, c, u)))


# --- static regression -------------------------------------------------------------------------


def test_recovers_a_parabola_from_samples_of_any_weights(x64):
    rng = np.random.default_rng(1)
    for curvature, minimum in itertools.product((-3.0, 0.1, 1.0, 100.0), (-2.0, 0.0, 7.0)):
        positions = rng.normal(size=SAMPLES)
        weights = rng.gamma(1.0, size=SAMPLES) * rng.choice([1e-3, 1.0, 50.0])
        fit = parabola.fit_parabola(positions, curvature * (positions - minimum), weights)
        assert abs(parabola.curvature(fit) / curvature - 1) < 1e-13
        assert abs(parabola.minimum(fit) - minimum) < 1e-13 * max(1, abs(minimum))
        assert abs(parabola.correlation(fit) - np.sign(curvature)) < 1e-13
        assert abs(parabola.sigma_ratio(fit) * abs(curvature) - 1) < 1e-13
        assert parabola.residual_deviation(fit) < 1e-6 * abs(curvature)


@hypothesis.given(
    positions=hnp.arrays(np.float64, SAMPLES, elements=st.floats(-10, 10), unique=True),
    gradients=hnp.arrays(np.float64, SAMPLES, elements=st.floats(-10, 10)),
    weights=hnp.arrays(np.float64, SAMPLES, elements=st.floats(0.01, 10)),
)
@same_fixture
def test_static_regression_is_weighted_least_squares(x64, positions, gradients, weights):
    """argmin Σ w (g − λ(θ − p))², solved by QR as a line a + λθ with p = −a/λ."""
    hypothesis.assume(np.std(positions) > 0.1)
    fit = parabola.fit_parabola(positions, gradients, weights)
    root = np.sqrt(weights)[:, None]
    columns = root * np.stack([np.ones(SAMPLES), positions], 1)
    (a, slope), *_ = np.linalg.lstsq(columns, root[:, 0] * gradients, rcond=None)
    assert float(parabola.curvature(fit)) == pytest.approx(slope, rel=1e-9, abs=1e-9)
    line = fit.mean_gradient - parabola.curvature(fit) * fit.mean_position
    assert float(line) == pytest.approx(a, rel=1e-9, abs=1e-9)
    residual = gradients - a - slope * positions
    expected = np.sqrt(np.average(residual**2, weights=weights))
    assert float(parabola.residual_deviation(fit)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_sum_of_weights_drops_out(x64):
    positions, gradients = path()
    weights = np.random.default_rng(2).gamma(1.0, size=STEPS)
    one = parabola.fit_parabola(positions, gradients, weights)
    other = parabola.fit_parabola(positions, gradients, 1e-3 * weights)
    np.testing.assert_allclose(one, other, rtol=1e-13)
    equal = parabola.fit_parabola(positions, gradients)
    np.testing.assert_allclose(
        equal, parabola.fit_parabola(positions, gradients, np.full(STEPS, 7.0)), rtol=1e-13
    )


def test_further_axes_are_separate_models(x64):
    positions, gradients = path(shape=(2, 3))
    weights = np.random.default_rng(2).gamma(1.0, size=STEPS)
    fit = parabola.fit_parabola(positions, gradients, weights)
    for i, j in np.ndindex(2, 3):
        one = parabola.fit_parabola(positions[:, i, j], gradients[:, i, j], weights)
        np.testing.assert_allclose([x[i, j] for x in fit], one, rtol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), np.ones(4)), r"positions has shape \(3,\) and gradients \(4,\)"),
        ((1.0, 1.0), "leading axis of at least one sample"),
        ((np.ones((0, 2)), np.ones((0, 2))), "leading axis of at least one sample"),
        ((np.ones(3), np.ones(3), np.ones(2)), r"weights has shape \(2,\); .* each of the 3"),
        ((np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 2))), r"weights has shape \(3, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parabola.fit_parabola(*arguments)


# --- online statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_central_recursion_equals_direct_sums(x64, beta):
    """Eqs. (1)–(3), (7): wᵢ = (1−β)βᵗ⁻ⁱ, t = 1 … 40, with the sums of weights as small as .001."""
    positions, gradients = path()
    states = online_jit(positions, gradients, beta)
    for t in range(1, STEPS + 1):
        x, g = positions[:t], gradients[:t]
        w = (1 - LONG(beta)) * LONG(beta) ** np.arange(t)[::-1]
        s, mx, mg, gx, xx, gg = raw_averages(x, g, w)
        assert abs(s - (1 - LONG(beta) ** t)) < 1e-17
        expected = [
            mx / s,
            mg / s,
            (s * xx - mx**2) / s**2,
            (s * gx - mg * mx) / s**2,
            (s * gg - mg**2) / s**2,
        ]
        found = [field[t - 1] for field in states]
        np.testing.assert_allclose(found, np.array(expected, float), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_identities_of_equation_2(x64, beta):
    """λ and both printed forms of p from the raw averages of s < 1; σθ/σg and corr likewise."""
    positions, gradients = path()
    states = online_jit(positions, gradients, beta)
    for t in (3, 10, STEPS):
        w = (1 - LONG(beta)) * LONG(beta) ** np.arange(t)[::-1]
        s, mx, mg, gx, xx, gg = raw_averages(positions[:t], gradients[:t], w)
        slope = (s * gx - mg * mx) / (s * xx - mx**2)
        state = Parabola(*(field[t - 1] for field in states))
        root = np.sqrt((s * xx - mx**2) * (s * gg - mg**2))
        for found, expected in (
            (parabola.curvature(state), slope),
            (parabola.minimum(state), (slope * mx - mg) / (s * slope)),
            (parabola.minimum(state), (xx * mg - mx * gx) / (mx * mg - s * gx)),
            (parabola.sigma_ratio(state), np.sqrt((s * xx - mx**2) / (s * gg - mg**2))),
            (parabola.correlation(state), (s * gx - mg * mx) / root),
        ):
            assert float(found) == pytest.approx(float(expected), rel=1e-11)
        # Eq. (8): λ⁻¹ = (σθ/σg)/corr.
        product = parabola.curvature(state) * parabola.sigma_ratio(state)
        assert float(product) == pytest.approx(float(parabola.correlation(state)), rel=1e-13)


def test_online_statistics_are_the_static_ones_of_the_same_weights(x64):
    positions, gradients = path(shape=(3,))
    states = online_jit(positions, gradients, 0.9)
    fit = parabola.fit_parabola(positions, gradients, 0.9 ** np.arange(STEPS)[::-1])
    np.testing.assert_allclose([field[-1] for field in states], fit, rtol=0, atol=1e-12)


def test_vmap_and_broadcasting_give_one_model_each(x64):
    positions, gradients = path(shape=(5,))
    together = online(positions, gradients, 0.9)
    mapped = jax.vmap(lambda x, g: online(x, g, 0.9), in_axes=1, out_axes=1)(positions, gradients)
    for a, b in zip(together, mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    per_beta = jax.vmap(lambda beta: online(positions, gradients, beta))(jnp.array(BETAS))
    for i, beta in enumerate(BETAS):
        for a, b in zip(per_beta, online(positions, gradients, beta), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-11, atol=1e-13)


# --- origin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [-3.0, 20.0])
def test_moving_all_positions_moves_only_the_minimum(x64, constant):
    positions, gradients = path()
    here = online_jit(positions, gradients, 0.9)
    there = online_jit(positions + constant, gradients, 0.9)
    second = slice(1, None)  # one sample has no parabola
    for name in ("mean_gradient", "position_variance", "covariance", "gradient_variance"):
        a, b = getattr(here, name), getattr(there, name)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * abs(constant))
    curvatures = [parabola.curvature(x)[second] for x in (here, there)]
    np.testing.assert_allclose(*curvatures, rtol=1e-11)
    minima = [parabola.minimum(x)[second] for x in (here, there)]
    np.testing.assert_allclose(minima[0] + constant, minima[1], rtol=1e-11)


def test_shift_is_the_printed_one_with_the_sum_of_weights(x64):
    """Algorithm 7 for Σw = s: θ̄ −= sΔ, θ² += −2θ̄Δ + sΔ², gθ −= ḡΔ; printed with s = 1."""
    positions, gradients = path(steps=6)
    beta, move = 0.99, 1.7
    w = (1 - beta) * beta ** np.arange(6)[::-1]
    s, mx, mg, gx, xx, _ = raw_averages(positions, gradients, w)
    states = online_jit(positions, gradients, beta)
    shifted = parabola.shift(Parabola(*(field[-1] for field in states)), move)

    def central(s, mx, mg, gx, xx):
        return [mx / s, (s * xx - mx**2) / s**2, (s * gx - mg * mx) / s**2]

    found = [shifted.mean_position, shifted.position_variance, shifted.covariance]
    mended = central(s, mx - s * move, mg, gx - mg * move, xx - 2 * mx * move + s * move**2)
    np.testing.assert_allclose(found, np.array(mended, float), rtol=1e-12)
    printed = central(s, mx - move, mg, gx - mg * move, xx - 2 * mx * move + move**2)
    assert abs(printed[2] / printed[1] - mended[2] / mended[1]) > 0.5  # λ: what the erratum is
    unchanged = ("mean_gradient", "gradient_variance")
    np.testing.assert_array_equal(
        [getattr(shifted, name) for name in unchanged], [getattr(states, n)[-1] for n in unchanged]
    )
    assert float(s) == pytest.approx(1 - beta**6)


# --- precision -----------------------------------------------------------------------------------


def correlated_path(spread, seeds=32, steps=200):
    """AR(1) positions about θ = 1 in float32, and gradients 2(θ − 1) with a tenth of noise."""
    rng = np.random.default_rng(0)
    innovations = rng.normal(size=(steps, seeds)) * np.sqrt(1 - 0.9**2)
    z = np.zeros((steps, seeds))
    for t in range(1, steps):
        z[t] = 0.9 * z[t - 1] + innovations[t]
    positions = np.float32(1 + spread * z)
    noise = 0.2 * spread * rng.normal(size=positions.shape)
    return positions, np.float32(2 * (positions.astype(np.float64) - 1) + noise)


def exact_curvature(positions, gradients, beta):
    """λ after every sample, the raw recursion of Eq. (3) in extended precision."""
    return raw_curvature(positions, gradients, beta, LONG)


def raw_curvature(positions, gradients, beta, dtype):
    beta, rest = dtype(beta), dtype(1 - LONG(beta))
    s = mx = mg = gx = xx = dtype(0)
    found = []
    for x, g in zip(positions.astype(dtype), gradients.astype(dtype), strict=True):
        samples = (dtype(1), x, g, g * x, x * x)
        s, mx, mg, gx, xx = (
            beta * a + rest * b for a, b in zip((s, mx, mg, gx, xx), samples, strict=True)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append((s * gx - mg * mx) / (s * xx - mx * mx))
    return np.stack(found)


def relative_error(found, exact, start=20):
    """Median over paths and steps, what is not finite counted as infinitely wrong."""
    error = np.abs(np.asarray(found, np.float64)[start:] / np.asarray(exact, float)[start:] - 1)
    return np.median(np.nan_to_num(error, nan=np.inf, posinf=np.inf))


@pytest.mark.parametrize(("beta", "raw_error"), [(0.9, 0.25), (0.99, 0.5)])
def test_float32_far_from_the_origin_where_the_raw_form_fails(beta, raw_error):
    """θ ≈ 1, spread 1e-3, all in float32."""
    positions, gradients = correlated_path(1e-3)
    exact = exact_curvature(positions, gradients, beta)
    central = parabola.curvature(online_jit(positions, gradients, beta))
    assert central.dtype == jnp.float32
    assert relative_error(central, exact) < 1e-4
    raw = raw_curvature(positions, gradients, beta, np.float32)
    assert relative_error(raw, exact) > raw_error


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_displacement_form_does_not_care_about_the_offset(spread):
    """The origin moved to every new position: exact however far the positions are from 0."""
    positions, gradients = correlated_path(spread)

    def step(carry, sample):
        count, state, last = carry
        position, gradient = sample
        state = parabola.shift(state, position - last)
        weights = averages.sample_weights(count, 0.9)
        state = parabola.update_parabola(state, jnp.zeros_like(position), gradient, weights)
        return (count + 1, state, position), parabola.curvature(state)

    state = parabola.init_parabola(positions.shape[1:], jnp.float32)
    start = (jnp.ones((), jnp.int32), state, jnp.asarray(positions[0]))
    found = jax.lax.scan(step, start, (positions, gradients))[1]
    # What is exact needs no rounding: deviations from the first position are float32 numbers.
    exact = exact_curvature(positions.astype(LONG) - 1, gradients, 0.9)
    assert relative_error(found, exact) < 2e-6
    absolute = parabola.curvature(online_jit(positions, gradients, 0.9))
    if spread <= 1e-4:
        assert relative_error(absolute, exact) > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_types(x64, dtype):
    positions, gradients = (x.astype(dtype) for x in path())
    states = online(positions, gradients, 0.9)
    fit = parabola.fit_parabola(positions, gradients, np.ones(STEPS, dtype))
    for state in (states, fit):
        assert {x.dtype for x in state} == {jnp.dtype(dtype)}
        for function in (parabola.curvature, parabola.minimum, parabola.sigma_ratio):
            assert function(state).dtype == dtype
        for function in (parabola.correlation, parabola.residual_deviation):
            assert function(state).dtype == dtype
    assert parabola.init_parabola().mean_position.dtype == jnp.float64


def test_initial_statistics():
    state = parabola.init_parabola((2, 3))
    assert {(x.shape, x.dtype) for x in state} == {((2, 3), jnp.dtype(jnp.float32))}
    assert not any(np.any(x) for x in state)
    assert parabola.init_parabola(dtype=jnp.bfloat16).covariance.dtype == jnp.bfloat16
    assert parabola.init_parabola().covariance.shape == ()


def test_low_precision_and_integer_samples_are_fitted_in_float32():
    for dtype in (jnp.bfloat16, jnp.int32):
        fit = parabola.fit_parabola(jnp.array([0, 1, 2], dtype), jnp.array([-3, -1, 1], dtype))
        assert {x.dtype for x in fit} == {jnp.dtype(jnp.float32)}
        assert float(parabola.curvature(fit)) == pytest.approx(2.0, rel=1e-6)


# --- edge cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["online", "fit"])
def test_one_sample(make):
    """Means are the sample, moments 0: no curvature, no rate, no correlation."""
    x, g = jnp.array([3.0]), jnp.array([-2.0])
    if make == "fit":
        state = parabola.fit_parabola(x, g, jnp.array([0.25]))
    else:
        state = Parabola(*(field[0] for field in online(x, g, 0.99)))
    np.testing.assert_array_equal(state, [3.0, -2.0, 0.0, 0.0, 0.0])
    for function in (parabola.curvature, parabola.sigma_ratio, parabola.correlation):
        assert function(state) == 0
    assert parabola.residual_deviation(state) == 0
    assert not np.isfinite(parabola.minimum(state))


def test_positions_without_spread():
    """Noisy gradients at one point say nothing of the curvature."""
    gradients = jnp.array(np.random.default_rng(0).normal(size=20), jnp.float32)
    states = online(jnp.full(20, 0.7, jnp.float32), gradients, 0.9)
    for function in (parabola.curvature, parabola.sigma_ratio, parabola.correlation):
        np.testing.assert_array_equal(function(states), 0)
    np.testing.assert_array_equal(states.position_variance, 0)
    np.testing.assert_allclose(
        parabola.residual_deviation(states), np.sqrt(states.gradient_variance), rtol=1e-6
    )
    assert not np.any(np.isfinite(parabola.minimum(states)))


def test_gradients_without_spread():
    """A constant slope: λ = 0, p and σθ/σg infinite, no correlation."""
    state = state_of(c=0.0, u=0.0)
    assert parabola.curvature(state) == 0
    assert parabola.correlation(state) == 0
    assert np.isinf(parabola.sigma_ratio(state))
    assert np.isposinf(parabola.minimum(state))  # n < 0: downhill is forward
    assert parabola.residual_deviation(state) == 0
    neither = state_of(v=0.0, c=0.0, u=0.0)
    assert parabola.sigma_ratio(neither) == 0
    assert np.isnan(parabola.minimum(state_of(c=0.0, n=0.0)))


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1.0, 1e12])
def test_formulas_at_every_scale(scale):
    state = state_of(v=4 * scale**2, c=6 * scale**2, u=16 * scale**2, m=3 * scale, n=-3 * scale)
    assert float(parabola.curvature(state)) == pytest.approx(1.5, rel=1e-6)
    assert float(parabola.minimum(state)) == pytest.approx(5 * scale, rel=1e-6)
    assert float(parabola.sigma_ratio(state)) == pytest.approx(0.5, rel=1e-6)
    assert float(parabola.correlation(state)) == pytest.approx(0.75, rel=1e-6)


def test_residual_deviation_and_standard_error_formulas():
    state = state_of()
    assert float(parabola.residual_deviation(state)) == pytest.approx(np.sqrt(7), rel=1e-6)
    expected = 0.3 / 2 * np.sqrt(0.1 / 1.9)
    assert float(parabola.curvature_standard_error(state, 0.3, 0.9)) == pytest.approx(
        expected, rel=1e-6
    )
    assert np.isinf(parabola.curvature_standard_error(state_of(v=0.0), 0.3, 0.9))


def test_rounding_cannot_leave_the_ranges():
    """corr in [−1, 1], residual deviation ≥ 0 also where c² exceeds v·u by rounding."""
    for sign in (1, -1):
        state = state_of(c=sign * 8.000002)
        assert float(parabola.correlation(state)) == sign
        assert float(parabola.residual_deviation(state)) == 0


# --- statistics of the estimate ------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_standard_error_of_the_curvature(x64, beta):
    """Eq. (12): positions of locally constant variance (±1 in turn), gradient noise σ."""
    sigma, chains, steps = 0.7, 4000, int(8 / (1 - beta))
    positions = np.where(np.arange(steps) % 2, 1.0, -1.0)
    noise = sigma * np.random.default_rng(0).normal(size=(chains, steps))
    weights = beta ** np.arange(steps)[::-1]
    fit = jax.vmap(lambda g: parabola.fit_parabola(positions, g, weights))(3 * positions + noise)
    measured = float(np.std(parabola.curvature(fit)))
    predicted = float(np.mean(parabola.curvature_standard_error(fit, sigma, beta)))
    # Positions ±1 in turn have the variance 1 − m², m = (1−β)/(1+β); Eq. (12) neglects m.
    assert np.mean(parabola.curvature(fit)) == pytest.approx(3, abs=4 * measured / chains**0.5)
    tolerance = 0.05 if beta >= 0.9 else 0.15
    assert measured == pytest.approx(predicted, rel=tolerance)


def test_standard_error_is_off_by_little_where_the_variance_fluctuates(x64):
    """Independent normal positions, β = 0.9: what the approximation in Eq. (12) costs."""
    sigma, beta, chains, steps = 1.0, 0.9, 4000, 100
    rng = np.random.default_rng(0)
    positions, noise = rng.normal(size=(2, chains, steps))
    fit = jax.vmap(parabola.fit_parabola, (0, 0, None))(
        positions, positions + sigma * noise, beta ** np.arange(steps)[::-1]
    )
    error = (parabola.curvature(fit) - 1) / parabola.curvature_standard_error(fit, sigma, beta)
    assert np.std(error) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("curvature", "lr", "expected"), [(0.0, 0.1, 1.0), (0.1, 0.1, 1.095), (1.0, 0.5, 1.15)]
)
def test_bias_on_a_path_driven_by_its_own_noise(curvature, lr, expected):
    """θ ← θ − lr·g: E c/E v = λ + (1−β)(1+ρ)/(2·lr) with ρ = 1 − lr·λ, although λ may be 0."""
    beta, chains, steps = 0.9, 32768, 150
    rho = 1 - lr * curvature
    assert curvature + (1 - beta) * (1 + rho) / (2 * lr) == pytest.approx(expected)

    def step(carry, noise):
        count, theta, state = carry
        gradient = curvature * theta + noise
        weights = averages.sample_weights(count, beta)
        state = parabola.update_parabola(state, theta, gradient, weights)
        return (count + 1, theta - lr * gradient, state), None

    noises = jax.random.normal(jax.random.key(0), (steps, chains))
    start = (jnp.ones((), jnp.int32), jnp.zeros(chains), parabola.init_parabola((chains,)))
    state = jax.jit(lambda n: jax.lax.scan(step, start, n)[0][2])(noises)
    ratio = jnp.mean(state.covariance) / jnp.mean(state.position_variance)
    assert float(ratio) == pytest.approx(expected, abs=0.03)

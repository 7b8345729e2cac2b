"""What the paper says about the factors and the variances, checked through the public optimizers.

Coordinates are independent, so that whole sample spaces are enumerated in one call: every
coordinate is one outcome, and a mean over coordinates is an exact expectation.
"""

import itertools
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import optgrad

from . import boxes

LARGEST = 2.0**127
NUMBERS = st.floats(-LARGEST, LARGEST, width=32)
POSITIVE = st.floats(0, LARGEST, width=32)


def direction_once(optimizer, gradient, variance):
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient_variance=variance)
    return updates


# With μ = 0 the momentum is the gradient: its mean and variance are what the test says they are.
ADAPT = jax.jit(lambda g, s: direction_once(optgrad.scale_by_m_svag_mb(0.0), g, s))
ADAPT_SIGN = {
    factor: jax.jit(
        lambda g, s, factor=factor: direction_once(
            optgrad.scale_by_adam_star_mb(0.0, factor=factor), g, s
        )
    )
    for factor in ("adam", "optimal")
}


def directions(name, beta, gradients, **options):
    """The last direction of a fixed stream, (T, D) -> (D,)."""
    optimizer = getattr(optgrad, f"scale_by_{name}")(beta, **options)

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state)
        return state, updates

    run = jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1])
    return np.asarray(run(jnp.asarray(gradients)))[-1]


# --- the factors -----------------------------------------------------------------------------


@hypothesis.given(
    hnp.arrays(np.float32, 8, elements=NUMBERS), hnp.arrays(np.float32, 8, elements=POSITIVE)
)
def test_factors_only_shorten(gradient, variance):
    """0 ≤ γ ≤ 1 for all of float32, compiled; never a NaN, never another sign."""
    adapted = np.asarray(ADAPT(gradient, variance))
    assert np.all(np.abs(adapted) <= np.abs(gradient))
    assert np.all(adapted * np.sign(gradient) >= 0)
    for adapt_sign in ADAPT_SIGN.values():
        factor = np.asarray(adapt_sign(gradient, variance)) * np.sign(gradient)
        assert np.all((factor >= 0) & (factor <= 1))


@hypothesis.given(st.floats(-120, 120), st.sampled_from([-1.0, 1.0]), st.floats(-8, 10))
def test_factors_over_all_of_float32(exponent, sign, log_eta):
    """γ from the relative standard deviation, wherever ŝ and γg are float32 numbers."""
    mean, eta = np.float32(sign * 2**exponent), 10**log_eta
    exact = (eta * np.float64(mean)) ** 2
    hypothesis.assume(1e-37 < exact < 3e38 and abs(mean) > 1e-36 * (1 + eta**2))
    variance = np.float32(exact)
    relative = np.float64(variance) / np.float64(mean) ** 2
    np.testing.assert_allclose(
        ADAPT(np.full(8, mean, np.float32), np.full(8, variance)) / mean, 1 / (1 + relative), 1e-6
    )
    for name, exact in boxes.FACTORS.items():
        factor = ADAPT_SIGN[name](np.full(8, mean, np.float32), np.full(8, variance))
        np.testing.assert_allclose(factor * np.sign(mean), exact(relative), rtol=2e-6)


ETAS = np.geomspace(0.05, 20, 60)


def test_lemma_1_for_the_direction(x64):
    """γ minimises E‖γp̂ − p‖² = γ²(p² + σ²) − 2γp² + p² (Eqs. 14 and 27)."""
    p = np.linspace(-3, 3, len(ETAS))
    sigma = ETAS * np.abs(p)
    best = np.asarray(ADAPT(jnp.asarray(p), jnp.asarray(sigma**2))) / p

    def expected_distance(gamma):
        return gamma**2 * (p**2 + sigma**2) - 2 * gamma * p**2 + p**2

    for other in (best + 0.01, best - 0.01, 0.5 * best, 1.0, 0.0):
        assert np.all(expected_distance(best) < expected_distance(other))


def test_lemma_1_for_the_sign(x64):
    """γ = 2ρ − 1 (Eq. 15), ρ the probability that a Gaussian has its mean's sign (Eq. 8)."""
    p = np.linspace(-3, 3, len(ETAS))
    rho = stats.norm.cdf(np.abs(p) / (ETAS * np.abs(p)))
    best = np.asarray(ADAPT_SIGN["optimal"](jnp.asarray(p), jnp.asarray((ETAS * p) ** 2)))
    np.testing.assert_allclose(best, np.sign(p) * (2 * rho - 1), rtol=1e-12)

    def expected_distance(gamma):
        return gamma**2 - 2 * gamma * (2 * rho - 1) + 1  # Eq. (29)

    best = np.abs(best)
    for other in (best + 0.01, best - 0.01, np.abs(1 / np.sqrt(1 + ETAS**2))):
        assert np.all(expected_distance(best) <= expected_distance(other))


def test_figure_5_adams_factor_is_close_to_the_optimal_one(x64):
    ones = jnp.ones(len(ETAS))
    adam = np.asarray(ADAPT_SIGN["adam"](ones, jnp.asarray(ETAS**2)))
    optimal = np.asarray(ADAPT_SIGN["optimal"](ones, jnp.asarray(ETAS**2)))
    assert 0.05 < np.max(np.abs(adam - optimal)) < 0.08
    assert np.all(np.diff(adam) < 0)
    assert np.all(np.diff(optimal[ETAS > 0.2]) < 0)
    np.testing.assert_allclose(optimal, special.erf(1 / (np.sqrt(2) * ETAS)), rtol=1e-12)


# --- the relative variance of a momentum term (Eqs. 18, 19, 46, 47) --------------------------


@pytest.mark.parametrize("mu", [Fraction(0), Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
def test_kappa_is_the_ratio_of_the_weights(mu):
    """κ(μ, t) = Σμ²ˢ/(Σμˢ)², s < t; in the numerically stable form of the specification too."""
    for t in (1, 2, 3, 10, 40):
        exact = sum(mu ** (2 * s) for s in range(t)) / sum(mu**s for s in range(t)) ** 2
        assert boxes.kappa(mu, t) == exact
        assert exact == (1 - mu) * (1 + mu**t) / ((1 + mu) * (1 - mu**t))
        assert 1 - exact == 2 * (mu - mu**t) / ((1 + mu) * (1 - mu**t))


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("t", [2, 3, 7, 60])
def test_momentum_is_less_noisy_by_kappa(x64, beta, t):
    """M-SVAG's factor belongs to var[r]/E[r]² of iid gradients of mean m, variance v − m²."""
    gradients = np.random.default_rng(t).normal(size=(t, 6)) + 1
    weights = (1 - beta) * beta ** np.arange(t)[::-1]
    mean = weights @ gradients / weights.sum()
    variance = weights @ (gradients - mean) ** 2 / weights.sum()
    gamma = directions("m_svag", beta, gradients) / mean
    powers = beta ** np.arange(t)
    momentum_mean, momentum_variance = mean * powers.sum(), variance * (powers**2).sum()
    np.testing.assert_allclose(
        gamma, momentum_mean**2 / (momentum_mean**2 + momentum_variance), rtol=1e-9
    )


# --- the variance estimates ------------------------------------------------------------------


def streams(values, t):
    """All sequences of t values, as (t, number of sequences)."""
    return np.array(list(itertools.product(values, repeat=t))).T


@pytest.mark.parametrize(("beta", "t"), [(0.3, 2), (0.9, 3), (0.9, 8)])
def test_unbiased_variance_is_unbiased(x64, beta, t):
    """E[v − m²] = (1 − ρ_t)σ²: which ``variance="unbiased"`` divides by, and the boxes do not."""
    sigma, gradients = 0.7, streams((2.0 - 0.7, 2.0 + 0.7), t)
    weights = (1 - beta) * beta ** np.arange(t)[::-1]
    mean = weights @ gradients / weights.sum()
    found = {}
    for variance in ("moving_average", "unbiased"):
        gamma = directions("svag", beta, gradients, variance=variance) / gradients[-1]
        found[variance] = np.mean(mean**2 * (1 / gamma - 1))
    rho = float(boxes.kappa(Fraction(str(beta)), t))
    np.testing.assert_allclose(found["unbiased"], sigma**2, rtol=1e-9)
    np.testing.assert_allclose(found["moving_average"], (1 - rho) * sigma**2, rtol=1e-9)
    sign = directions("adam_sign", beta, gradients, variance="unbiased")
    np.testing.assert_allclose(np.mean(mean**2 * (1 / sign**2 - 1)), sigma**2, rtol=1e-9)
    of_momentum = directions("m_svag", beta, gradients, variance="unbiased") / mean
    np.testing.assert_allclose(np.mean(mean**2 * (1 / of_momentum - 1)), rho * sigma**2, rtol=1e-9)


def test_minibatch_variance_is_unbiased(x64):
    """All minibatches of 2 and 3 examples with replacement from 3: E[ŝ] = var[g], as Sec. C.2 says.

    Eq. (44) as printed, 1/B·(1/(B−1)·Σg² − g²), is too large by g²/(B(B−1)).
    """
    values = (0.3, 1.1, 2.0)
    for size in (2, 3):
        batches = streams(values, size)  # (B, outcomes)
        exact = np.var(values) / size
        estimate = np.mean(optgrad.gradient_variance(jnp.asarray(batches)))
        np.testing.assert_allclose(estimate, exact, rtol=1e-12)
        printed = (np.sum(batches**2, 0) / (size - 1) - np.mean(batches, 0) ** 2) / size
        excess = np.mean(np.mean(batches, 0) ** 2) / (size * (size - 1))
        np.testing.assert_allclose(np.mean(printed), exact + excess, rtol=1e-12)


def test_minibatch_momentum_variance_is_unbiased(x64):
    """E[s̄_t] = var[r_t] over all sequences of three minibatches of two examples (Eq. 48)."""
    beta, values = 0.6, (0.3, 1.1, 2.0)
    batches = np.array(list(itertools.product(itertools.product(values, repeat=2), repeat=3)))
    batches = np.moveaxis(batches, 0, -1)  # (T, B, outcomes)
    optimizer = optgrad.scale_by_m_svag_mb(beta)
    state = optimizer.init(jnp.asarray(batches[0, 0]))
    momentum = 0.0
    for examples in batches:
        gradient = examples.mean(0)
        momentum = beta * momentum + gradient
        direction, state = optimizer.update(
            jnp.asarray(gradient), state, per_example_grads=jnp.asarray(examples)
        )
    estimate = momentum**2 * (momentum / np.asarray(direction) - 1)
    np.testing.assert_allclose(np.mean(estimate), np.var(momentum), rtol=1e-9)


# --- invariances -----------------------------------------------------------------------------


SCALES = [2.0**-30, 2.0**-7, 2.0**20]


@pytest.mark.parametrize("name", ["ssd", "m_ssd", "adam_star", "adam_star_mb", "adam_sign"])
def test_sign_methods_do_not_see_the_scale(name):
    """Scaling by a power of two changes no bit; the others scale along."""
    check_scaling(name, lambda scale: 1.0)


@pytest.mark.parametrize("name", ["svag", "m_svag", "m_svag_mb"])
def test_other_methods_scale_along(name):
    check_scaling(name, lambda scale: scale)


def check_scaling(name, effect):
    gradients = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32) + 0.5
    optimizer = getattr(optgrad, f"scale_by_{name}")()

    @jax.jit
    def run(gradients):
        state = optimizer.init(gradients[0])
        for g in gradients:
            extra = {"gradient_variance": g * g / 4} if name.endswith("mb") else {}
            updates, state = optimizer.update(g, state, **extra)
        return updates

    plain = np.asarray(run(gradients))
    for scale in SCALES:
        np.testing.assert_array_equal(run(gradients * np.float32(scale)), plain * effect(scale))
    np.testing.assert_array_equal(run(-gradients), -plain)


def test_without_noise_m_svag_is_averaged_momentum(x64):
    """A constant gradient passes unchanged, a drifting one is shortened."""
    constant = np.full((50, 3), [0.3, -7.0, 1e-12])
    np.testing.assert_allclose(directions("m_svag", 0.9, constant), constant[0], rtol=1e-12)
    noisy = constant * (1 + 0.5 * (-1.0) ** np.arange(50)[:, None])
    assert np.all(np.abs(directions("m_svag", 0.9, noisy)) < np.abs(constant[0]))


def test_noisier_coordinates_are_shortened_more(x64):
    """Figure 1: with relative deviations ½ and 1½ the factors are 1/1.25 and 1/3.25."""
    adapted = ADAPT(jnp.array([2.0, 1.0]), jnp.array([1.0, 2.25]))
    np.testing.assert_allclose(adapted, [2 / 1.25, 1 / 3.25], rtol=1e-12)

"""Formulas of the reproduction of Dissecting Adam, against NumPy, SciPy and simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import optgrad
from optgrad.experiments.reproduce import dissecting_claims as claims
from optgrad.experiments.reproduce import dissecting_factors as factors
from optgrad.experiments.reproduce import dissecting_quadratics as quadratics
from optgrad.experiments.reproduce import dissecting_rate as rate
from optgrad.experiments.reproduce import dissecting_scales as scales
from optgrad.experiments.reproduce import dissecting_signs as signs
from optgrad.experiments.reproduce import dissecting_training as training
from optgrad.experiments.reproduce.planning_runs import double_precision

pytestmark = pytest.mark.slow  # together a minute, in CI's slow stage


def both_positive(h, k, correlation):
    """P[X > 0, Y > 0] by SciPy: the distribution function of (−X, −Y) at 0."""
    normal = scipy.stats.multivariate_normal([-h, -k], [[1, correlation], [correlation, 1]])
    return normal.cdf([0, 0])


# Signs ------------------------------------------------------------------------------------------


def test_orthant_probability_is_scipys():
    generator = np.random.default_rng(0)
    h = generator.normal(size=200) * 10 ** generator.uniform(-2, 0.7, 200)
    k = np.where(generator.random(200) < 0.5, h, 0) + generator.normal(size=200)
    correlation = generator.choice([-1, 1], 200) * generator.uniform(0, 0.99, 200)
    with double_precision():
        found = np.asarray(signs.orthant_probability(h, k, correlation))
    expected = [both_positive(*values) for values in zip(h, k, correlation, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_orthant_probability_near_full_correlation():
    correlation = 0.999
    h, k = np.array([0.0, 0.01, 0.3, -1.0, 2.0]), np.array([0.0, 0.02, 0.31, -1.2, -0.5])
    with double_precision():
        found, many = (
            np.asarray(signs.orthant_probability(h, k, np.full(5, correlation), n))
            for n in (40, 400)
        )
    np.testing.assert_allclose(found, many, rtol=0, atol=1e-12)
    expected = [both_positive(x, y, correlation) for x, y in zip(h, k, strict=True)]
    np.testing.assert_allclose(many, expected, rtol=0, atol=1e-8)


def test_covariance_of_signs_with_zero_means_is_the_arcsine_law():
    correlation = np.linspace(-0.98, 0.98, 9)
    with double_precision():
        found = signs.sign_covariance(0.0, 0.0, signs.quadrature(correlation))
    np.testing.assert_allclose(found, 2 / np.pi * np.arcsin(correlation), atol=1e-12)


# One step on a quadratic ------------------------------------------------------------------------


def problem(dimension=5, seed=0):
    """Q, a gradient and the noise ν."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(dimension, dimension))
    return factor @ factor.T + 0.1 * np.eye(dimension), generator.normal(size=dimension), 0.7


def test_expectations_of_sgd_are_those_of_the_specification():
    matrix, gradient, noise = problem()
    with double_precision():
        found = quadratics.expected_sgd(jnp.asarray(matrix), jnp.asarray(gradient), noise)
        measured = float(found.step_size), float(found.improvement)
    eigenvalues = np.linalg.eigvalsh(matrix)
    squared = gradient @ gradient
    curvature = gradient @ matrix @ gradient + noise**2 * np.sum(eigenvalues**3)
    assert measured == pytest.approx((-squared / curvature, 0.5 * squared**2 / curvature))


def expected_ssd_by_scipy(matrix, gradient, noise):
    """∇LᵀE[s] and E[sᵀQs], pair by pair."""
    covariance = noise**2 * matrix @ matrix
    deviation = np.sqrt(np.diag(covariance))
    h, positive = gradient / deviation, scipy.stats.norm.cdf(gradient / deviation)
    second = np.eye(len(gradient))
    for i in range(len(gradient)):
        for j in range(i):
            both = both_positive(h[i], h[j], covariance[i, j] / (deviation[i] * deviation[j]))
            second[i, j] = second[j, i] = 4 * both - 2 * positive[i] - 2 * positive[j] + 1
    return gradient @ (2 * positive - 1), np.sum(matrix * second)


def test_expectations_of_ssd_are_exact():
    matrix, gradient, noise = problem()
    with double_precision():
        q = jnp.asarray(matrix)
        pairs = quadratics.correlated_pairs(q)
        found = quadratics.expected_ssd(q, jnp.asarray(gradient), noise, pairs)
        diagonal = jnp.diag(jnp.diag(q))
        aligned = [
            quadratics.expected_ssd(diagonal, jnp.asarray(gradient), noise, p).curvature
            for p in (None, quadratics.correlated_pairs(diagonal))
        ]
    np.testing.assert_allclose(found, expected_ssd_by_scipy(matrix, gradient, noise), rtol=1e-9)
    np.testing.assert_allclose(aligned, [np.trace(matrix)] * 2)


@pytest.mark.parametrize("method", ["sgd", "ssd"])
def test_step_size_is_optimal_in_simulation(method):
    """The mean loss after a step, over 20,000 draws, is lowest at α* among 81 step sizes."""
    matrix, gradient, noise = problem()
    with double_precision():
        q, g = jnp.asarray(matrix), jnp.asarray(gradient)
        found = {
            "sgd": quadratics.expected_sgd(q, g, noise),
            "ssd": quadratics.expected_ssd(q, g, noise, quadratics.correlated_pairs(q)),
        }[method].step_size
    drawn = gradient - noise * np.random.default_rng(1).normal(size=(20_000, 5)) @ matrix
    z = drawn if method == "sgd" else np.sign(drawn)
    start = np.linalg.solve(matrix, gradient)
    multiples = np.linspace(0, 2, 81)

    def mean_loss(step_size):
        moved = start + step_size * z
        return np.mean(0.5 * np.sum(moved * (moved @ matrix), axis=-1))

    losses = [mean_loss(multiple * float(found)) for multiple in multiples]
    assert multiples[np.argmin(losses)] == pytest.approx(1, abs=0.1)


def test_closed_forms_agree_with_simulation():
    with double_precision():
        drawn = quadratics.random_problems("well-conditioned", "rotated", 6, 3)
        found = quadratics.improvements(drawn, 0.5, 5000)
    for method in ("sgd", "ssd"):
        off = np.abs(found[f"{method}_simulated"] - found[method])
        assert np.all(off < 4 * found[f"{method}_error"])
        assert np.all(found[f"{method}_error"] < 0.1 * found[method])
    assert np.all(found["ssd_bound"] <= found["ssd"])


# Runs on quadratics -----------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", quadratics.SPECTRA)
def test_both_bases_of_a_seed_have_one_spectrum_and_one_start_value(spectrum):
    rotated, aligned = (quadratics.random_problems(spectrum, b, 20, 2) for b in quadratics.BASES)
    np.testing.assert_array_equal(rotated.eigenvalues, aligned.eigenvalues)
    for one, other in zip(rotated.matrix, aligned.matrix, strict=True):
        np.testing.assert_allclose(one, one.T, atol=1e-12)
        np.testing.assert_allclose(
            np.linalg.eigvalsh(one), np.sort(np.diag(other)), rtol=1e-9, atol=1e-12
        )
        assert np.abs(one - np.diag(np.diag(one))).max() > 0.01
    values = [np.einsum("si,sij,sj->s", p.start, p.matrix, p.start) for p in (rotated, aligned)]
    np.testing.assert_allclose(*values)
    large = (rotated.eigenvalues > 30).sum(axis=1)
    assert set(large) == {2 if spectrum == "ill-conditioned" else 0}


@pytest.mark.parametrize(("basis", "noise"), [("rotated", 0.5), ("axis-aligned", 0.5),
                                              ("rotated", 0.0)])  # fmt: skip
def test_runs_follow_a_transcription(basis, noise):
    drawn = quadratics.random_problems("well-conditioned", basis, 4, 2)
    with double_precision():
        found = quadratics.descend(drawn, noise, 4, diagonal=basis == "axis-aligned")
        keys = [jax.random.fold_in(jax.random.key(1), t) for t in range(4)]
        normal = [np.asarray(jax.random.normal(key, (4,), jnp.float64)) for key in keys]
    matrix, seed = drawn.matrix[1], 1
    sgd, ssd = drawn.start[1].copy(), drawn.start[1].copy()
    for t in range(5):
        np.testing.assert_allclose(
            found[seed, :, t], [0.5 * x @ matrix @ x for x in (sgd, ssd)], rtol=1e-8
        )
        if t == 4:
            break
        gradient = matrix @ sgd
        curvature = gradient @ matrix @ gradient + noise**2 * np.trace(matrix @ matrix @ matrix)
        sgd = sgd - gradient @ gradient / curvature * (gradient - noise * matrix @ normal[t])
        gradient = matrix @ ssd
        certain = (gradient @ np.sign(gradient), np.sign(gradient) @ matrix @ np.sign(gradient))
        slope, curvature = expected_ssd_by_scipy(matrix, gradient, noise) if noise else certain
        ssd = ssd - slope / curvature * np.sign(gradient - noise * matrix @ normal[t])


# Factors and theorem 1 --------------------------------------------------------------------------


def test_factors():
    eta = np.array([0.01, 1.0, 3.0])
    np.testing.assert_allclose(factors.magnitude_factor(eta), 1 / (1 + eta**2))
    success = scipy.stats.norm.cdf(1 / eta)
    np.testing.assert_allclose(factors.sign_factor(eta), 2 * success - 1)
    np.testing.assert_allclose(factors.adam_factor(eta) ** 2, factors.magnitude_factor(eta))


def test_simulated_factors_minimise_the_distances():
    drawn = 1 + 0.8 * np.random.default_rng(0).standard_normal(1000)
    tried = np.linspace(0, 1.5, 15_001)
    distance = [np.mean((g * drawn - 1) ** 2) for g in tried]
    of_sign = [np.mean((g * np.sign(drawn) - 1) ** 2) for g in tried]
    best = tried[np.argmin(distance)], tried[np.argmin(of_sign)]
    np.testing.assert_allclose(factors.simulated_factors(0.8, 1000), best, atol=2e-4)


def test_exact_svag_follows_a_transcription():
    setting = rate.setting(4, "rotated")
    steps = np.array([1, 3])
    with double_precision():
        found = rate.follow(setting, "exact", 0.3, steps, 2)
        keys = [jax.random.fold_in(jax.random.key(0), t) for t in range(3)]
        noise = [rate.NOISE * np.asarray(jax.random.normal(k, (2, 4), jnp.float64)) for k in keys]
    params, norms, values = np.tile(setting.start, (2, 1)), [], []
    deviation = rate.NOISE * np.sqrt(np.diag(setting.matrix @ setting.matrix))
    for t in range(3):
        mean = params @ setting.matrix
        g = mean - noise[t] @ setting.matrix
        norms.append(np.mean(np.sum(g**2, axis=-1)))
        params = params - 0.3 * g / (1 + deviation**2 / mean**2)
        values.append(0.5 * np.sum(params * (params @ setting.matrix), axis=-1))
    np.testing.assert_allclose(found.excess, np.stack([values[0], values[2]], axis=-1), rtol=1e-10)
    assert found.squared_norm == pytest.approx(max(norms))


def test_plateau_is_the_stationary_loss():
    setting = rate.setting(5, "rotated")
    q, step_size = setting.matrix, 0.4
    covariance = np.zeros((5, 5))
    for _ in range(2000):
        contraction = np.eye(5) - step_size * q
        covariance = contraction @ covariance @ contraction + (step_size * rate.NOISE) ** 2 * q @ q
    assert rate.plateau(setting, step_size) == pytest.approx(0.5 * np.trace(q @ covariance))


def test_slope_and_its_error():
    steps = np.array([1.0, 10.0, 100.0, 1000.0])
    assert rate.slope(steps, 5 * steps**-1.5, 10) == pytest.approx(-1.5)
    excess = np.array([2.0, 3.0, 4.0])[:, None] / steps
    assert rate.slope_with_error(steps, excess, 1) == pytest.approx((-1, 0), abs=1e-12)


def test_exact_svag_falls_as_one_over_t():
    setting = rate.setting(10)._replace(start=np.ones(10))
    steps = np.unique(np.logspace(0, 4, 41).astype(int))
    with double_precision():
        found = rate.follow(setting, "exact", 1 / setting.smoothness, steps, 100)
    exponent, error = rate.slope_with_error(steps, found.excess, 1000)
    assert exponent == pytest.approx(-1, abs=0.05)
    assert error < 0.05
    limit = rate.asymptote(setting, 1 / setting.smoothness, steps)
    np.testing.assert_allclose(found.excess.mean(axis=0)[-1], limit[-1], rtol=0.1)
    limit = rate.bound(setting, 0.5 * setting.start @ setting.matrix @ setting.start,
                       found.squared_norm, steps)  # fmt: skip
    assert np.all(found.excess.mean(axis=0) <= limit)


# Verdicts and schedules -------------------------------------------------------------------------


def test_difference_has_the_interval_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.normal(1, 1, 6), generator.normal(0, 1, 6)
    found = claims.difference([*first, np.nan], [*second, 1.0])
    interval = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), interval)
    assert found.pairs == 6


@pytest.mark.parametrize("values", [([], []), ([1.0], [0.0]), ([np.nan, 2.0], [1.0, np.nan])])
def test_too_few_pairs_judge_nothing(values):
    found = claims.difference(*values)
    assert claims.is_above(found) == claims.is_within(found, -9, 9) == claims.UNDECIDED
    assert "nan" not in found.text()


@pytest.mark.parametrize(
    ("mean", "above", "within"),
    [
        (3.0, "holds", "does not hold"),
        (1.5, "holds", claims.UNDECIDED),
        (0.5, claims.UNDECIDED, claims.UNDECIDED),
        (0.0, claims.UNDECIDED, "holds"),
        (-3.0, "does not hold", "does not hold"),
    ],
)
def test_verdicts_need_the_whole_interval(mean, above, within):
    found = claims.Difference(mean, 0.9, 5)
    assert claims.is_above(found) == above
    assert claims.is_within(found, -1, 1) == within


def test_a_claim_of_parts():
    yes, no, open_ = "holds", "does not hold", claims.UNDECIDED
    assert claims.all_hold([yes, yes]) == yes
    assert claims.all_hold([yes, open_]) == open_
    assert claims.all_hold([yes, no, open_]) == "holds in part"
    assert claims.all_hold([no, open_]) == no


def test_learning_rate_is_divided_at_the_boundaries():
    budget = dataclasses.replace(
        scales.PAPER.networks["cifar100"], steps=6, decay_at=(1 / 3, 1 / 2)
    )
    surroundings = training.surroundings(budget)
    optimizer = surroundings.optimizer(optgrad.get_method("m_ssd"), {"learning_rate": 0.5})
    params = jnp.zeros(1)
    state = optimizer.init(params)
    sizes = []
    for _ in range(5):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(optax.tree.norm(updates))
    np.testing.assert_allclose(sizes, [0.5, 0.5, 0.05, 0.005, 0.005], rtol=1e-6)
    constant = training.surroundings(scales.PAPER.networks["mnist"])
    assert constant.schedule is None

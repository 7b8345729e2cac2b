"""The algorithm boxes of Balles & Hennig, "Dissecting Adam", transcribed line by line.

In the paper's raw form: moving averages, bias correction, κ(μ, t) of Eq. (19), variance v − m².
Written from the paper, not from the package. They run in extended precision where the machine has
it, so that what the raw form loses by cancellation stays below the tolerance of the comparison.

A box is called as ``box(mu, **options)`` and gives ``step(gradient, variance) -> direction`` with
θ ← θ − α·direction; only the minibatch boxes look at ``variance``, the ŝ of Eq. (44).

`WRONG_PORTS` are boxes with one line changed, as found elsewhere: a comparison that cannot tell
them from the box is worth nothing.
"""

import numpy as np
from scipy import special

LONG = np.longdouble


def kappa(mu, t):
    """Eq. (19), as printed."""
    return (1 - mu ** (2 * t)) * (1 - mu) ** 2 / ((1 - mu**2) * (1 - mu**t) ** 2)


def adam_factor(relative):
    return 1 / np.sqrt(1 + relative)


def optimal_factor(relative):
    """Eq. (15) with Eq. (8): 2ρ − 1 = erf(1/(√2 η))."""
    with np.errstate(divide="ignore"):
        return special.erf((1 / np.sqrt(2 * relative)).astype(np.float64))


FACTORS = {"adam": adam_factor, "optimal": optimal_factor}


def where_nonzero(mean, direction):
    """ "In the (rare) case that m_i = 0 … the update magnitude will be set to zero."""
    return np.where(mean == 0, LONG(0), direction)


def ssd(mu):
    """Table 1; sign(0) = 0, footnote 3."""

    def step(g, _):
        return np.sign(g)

    return step


def m_ssd(mu):
    """Algorithm 1."""
    mu, m = LONG(mu), LONG(0)

    def step(g, _):
        nonlocal m
        m = mu * m + g
        return np.sign(m)

    return step


def _averages(mu):
    """Eqs. (3) and (4) with one μ: lines 4 and 5 of Algorithms 2 and 4."""
    mu, m_raw, v_raw, t = LONG(mu), LONG(0), LONG(0), 0

    def step(g):
        nonlocal m_raw, v_raw, t
        t += 1
        m_raw = mu * m_raw + (1 - mu) * g
        v_raw = mu * v_raw + (1 - mu) * g**2
        return m_raw / (1 - mu**t), v_raw / (1 - mu**t), kappa(mu, t)

    return step


def _relative(m, v, rho, *, momentum, variance):
    """η²: Eq. (7) for a gradient, Eq. (19) for the momentum term.

    ``variance="unbiased"`` is the authors' published implementation: s = (v − m²)/(1 − ρ_t), with
    γ = m²/(m² + ρ_t s) for the momentum term and m²/(m² + s) for the gradient; γ = 1 at t = 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if variance == "moving_average":
            s = v - m**2
        elif 1 - rho < 1e-15:  # t = 1, or μ = 0
            s = np.zeros_like(m)
        else:
            s = (v - m**2) / (1 - rho)
        s = np.maximum(s, 0)  # of rounding only
        return (rho * s if momentum else s) / m**2


def svag(mu, variance="moving_average"):
    """Section 3.2, Eq. (16), with the variance estimate of Section 3.3."""
    averages = _averages(mu)

    def step(g, _):
        m, v, rho = averages(g)
        relative = _relative(m, v, rho, momentum=False, variance=variance)
        return where_nonzero(m, g / (1 + relative))

    return step


def m_svag(mu, variance="moving_average"):
    """Algorithm 2."""
    averages = _averages(mu)

    def step(g, _):
        m, v, rho = averages(g)
        relative = _relative(m, v, rho, momentum=True, variance=variance)
        return where_nonzero(m, m / (1 + relative))

    return step


def adam_star(mu, variance="moving_average", factor="adam"):
    """Algorithm 4."""
    averages = _averages(mu)

    def step(g, _):
        m, v, rho = averages(g)
        relative = _relative(m, v, rho, momentum=True, variance=variance)
        return where_nonzero(m, FACTORS[factor](relative) * np.sign(m))

    return step


def adam_sign(mu, variance="moving_average", factor="adam"):
    """Eq. (6) with β₁ = β₂ = μ and ε = 0."""
    averages = _averages(mu)

    def step(g, _):
        m, v, rho = averages(g)
        relative = _relative(m, v, rho, momentum=False, variance=variance)
        return where_nonzero(m, FACTORS[factor](relative) * np.sign(m))

    return step


def m_svag_mb(mu):
    """Algorithm 3."""
    mu, m, s_bar = LONG(mu), LONG(0), LONG(0)

    def step(g, s_hat):
        nonlocal m, s_bar
        m, s_bar = mu * m + g, mu**2 * s_bar + s_hat
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = s_bar / m**2
            return where_nonzero(m, m / (1 + relative))

    return step


def adam_star_mb(mu, factor="adam"):
    """Algorithm 5."""
    mu, m, s_bar = LONG(mu), LONG(0), LONG(0)

    def step(g, s_hat):
        nonlocal m, s_bar
        m, s_bar = mu * m + g, mu**2 * s_bar + s_hat
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = s_bar / m**2
            return where_nonzero(m, FACTORS[factor](relative) * np.sign(m))

    return step


def minibatch_variance(per_example_grads):
    """Eq. (44), but unbiased as its text says: the second term needs the factor B/(B − 1)."""
    g = np.asarray(per_example_grads, LONG)
    size = len(g)
    return (np.sum(g**2, 0) / (size - 1) - size / LONG(size - 1) * np.mean(g, 0) ** 2) / size


BOXES = {
    "ssd": ssd,
    "m_ssd": m_ssd,
    "svag": svag,
    "m_svag": m_svag,
    "m_svag_mb": m_svag_mb,
    "adam_star": adam_star,
    "adam_star_mb": adam_star_mb,
    "adam_sign": adam_sign,
}


# --- what must not pass ----------------------------------------------------------------------


def _m_svag_from(moments):
    def box(mu, **_):
        mu, m_raw, v_raw, t = LONG(mu), LONG(0), LONG(0), 0

        def step(g, _):
            nonlocal m_raw, v_raw, t
            t += 1
            m_raw = mu * m_raw + (1 - mu) * g
            v_raw = mu * v_raw + (1 - mu) * g**2
            m, v, rho = moments(m_raw, v_raw, mu, t)
            return m**3 / (m**2 + rho * np.maximum(v - m**2, 0))

        return step

    return box


def _two_decays(mu, **_):
    """v averaged with another β, as in Adam's defaults."""
    mu, beta2, m_raw, v_raw, t = LONG(mu), LONG(0.999), LONG(0), LONG(0), 0

    def step(g, _):
        nonlocal m_raw, v_raw, t
        t += 1
        m_raw = mu * m_raw + (1 - mu) * g
        v_raw = beta2 * v_raw + (1 - beta2) * g**2
        m, v = m_raw / (1 - mu**t), v_raw / (1 - beta2**t)
        return m**3 / (m**2 + kappa(mu, t) * np.maximum(v - m**2, 0))

    return step


def _printed_sum(mu, t):
    """Eq. (18) taken literally has t + 1 terms; Eqs. (46) and (47) have t."""
    return kappa(mu, t + 1)


WRONG_PORTS = {
    "divides by μᵗ": _m_svag_from(lambda m, v, mu, t: (m / mu**t, v / mu**t, kappa(mu, t))),
    "v corrected with another β": _m_svag_from(
        lambda m, v, mu, t: (m / (1 - mu**t), v / (1 - LONG(0.999) ** t), kappa(mu, t))
    ),
    "v averaged with another β": _two_decays,
    "no bias correction": _m_svag_from(lambda m, v, mu, t: (m, v, kappa(mu, t))),
    "t from 0": _m_svag_from(
        lambda m, v, mu, t: (m / (1 - mu ** (t + 1)), v / (1 - mu ** (t + 1)), kappa(mu, t))
    ),
    "κ forgotten": _m_svag_from(lambda m, v, mu, t: (m / (1 - mu**t), v / (1 - mu**t), 1)),
    "κ at t → ∞": _m_svag_from(
        lambda m, v, mu, t: (m / (1 - mu**t), v / (1 - mu**t), (1 - mu) / (1 + mu))
    ),
    "κ of t + 1 terms": _m_svag_from(
        lambda m, v, mu, t: (m / (1 - mu**t), v / (1 - mu**t), _printed_sum(mu, t))
    ),
    "unbiased instead of the box": lambda mu, **_: m_svag(mu, variance="unbiased"),
    "γ on the gradient": lambda mu, **_: svag(mu),
}

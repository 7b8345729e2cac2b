"""Figure 5: the variance adaptation factors as functions of the relative standard deviation."""

from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import scipy.special
from matplotlib.figure import Figure

from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce.dissecting_scales import scale_of

Array = npt.NDArray[Any]


def magnitude_factor(eta: Array) -> Array:
    """(1 + η²)⁻¹, optimal for a gradient, eq. 16."""
    return np.asarray(1 / (1 + eta**2))


def sign_factor(eta: Array) -> Array:
    """erf(1/(√2 η)), optimal for the sign of a Gaussian gradient, eq. 15."""
    return np.asarray(scipy.special.erf(1 / (np.sqrt(2) * eta)))


def adam_factor(eta: Array) -> Array:
    """(1 + η²)^(−1/2), Adam's, eq. 6."""
    return np.asarray((1 + eta**2) ** -0.5)


FACTORS = {
    "(1 + η²)⁻¹: optimal for the gradient": magnitude_factor,
    "erf(1/(√2 η)): optimal for its sign": sign_factor,
    "(1 + η²)^(−½): Adam's": adam_factor,
}


def simulated_factors(eta: float, samples: int, seed: int = 0) -> tuple[float, float]:
    """Minimisers over γ of Lemma 1's distances, for p̂ ~ N(1, η²): of p̂ and of its sign.

    Both distances are parabolas in γ, E[p̂²]γ² − 2E[p̂]γ + 1, here with sample means.
    """
    drawn = 1 + eta * np.random.default_rng(seed).standard_normal(samples)
    return float(drawn.mean() / np.mean(drawn**2)), float(np.sign(drawn).mean())


def figure5(settings: Settings, progress: Progress) -> Result:
    """Figure 5, with Lemma 1 simulated beside the formulas."""
    samples = 10 * scale_of(settings).samples
    eta = np.logspace(-2, 2, 401)
    curves = {name: factor(eta) for name, factor in FACTORS.items()}
    tried = np.array([0.1, 0.3, 0.5, 1.0, 2.0, 3.0])
    simulated = np.array([simulated_factors(float(x), samples) for x in tried])
    progress(0.9)
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(eta, curves, tried, simulated)
    names = ("magnitude", "sign", "adam")
    rows = [
        {"eta": float(f"{x:.6g}"), **{k: float(f"{v:.6g}") for k, v in zip(names, at, strict=True)}}
        for x, *at in zip(eta, *curves.values(), strict=True)
    ]
    return Result(
        title="Figure 5: variance adaptation factors",
        text=(
            "γ against η = σ/|∇L|. Circles: the factors that minimise Lemma 1's expected distances "
            f"in {samples:,} samples of N(1, η²). This figure is the same at both scales."
        ),
        figure=drawn,
        rows=rows,
        findings=_findings(tried, simulated, samples),
    )


def _draw(eta: Array, curves: dict[str, Array], tried: Array, simulated: Array) -> Figure:
    figure = Figure(figsize=(10.5, 3.8))
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        for index, (name, values) in enumerate(curves.items()):
            axis.plot(eta, values, label=name, **plots.look(index))
        for column in range(2):
            axis.plot(tried, simulated[:, column], "o", fillstyle="none", markersize=6,
                      color=plots.look(column)["color"])  # fmt: skip
        axis.set(xlabel="η")
    left.set(xlim=(0, 4), ylabel="γ", title="as in the paper")
    right.set(xscale="log", yscale="log", ylim=(1e-4, 1.5), title="the tails")
    left.legend()
    return figure


def _findings(tried: Array, simulated: Array, samples: int) -> list[Finding]:
    fine = np.logspace(-3, 3, 200_001)
    apart = adam_factor(fine) - sign_factor(fine)
    largest = int(np.argmax(np.abs(apart)))
    tail = float(sign_factor(np.array([1e4]))[0] / adam_factor(np.array([1e4]))[0])
    exact = np.stack([magnitude_factor(tried), sign_factor(tried)], axis=-1)
    # γ is at most a mean of signs or of p̂ over E[p̂²]: its deviation is below 2η/√n and 1/√n.
    error = np.stack([2 * tried, np.ones_like(tried)], axis=-1) / np.sqrt(samples)
    off = np.abs(simulated - exact)
    return [
        Finding(
            "Lemma 1: the factors minimise the expected distances",
            "(1 + η²)⁻¹ and erf(1/(√2 η))",
            f"simulated minimisers differ by at most {off.max():.4f}",
            verdict(bool(np.all(off < 4 * error))),
        ),
        Finding(
            "Adam's factor closely approximates the optimal one of the sign",
            "closely; no number",
            f"largest difference {apart[largest]:+.4f} at η = {fine[largest]:.2f}; optimal over "
            f"Adam's → {tail:.3f} = √(2/π) for large η",
            "holds to 0.1" if np.abs(apart).max() < 0.1 else "does not hold to 0.1",
        ),
    ]

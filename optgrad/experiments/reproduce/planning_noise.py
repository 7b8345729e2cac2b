"""What the paper has not: minibatch noise, on streaming least squares."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_quadratics as beyond
from optgrad.experiments.reproduce import planning_runs as lib

_BATCHES = (1, 20)
_NOISE_RATES = (0.02, 0.1)
_FEATURES = 20
_LABEL_NOISE = 0.5
_FIRST_EXCESS = 1.03


def noise(settings: Settings, progress: Progress) -> Result:
    """Streaming least squares: plans fitted to minibatch gradients."""
    seeds, steps = (2, 60) if settings.quick else (10, 5000)
    factors, optima = _least_squares(seeds)
    each = (np.arange(seeds), factors, optima)
    data = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * len(_NOISE_RATES)), each)
    rows: list[dict[str, Any]] = []
    chosen = beyond.optimizers()
    for i, batch in enumerate(_BATCHES):
        for j, ((name, verify), (method, fixed)) in enumerate(chosen.items()):
            runs = lib.follow(
                _minibatch_loss(batch), method, np.zeros((seeds * len(_NOISE_RATES), _FEATURES)),
                steps, data=data, fixed=fixed, observe=_excess,
                swept={"learning_rate": np.repeat(_NOISE_RATES, seeds)},
            )  # fmt: skip
            for k, rate in enumerate(_NOISE_RATES):
                mine = slice(k * seeds, (k + 1) * seeds)
                # The mean over the last tenth, as a single iterate is noisy.
                with np.errstate(over="ignore"):
                    late = runs.observed[mine][:, -max(steps // 10, 1) :].mean(axis=1)
                found = beyond.summary(late, runs.observed[mine][:, 0], runs.rejected[mine, -1])
                rows.append({"method": name, "verify": verify, "batch": batch,
                             "learning_rate": rate, **found})  # fmt: skip
            progress((i + (j + 1) / len(chosen)) / len(_BATCHES))
    columns, lines = beyond.by_setting(rows, ("batch", "learning_rate"))
    with mpl.rc_context(plots.STYLE):
        drawn = beyond.draw(
            rows, ("batch", "learning_rate", "γ"), [f"batches of {b}" for b in _BATCHES]
        )
    return Result(
        title="Beyond the paper: minibatch noise",
        text=(
            f"Streaming least squares of {_FEATURES} features, covariance as the rotated "
            f"quadratics' (condition {beyond.CONDITION:g}, L = 1), label noise N(0, "
            f"{_LABEL_NOISE}²), f(0) − f* = {_FIRST_EXCESS}; {steps:,} fresh minibatches, {seeds} "
            "seeds, float32. The expected excess loss, mean over the last tenth of the run. The "
            "loss by which plans are verified is that of the minibatch at hand, each time another "
            "one."
        ),
        figure=drawn,
        rows=rows,
        tables=[(("method", *(f"batch {b}, γ {g:g}" for b, g in columns)), lines)],
        findings=_noise_findings(rows),
    )


def _least_squares(seeds: int) -> tuple[Any, Any]:
    """Factors F of the features' covariances FᵀF and the optimal parameters (seeds, d)."""
    factors, optima = beyond.random_quadratics(_FEATURES, seeds)
    excess = 0.5 * np.sum(np.einsum("sij,sj->si", factors, optima) ** 2, axis=-1)
    return factors, optima * np.sqrt(_FIRST_EXCESS / excess)[:, None]


def _minibatch_loss(batch: int) -> lib.Loss:
    """The mean of ½(xᵀw − y)² over fresh examples, a function of key and step."""

    def loss(params: Any, data: Any, count: Any) -> Any:
        seed, factor, optimum = data
        key = jax.random.fold_in(jax.random.key(seed), count)
        normal = jax.random.normal(key, (batch, _FEATURES + 1), params.dtype)
        features = normal[:, :-1] @ factor
        residual = features @ (params - optimum) - _LABEL_NOISE * normal[:, -1]
        return 0.5 * jnp.mean(residual**2)

    return loss


def _excess(params: Any, data: Any) -> Any:
    """The expected f − f*."""
    _, factor, optimum = data
    return beyond.quadratic(params - optimum, factor, None)


def _noise_findings(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = {(r["method"], r["verify"], r["batch"], r["learning_rate"]): r for r in rows}
    verified = [r for r in rows if r["verify"]]
    cells = [(b, g) for b in _BATCHES for g in _NOISE_RATES]
    lost = [found["K2", False, b, g]["diverged"] for b, g in cells]
    findings = [
        Finding(
            "K2 without verification converges",
            "specification: it diverges always",
            f"runs lost of {rows[0]['runs']}: "
            + ", ".join(f"b {b}, γ {g:g}: {n}" for (b, g), n in zip(cells, lost, strict=True)),
            verdict(not any(lost)),
        ),
        Finding(
            "Repeated planning under noise",
            "specification: diverges or equals SGD",
            "p5 K10, excess over SGD's: "
            + ", ".join(
                f"b {b}, γ {g:g}: "
                + _ratio(found["p5 K10", False, b, g], found["SGD", False, b, g])
                for b, g in cells
            ),
            "no gain",
        ),
        Finding(
            "With verification by the minibatch's loss no run is lost",
            "specification: untested",
            f"{sum(r['diverged'] for r in verified)} of {sum(r['runs'] for r in verified)} lost "
            f"({', '.join(dict.fromkeys(r['method'] for r in verified if r['diverged'])) or '—'}); "
            f"plans taken back per run {min(r['rejected_per_run'] for r in verified):.0f} … "
            f"{max(r['rejected_per_run'] for r in verified):.0f}",
            verdict(not any(r["diverged"] for r in verified)),
        ),
    ]  # fmt: skip
    for b, g in cells:
        sgd = found["SGD", False, b, g]["excess"]
        stable = [r for r in rows if (r["batch"], r["learning_rate"]) == (b, g)
                  and r["method"] in beyond.planning_methods() and not r["diverged"]]  # fmt: skip
        best = min(stable, key=lambda r: r["excess"])
        findings.append(
            Finding(
                f"Batches of {b}, γ = {g:g}: best planning without lost runs",
                "specification: at best 2 … 2.6 times, and only where γ is far too small",
                f"{beyond.text(best['method'], best['verify'])} {best['excess']:.2g}, SGD "
                f"{sgd:.2g}",
                f"{sgd / best['excess']:.2f} times better"
                if best["excess"] < sgd
                else f"{best['excess'] / sgd:.2f} times worse",
            )
        )
    return findings


def _ratio(row: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Of the excesses; how many runs are lost where some are."""
    if row["diverged"]:
        return f"{row['diverged']} lost"
    return f"{row['excess'] / reference['excess']:.2g} ×"

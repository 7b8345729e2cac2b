"""The figures of `online_parabola` that need a network: curvature and subspace in training."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import optgrad
from optgrad.experiments import plots
from optgrad.experiments.reproduce import (
    Finding,
    Progress,
    Result,
    Settings,
    digits_network,
    ratio_verdict,
    verdict,
)

_BATCH = 64
_NETWORK = "64-32-10 tanh network on scikit-learn's digits, batches of 64"

# Curvature along the direction ------------------------------------------------------------------

# (β, γ) and the specification's mean λ̂ and mean true curvature.
_CURVATURE = {(0.9, 0.9): (0.60, 0.38), (0.9, 0.99): (0.02, 0.033), (0.99, 0.9): (0.03, 0.37)}
_FIXED = {"eta": 0.1, "alpha": 0.5, "epsilon": 0.3}
_WARMUP = 20  # twice ogr1dc's m: before, there is no model


def curvature(settings: Settings, progress: Progress) -> Result:
    """Estimated λ along v̂ against the true v̂ᵀHv̂, step by step."""
    steps, seeds = (40, 2) if settings.quick else (800, 4)
    examples = digits_network.load_digits(settings.data_dir)
    pairs = jnp.array(list(_CURVATURE))
    keys = jax.random.split(jax.random.key(0), seeds)

    def run(setting: chex.Array, key: chex.PRNGKey) -> Any:
        optimizer = optgrad.create("ogr1dc", beta=setting[0], gamma=setting[1], **_FIXED)
        init_key, batch_key = jax.random.split(key)
        params = digits_network.init_params(init_key)
        rows = digits_network.minibatches(batch_key, len(examples.labels), steps, _BATCH)

        def record(state: Any, params: Any) -> Any:
            true = digits_network.curvature_along(params, state.direction, examples)
            return optgrad.diagnostics(state)["curvature"], true

        carry = params, optimizer.init(params)
        return digits_network.train(optimizer, carry, examples, rows, record)[1]

    over_seeds = jax.jit(jax.vmap(run, in_axes=(None, 0)))
    found = []
    for index, pair in enumerate(pairs):
        found.append(jax.tree.map(np.asarray, over_seeds(pair, keys)))
        progress((index + 1) / len(pairs))
    losses = [losses for losses, _ in found]
    estimated = [values[0][:, _WARMUP:] for _, values in found]
    true = [values[1][:, _WARMUP:] for _, values in found]
    summary = [
        {"beta": b, "gamma": g, **_compare(e, t), "final_loss": float(np.mean(x[:, -25:]))}
        for (b, g), e, t, x in zip(_CURVATURE, estimated, true, losses, strict=True)
    ]
    with mpl.rc_context(plots.STYLE):
        figure = _draw_curvature(estimated, true)
    stride = max(1, (steps - _WARMUP) // 100)
    rows = [
        {"beta": b, "gamma": g, "seed": seed, "step": _WARMUP + k + 1,
         "estimated": float(f"{e[seed, k]:.5g}"), "true": float(f"{t[seed, k]:.5g}")}
        for (b, g), e, t in zip(_CURVATURE, estimated, true, strict=True)
        for seed in range(seeds)
        for k in range(0, e.shape[1], stride)
    ]  # fmt: skip
    header = ("β, γ", "mean λ", "mean v̂ᵀHv̂", "λ too small by", "rank correlation",
              "share of λ < 0", "share of v̂ᵀHv̂ < 0", "training loss")  # fmt: skip
    table = [
        [f"{s['beta']:g}, {s['gamma']:g}", f"{s['estimated']:.3f}", f"{s['true']:.3f}",
         f"{s['true'] / s['estimated']:.2g} ×", f"{s['correlation']:.2f}",
         f"{100 * s['negative']:.1f} %", f"{100 * s['truly_negative']:.1f} %",
         f"{s['final_loss']:.4f}"]
        for s in summary
    ]  # fmt: skip
    return Result(
        title="Curvature: λ from the averages against v̂ᵀHv̂",
        text=(
            f"`ogr1dc` (η {_FIXED['eta']:g}, α {_FIXED['alpha']:g}, ε {_FIXED['epsilon']:g}) on a "
            f"{_NETWORK}, {steps} steps, {seeds} seeds. λ is read by `optgrad.diagnostics` at "
            "every step; the true curvature is that of the whole training loss along the same "
            "direction (one product with the Hessian). Rank correlation over steps after the "
            "warm-up, mean over seeds. Top: running medians over 21 steps, of seed 0; bottom: all "
            "steps of all seeds."
        ),
        figure=figure,
        rows=rows,
        tables=[(header, table)],
        findings=_curvature_findings(summary),
    )


def _compare(estimated: Any, true: Any) -> dict[str, float]:
    """Means, rank correlation and shares of negative values of arrays (seeds, steps)."""
    correlations = [_rank_correlation(e, t) for e, t in zip(estimated, true, strict=True)]
    return {
        "estimated": float(np.mean(estimated)),
        "true": float(np.mean(true)),
        "correlation": float(np.mean(correlations)),
        "negative": float(np.mean(estimated < 0)),
        "truly_negative": float(np.mean(true < 0)),
    }


def _rank_correlation(x: Any, y: Any) -> float:
    """Spearman's, of values without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _draw_curvature(estimated: Sequence[Any], true: Sequence[Any]) -> Figure:
    figure = Figure(figsize=(12, 7))
    axes = figure.subplots(2, len(estimated), sharey="row")
    for column, (beta, gamma) in enumerate(_CURVATURE):
        above, below = axes[:, column]
        steps = _WARMUP + 1 + np.arange(estimated[column].shape[1])
        above.plot(steps, _running_median(true[column][0]), color="0.3", linewidth=2,
                   label="true v̂ᵀHv̂")  # fmt: skip
        above.plot(steps, _running_median(estimated[column][0]), color=plots.COLOURS[1],
                   linewidth=1.3, label="estimated λ")  # fmt: skip
        above.set_yscale("log", nonpositive="mask")
        above.set(xlabel="step", ylabel="curvature", title=f"β {beta:g}, γ {gamma:g}")
        x, y = true[column].ravel(), estimated[column].ravel()
        shown = (x > 0) & (y > 0)
        below.plot(x[shown], y[shown], ".", color=plots.COLOURS[0], markersize=2, alpha=0.35,
                   rasterized=True)  # fmt: skip
        if shown.any():
            ends = np.array([x[shown].min(), x[shown].max()])
            below.plot(ends, ends, color="0.3", linewidth=1, linestyle="--", label="λ = v̂ᵀHv̂")
            below.legend(fontsize=8, loc="lower right")
        below.set(xscale="log", yscale="log", xlabel="true v̂ᵀHv̂", ylabel="estimated λ > 0")
    axes[0, 0].set_ylim(3e-4, 3)
    axes[1, 0].set_ylim(3e-4, 10)
    axes[0, 0].legend(fontsize=8)
    return figure


def _running_median(values: Any, width: int = 21) -> Any:
    half = width // 2
    padded = np.pad(values, half, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _curvature_findings(summary: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for s in summary:
        estimated, true = _CURVATURE[s["beta"], s["gamma"]]
        measured = s["estimated"] / s["true"]
        findings.append(
            Finding(
                f"β {s['beta']:g}, γ {s['gamma']:g}: mean λ and mean v̂ᵀHv̂",
                f"{estimated:g} and {true:g} (ratio {estimated / true:.2f})",
                f"{s['estimated']:.3f} and {s['true']:.3f} (ratio {measured:.2f})",
                f"ratio: {ratio_verdict(measured, estimated / true, 2.0)}",
            )
        )
    correlations = [s["correlation"] for s in summary]
    shares = [s["negative"] for s in summary]
    return [
        *findings,
        Finding(
            "λ follows the true curvature only loosely (rank correlation)",
            "0.1 … 0.5",
            f"{min(correlations):.2f} … {max(correlations):.2f}",
            verdict(min(correlations) >= 0.1 and max(correlations) <= 0.5),
        ),
        Finding(
            "λ < 0 is rare along the direction of the momentum (Section II.C)",
            "rare; specification: 0 … 6 % of the steps",
            f"{100 * min(shares):.1f} … {100 * max(shares):.1f} %",
            f"holds for {sum(share <= 0.06 for share in shares)} of {len(shares)} settings",
        ),
        Finding(
            "The true curvature along it is never negative",
            "never in the samples",
            f"{100 * max(s['truly_negative'] for s in summary):.2f} % of the steps at most",
            verdict(all(s["truly_negative"] == 0 for s in summary)),
        ),
    ]


# Gradients and the top eigenspace ---------------------------------------------------------------

_BASES = ("pca", "push")
_TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd 0.1": ("sgd", {"learning_rate": 0.1}),
    "sgd 0.3": ("sgd", {"learning_rate": 0.3}),
    "sgd 1": ("sgd", {"learning_rate": 1.0}),
    "pca": ("ogr_subspace", {"eta": 0.1, "d": 10, "basis": "pca"}),
    "push": ("ogr_subspace", {"eta": 0.1, "d": 10, "basis": "push"}),
}
_SGD = tuple(name for name, (method, _) in _TRAININGS.items() if method == "sgd")
_K = 10
_CHUNK = 10  # steps of one call, so that one compilation serves all intervals
_ENERGY = {20: 0.27, 100: 0.55, 400: 0.86}  # specification: share of ‖∇F‖² in the top 10
_OVERLAP = {
    "pca": {20: 0.55, 100: 0.73, 400: 0.79}, "push": {20: 0.01, 100: 0.01, 400: 0.03},
}  # fmt: skip


def subspace(settings: Settings, progress: Progress) -> Result:
    """Gradient energy in the top-10 Hessian eigenspace, and how much of it the basis finds."""
    at = (10, 20, 40) if settings.quick else (20, 50, 100, 200, 400, 800)
    seeds = 1 if settings.quick else 3
    examples = digits_network.load_digits(settings.data_dir)
    rows: list[dict[str, Any]] = []
    for i, (training, (method, hyperparams)) in enumerate(_TRAININGS.items()):
        optimizer = optgrad.create(method, **hyperparams)
        advance = jax.jit(functools.partial(_advance, optimizer, examples))
        for seed in range(seeds):
            init_key, batch_key = jax.random.split(jax.random.key(seed))
            params = digits_network.init_params(init_key)
            carry = params, optimizer.init(params)
            batches = digits_network.minibatches(batch_key, len(examples.labels), at[-1], _BATCH)
            before = 0
            for step in at:
                for first in range(before, step, _CHUNK):
                    carry, mean_loss = advance(carry, batches[first : first + _CHUNK])
                space = digits_network.leading_eigenspace(carry[0], examples, _K)
                basis = getattr(carry[1], "basis", None)
                rows.append({"training": training, "seed": seed, "step": step,
                             **_energies(space, basis), "loss": float(mean_loss)})  # fmt: skip
                before = step
                done = seed + step / at[-1]
                progress((i + done / seeds) / len(_TRAININGS))
    with mpl.rc_context(plots.STYLE):
        figure = _draw_subspace(rows, at)
    header = ("step", "‖∇F‖² in the top 10: SGD 0.1", "SGD 0.3", "SGD 1", "pca", "push",
              "overlap of the basis: pca", "push", "‖∇F‖² in the basis: pca", "push")  # fmt: skip
    table = [
        [str(step)]
        + [f"{100 * _mean(rows, b, step, 'energy_top'):.0f} %" for b in _TRAININGS]
        + [f"{_mean(rows, b, step, 'overlap'):.2f}" for b in _BASES]
        + [f"{100 * _mean(rows, b, step, 'energy_basis'):.0f} %" for b in _BASES]
        for step in at
    ]
    return Result(
        title="Subspace: gradients and the top eigenspace of the Hessian",
        text=(
            f"A {_NETWORK}, {seeds} seed(s), trained by SGD at three rates (how the specification "
            "trained is not recorded, and it matters) and by `ogr_subspace` with "
            f"{_K} directions (η 0.1, both bases, the rest at its default). The gradient is that "
            "of the whole training loss, the eigenspace that of its ten largest Hessian "
            "eigenvalues (Lanczos); the overlap of the modelled basis V with it is ‖VU‖²/10, 1 for "
            "the same space and 0.004 for a random one."
        ),
        figure=figure,
        rows=rows,
        tables=[(header, table)],
        findings=_subspace_findings(rows, at),
    )


def _advance(optimizer: Any, examples: Any, carry: Any, rows: chex.Array) -> tuple[Any, chex.Array]:
    """Trains on some minibatches; returns their mean loss too."""
    carry, (losses, _) = digits_network.train(
        optimizer, carry, examples, rows, lambda state, params: None
    )
    return carry, jnp.mean(losses)


def _energies(space: digits_network.Eigenspace, basis: Any) -> dict[str, float | None]:
    """Shares of the squared gradient, and the overlap; None where there is no basis."""
    square = float(space.gradient @ space.gradient)
    found: dict[str, float | None] = {
        "energy_top": float(np.sum((space.vectors.T @ space.gradient) ** 2)) / square,
        "energy_basis": None,
        "overlap": None,
        "largest_eigenvalue": float(space.values[-1]),
        "tenth_eigenvalue": float(space.values[0]),
    }
    if basis is not None:
        span = digits_network.orthonormal_span(basis.rows, _K)
        found["energy_basis"] = float(np.sum((span.T @ space.gradient) ** 2)) / square
        found["overlap"] = float(np.sum((span.T @ space.vectors) ** 2)) / _K
    return found


def _mean(rows: Sequence[Mapping[str, Any]], training: str, step: int, key: str) -> float:
    """Over seeds."""
    found = [r[key] for r in rows if r["training"] == training and r["step"] == step]
    return float(np.mean(found))


def _draw_subspace(rows: Sequence[Mapping[str, Any]], at: Sequence[int]) -> Figure:
    figure = Figure(figsize=(12, 4))
    panels = (
        ("energy_top", "‖∇F‖² in the top-10 eigenspace, share"),
        ("overlap", "overlap of the basis with it"),
        ("energy_basis", "‖∇F‖² in the modelled basis, share"),
    )
    for axis, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for index, training in enumerate((*_BASES, *_SGD) if key == "energy_top" else _BASES):
            name = f"ogr_subspace, {training}" if training in _BASES else training.upper()
            mean = [_mean(rows, training, step, key) for step in at]
            axis.plot(at, mean, marker="o", markersize=4, label=name, **plots.look(index))
            for seed in {r["seed"] for r in rows}:
                mine = [r for r in rows if r["training"] == training and r["seed"] == seed]
                axis.plot(at, [r[key] for r in mine], color=plots.look(index)["color"],
                          linewidth=0.6, alpha=0.5)  # fmt: skip
        axis.set(xscale="log", ylim=(-0.02, 1.02), xlabel="step", title=title)
        axis.set_xticks(at, [str(step) for step in at], minor=False)
        axis.minorticks_off()
    first, second, third = figure.axes
    first.plot(list(_ENERGY), list(_ENERGY.values()), "x", color="black", markersize=8,
               label="specification")  # fmt: skip
    for index, basis in enumerate(_BASES):
        second.plot(list(_OVERLAP[basis]), list(_OVERLAP[basis].values()), "x", markersize=8,
                    color=plots.look(index)["color"], label=f"specification, {basis}")  # fmt: skip
    third.legend(*first.get_legend_handles_labels(), fontsize=8, loc="upper right")
    second.legend(fontsize=8)
    return figure


def _subspace_findings(rows: Sequence[Mapping[str, Any]], at: Sequence[int]) -> list[Finding]:
    findings = []
    for step in sorted(set(at) & set(_ENERGY)):
        energies = [_mean(rows, sgd, step, "energy_top") for sgd in _SGD]
        inside = min(energies) <= _ENERGY[step] <= max(energies)
        findings.append(
            Finding(
                f"Step {step} of SGD: share of ‖∇F‖² in the top 10",
                f"{100 * _ENERGY[step]:.0f} %",
                ", ".join(f"{100 * energy:.0f}" for energy in energies)
                + " % at the rates 0.1, 0.3, 1",
                f"the specification's lies {'within' if inside else 'outside'} this range",
            )
        )
        for basis in _BASES:
            overlap, reference = _mean(rows, basis, step, "overlap"), _OVERLAP[basis][step]
            findings.append(
                Finding(f"Step {step}: overlap of the {basis} basis", f"{reference:.2f}",
                        f"{overlap:.2f}", f"differs by {overlap - reference:+.2f}")
            )  # fmt: skip
    late = [_mean(rows, sgd, at[-1], "energy_top") for sgd in _SGD]
    own = _mean(rows, "pca", at[-1], "energy_top")
    found, pushed = (_mean(rows, basis, at[-1], "overlap") for basis in _BASES)
    return [
        *findings,
        Finding(
            "Gradients lie mainly in a 10-dimensional top eigenspace (Section IV.C)",
            "mainly",
            f"{100 * min(late):.0f} … {100 * max(late):.0f} % at step {at[-1]} of SGD",
            f"holds for {sum(share > 0.5 for share in late)} of {len(late)} rates",
        ),
        Finding(
            "They still do where those directions are modelled (`ogr_subspace`, pca)",
            "not stated",
            f"{100 * own:.0f} % at step {at[-1]}",
            "no less than with SGD" if own >= min(late) else "less than with SGD at any rate",
        ),
        Finding(
            "Online PCA of the gradients finds it",
            "yes",
            f"overlap {found:.2f} at step {at[-1]}",
            verdict(found > 0.5),
        ),
        Finding(
            "So does adding a little of each gradient to all vectors of the basis",
            "yes (the specification: no)",
            f"overlap {pushed:.2f} at step {at[-1]}",
            verdict(pushed > 0.5),
        ),
    ]

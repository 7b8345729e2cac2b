"""What the paper has not: rotated quadratics of 5 to 100 dimensions."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

from optgrad.experiments import landscapes, plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_runs as lib

CONDITION = 100.0
_EPISODE = {"projections": 5, "corrections": 10}
_PLANNING: dict[str, tuple[str, dict[str, Any]]] = {
    "K2": ("csawg", {"window": 2}),
    "K5": ("csawg", {"window": 5}),
    "K10": ("csawg", {"window": 10}),
    "K50": ("csawg", {"window": 50}),
    "p5 K10": ("csawg_repeated", {"window": 10, **_EPISODE}),
}
_FLOOR = 1e-30
_LOST = 1e3  # times the excess at the start


def optimizers() -> dict[tuple[str, bool], tuple[str, dict[str, Any]]]:
    """(label, whether plans are verified) -> (method, hyperparameters)."""
    found: dict[tuple[str, bool], tuple[str, dict[str, Any]]] = {
        ("SGD", False): ("sgd", {}),
        ("heavy ball .9", False): ("momentum", {"momentum": 0.9}),
    }
    for name, (method, fixed) in _PLANNING.items():
        found[name, False] = method, {**fixed, **lib.PAPER}
        found[name, True] = method, {**fixed, "verify": True}
    return found


def planning_methods() -> tuple[str, ...]:
    """The labels among them that plan."""
    return tuple(_PLANNING)


def summary(excess: Any, first: Any, rejected: Any) -> dict[str, Any]:
    """Of runs of one setting: geometric mean of the final excess, runs lost, plans taken back."""
    lost = ~(excess < _LOST * first)  # NaN is lost, too
    kept = np.clip(np.where(lost, _LOST * first, excess), _FLOOR, None)
    return {
        "runs": len(excess),
        "diverged": int(lost.sum()),
        "excess": float(f"{landscapes.geometric_mean(kept):.4g}"),
        "rejected_per_run": float(f"{np.mean(rejected):.4g}"),
    }


def text(name: str, verify: bool) -> str:
    """The label of an optimizer."""
    return f"{name}, verified" if verify else name


def _cell(row: Mapping[str, Any]) -> str:
    lost = f", {row['diverged']} of {row['runs']} lost" if row["diverged"] else ""
    return f"{row['excess']:.1e}{lost}"


def by_setting(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Any:
    """Table: a line for each optimizer, a column for each setting."""
    settings = list(dict.fromkeys(tuple(r[k] for k in keys) for r in rows))
    lines = []
    for name, verify in dict.fromkeys((r["method"], r["verify"]) for r in rows):
        mine = {
            tuple(r[k] for k in keys): r
            for r in rows
            if (r["method"], r["verify"]) == (name, verify)
        }
        lines.append([text(name, verify), *(_cell(mine[s]) for s in settings)])
    return settings, lines


def draw(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], titles: Sequence[str]) -> Any:
    """Final excess by optimizer, a panel for each value of the first key."""
    panels = list(dict.fromkeys(r[keys[0]] for r in rows))
    figure = lib.figure(13, 4.2)
    names = list(dict.fromkeys((r["method"], r["verify"]) for r in rows))
    values = list(dict.fromkeys(r[keys[1]] for r in rows))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, panel, title in zip(axes, panels, titles, strict=True):
        for index, value in enumerate(values):
            mine = {
                (r["method"], r["verify"]): r
                for r in rows
                if (r[keys[0]], r[keys[1]]) == (panel, value)
            }
            heights = [mine[n]["excess"] for n in names]
            offset = 0.2 * (index - (len(values) - 1) / 2)
            axis.plot(np.arange(len(names)) + offset, heights, "o", color=plots.COLOURS[index],
                      markersize=5, label=f"{keys[2]} = {value:g}")  # fmt: skip
            lost = [i for i, n in enumerate(names) if mine[n]["diverged"]]
            axis.plot(np.array(lost) + offset, [heights[i] for i in lost], "x", color="black",
                      markersize=7)  # fmt: skip
        axis.plot([], [], "x", color="black", markersize=7, label="some runs lost")
        axis.set_xticks(range(len(names)), [text(*n) for n in names], rotation=60, ha="right",
                        fontsize=8)  # fmt: skip
        axis.set(yscale="log", title=title)
    axes[0].set_ylabel("final excess f − f*, geometric mean")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


_GAMMA_L = (0.1, 0.5, 0.9)
_SEEDS = {5: 20, 20: 20, 100: 10}  # by dimension


def quadratics(settings: Settings, progress: Progress) -> Result:
    """Deterministic quadratics of condition 100 in random directions."""
    steps = 60 if settings.quick else 2000
    dimensions = (5,) if settings.quick else tuple(_SEEDS)
    rows: list[dict[str, Any]] = []
    chosen = optimizers()
    for i, d in enumerate(dimensions):
        seeds = 2 if settings.quick else _SEEDS[d]
        factors, starts = random_quadratics(d, seeds)
        data = np.tile(factors, (len(_GAMMA_L), 1, 1))
        swept = {"learning_rate": np.repeat(_GAMMA_L, seeds)}  # L = 1
        for j, ((name, verify), (method, fixed)) in enumerate(chosen.items()):
            with lib.double_precision():
                runs = lib.follow(
                    quadratic, method, np.tile(starts, (len(_GAMMA_L), 1)), steps,
                    data=jnp.asarray(data), fixed=fixed, swept=swept,
                    observe=lambda params, factor: quadratic(params, factor, None),
                )  # fmt: skip
            for k, gamma in enumerate(_GAMMA_L):
                mine = slice(k * seeds, (k + 1) * seeds)
                excess = runs.observed[mine]
                found = summary(excess[:, -1], excess[:, 0], runs.rejected[mine, -1])
                found["evaluations_to_1e-10"] = _median_time(excess)
                rows.append({"method": name, "verify": verify, "d": d, "gamma_l": gamma, **found})
            progress((i + (j + 1) / len(chosen)) / len(dimensions))
    columns, lines = by_setting(rows, ("d", "gamma_l"))
    with mpl.rc_context(plots.STYLE):
        drawn = draw(rows, ("d", "gamma_l", "γL"), [f"d = {d}" for d in dimensions])
    return Result(
        title="Beyond the paper: rotated quadratics",
        text=(
            "f = ½wᵀHw with a random rotation and eigenvalues spread logarithmically from "
            f"1/{CONDITION:g} to L = 1, 20 of each (10 of d = 100), from N(0, 1) starts, "
            f"{steps:,} gradient evaluations, float64. Csawg as printed and with verification (the "
            "library's default). Geometric mean of the final f, floor 1e-30; a run that ends above "
            "1000 times its first loss is lost and counts as that."
        ),
        figure=drawn,
        rows=rows,
        tables=[(("method", *(f"d {d}, γL {g:g}" for d, g in columns)), lines)],
        findings=_quadratic_findings(rows, dimensions),
    )


def _median_time(excess: Any) -> float | None:
    """Evaluations until the excess is 1e-10 of the first: the median run's, None if it never is."""
    reached = excess <= 1e-10 * excess[:, :1]
    times = np.sort(np.where(reached.any(axis=1), reached.argmax(axis=1), np.inf))
    middle = times[(len(times) - 1) // 2]
    return int(middle) if np.isfinite(middle) else None


def quadratic(params: Any, factor: Any, count: Any) -> Any:
    """½‖Fw‖², which is never negative, with Hessian FᵀF."""
    del count
    return 0.5 * jnp.sum((factor @ params) ** 2)


def random_quadratics(d: int, seeds: int) -> tuple[Any, Any]:
    """Factors F (seeds, d, d) of the Hessians FᵀF, and starts (seeds, d)."""
    generator = np.random.default_rng(d)
    values = np.geomspace(1 / CONDITION, 1.0, d)
    rotations = np.linalg.qr(generator.normal(size=(seeds, d, d)))[0]
    return np.sqrt(values)[:, None] * rotations, generator.normal(size=(seeds, d))


def _quadratic_findings(
    rows: Sequence[Mapping[str, Any]], dimensions: Sequence[int]
) -> list[Finding]:
    found = {(r["method"], r["verify"], r["d"], r["gamma_l"]): r for r in rows}
    verified = [r for r in rows if r["verify"]]
    plain = [found[r["method"], False, r["d"], r["gamma_l"]] for r in verified]

    def lost(name: str) -> str:
        return "lost at γL = .1/.5/.9: " + "; ".join(
            f"d {d}: "
            + lib.listed([found[name, False, d, g]["diverged"] for g in _GAMMA_L], str)
            + f" of {found[name, False, d, 0.1]['runs']}"
            for d in dimensions
        )

    findings = [
        Finding(
            f"{name} without verification converges",
            reference,
            lost(name),
            verdict(
                not any(found[name, False, d, g]["diverged"] for d in dimensions for g in _GAMMA_L)
            ),
        )
        for name, reference in (
            ("p5 K10", "paper: “guaranteeing convergence”; specification: all lost, d = 5 and 20"),
            ("K2", "specification, d = 20: 20/0…2/0…2 lost"),
            ("K5", "specification, γL = .1: 3 (d = 5) and 8 (d = 20) lost, else none"),
            ("K10", "specification: none lost, d = 5 and 20"),
            ("K50", "specification: none lost, d = 5 and 20"),
        )
    ]
    findings.append(
        Finding(
            "With verification no run is lost",
            "specification: 0 of 360",
            f"{sum(r['diverged'] for r in verified)} of {sum(r['runs'] for r in verified)}; "
            f"without it {sum(r['diverged'] for r in plain)}",
            verdict(not any(r["diverged"] for r in verified)),
        )
    )
    d, gamma = max(x for x in dimensions if x <= 20), 0.9
    descent = found["SGD", False, d, gamma]["excess"]
    findings.append(
        Finding(
            f"Stable single planning accelerates (d = {d}, γL = .9)",
            "specification: GD 3e-9, K5 1e-23, K10 4e-22, K50 5e-15",
            f"GD {descent:.0e}, "
            + ", ".join(
                f"{k} {found[k, False, d, gamma]['excess']:.0e}" for k in ("K5", "K10", "K50")
            ),
            verdict(
                all(found[k, False, d, gamma]["excess"] < descent for k in ("K5", "K10", "K50"))
            ),
        )
    )
    for d in dimensions:
        times = {
            (r["method"], r["verify"]): r["evaluations_to_1e-10"] or np.inf
            for r in rows
            if r["d"] == d and r["gamma_l"] == gamma
        }
        ball = times["heavy ball .9", False]
        best = min((key for key in times if key[0] in _PLANNING), key=lambda key: times[key])
        findings.append(
            Finding(
                f"d = {d}, γL = .9: planning is ahead of heavy ball (p = .9)",
                "not in the paper",
                f"evaluations to 1e-10 of the first loss: {text(*best)} {times[best]:g}, heavy "
                f"ball {ball:g}, GD {times['SGD', False]:g}",
                verdict(times[best] < ball),
            )
        )
    return findings

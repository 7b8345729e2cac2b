"""Figures 3 and 4: a convex quadratic, f = ½wᵀQw with Q = diag(1000, 1)."""

import functools
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from optgrad.experiments import functions, plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_runs as lib

_Q = functions.YAO_CURVATURES
_START = functions.YAO_CONVEX_START
_L, _MU = 1000.0, 1.0
_RATE = 9e-4
WINDOWS = (2, 10, 100, 1000)
_ROOT = (_L / _MU) ** 0.5
_MOMENTUM = (_ROOT - 1) / (_ROOT + 1)
_RIVALS: dict[str, tuple[str, dict[str, float]]] = {
    "GD .00099": ("sgd", {"learning_rate": 0.00099}),
    "Nesterov": ("nesterov", {"learning_rate": 1 / _L, "momentum": _MOMENTUM}),
    "heavy ball": (
        "momentum",
        {"learning_rate": 4 / (_L**0.5 + _MU**0.5) ** 2, "momentum": _MOMENTUM**2},
    ),
}
# Specification: iteration (evaluations) to an error of 1e-10 and 1e-16, iteration with f = 0.
_REFERENCE = {
    2: ((334, 500), (422, 632), 1474),
    10: ((740, 813), (930, 1022), 3150),
    100: ((2300, 2322), (2900, 2928), 10_900),
    1000: ((7000, 7006), (9000, 9008), None),
}


def _loss(params: Any, data: Any, count: Any) -> Any:
    del data, count
    return functions.yao_convex(params)


class _Convex(NamedTuple):
    """All runs of this problem."""

    planning: dict[int, lib.Runs]  # by window
    rivals: dict[str, lib.Runs]
    single: lib.Runs  # K = 2 in single precision
    perturbed: dict[int, lib.Runs]  # from slightly different starts
    matched: lib.Runs  # K = 10 with matched pairs


@functools.lru_cache(maxsize=2)
def _runs(quick: bool) -> _Convex:
    length = 700 if quick else 14_000
    windows = WINDOWS[:2] if quick else WINDOWS
    many = {2: 4} if quick else {2: 40, 10: 40, 100: 8}
    lengths = {2: min(length, 2400), 10: 4200, 100: 14_000}

    def plan(window: int, starts: Any, evaluations: int, options: Any = lib.PAPER) -> lib.Runs:
        fixed = {"learning_rate": _RATE, "window": window, **options}
        return lib.follow(_loss, "csawg", starts, evaluations, fixed=fixed)

    single = plan(2, _START[None], 900)
    with lib.double_precision():
        generator = np.random.default_rng(0)
        return _Convex(
            {k: plan(k, _START[None], length) for k in windows},
            {
                name: lib.follow(_loss, method, _START[None], min(length, 9000), fixed=fixed)
                for name, (method, fixed) in _RIVALS.items()
            },
            single,
            {
                k: plan(k, _START * (1 + 1e-6 * generator.normal(size=(n, 2))), lengths[k])
                for k, n in many.items()
            },
            plan(10, _START[None], min(length, 3000), lib.MATCHED),
        )


def _error(runs: lib.Runs) -> Any:
    """‖w‖ after each evaluation, as w* = 0."""
    return lib.distances(runs.observed[0], 0.0)


def _error_by_iteration(runs: lib.Runs) -> Any:
    return _error(runs)[runs.at_iterations()]


def _loss_by_iteration(runs: lib.Runs) -> Any:
    params = runs.observed[0][runs.at_iterations()]
    return 0.5 * np.sum(np.asarray(_Q, params.dtype) * params**2, axis=-1)


# Figure 3 ---------------------------------------------------------------------------------------


def convergence(settings: Settings, progress: Progress) -> Result:
    """Figure 3: errors of Csawg and of accelerated methods, and the path of Csawg K = 10."""
    runs = _runs(settings.quick)
    progress(0.9)
    errors = {f"Csawg K{k}": _error_by_iteration(r) for k, r in runs.planning.items()}
    errors |= {name: _error(r) for name, r in runs.rivals.items()}
    with mpl.rc_context(plots.STYLE):
        drawn = _draw_convergence(runs, errors)
    rows = [
        row
        for name, values in errors.items()
        for row in lib.curve_rows({"method": name}, {"iteration": np.arange(len(values)),
                                                     "error": values})
    ]  # fmt: skip
    return Result(
        title="Figure 3: the convex problem",
        text=(
            "f(w) = ½wᵀQw, Q = diag(1000, 1), from (−1, 2); Csawg (Algorithm 1 as printed) with "
            f"γ = {_RATE:g} in float64. Iterations of Csawg are those of its outer loop; a plan "
            "takes one gradient evaluation more. Nesterov's method and heavy ball have their "
            "optimal constants. Dotted: 2.24·(1 − μ/L)ᵗ and 2.24·(1 − √(μ/L))ᵗ. Right: Csawg "
            "K10, ordinary steps as dots, plans as lines. w* = 0 has no rounding floor, so that "
            "f is 0 only by underflow: below the smallest normal number (2.2e-308, in float32 "
            "1.2e-38), as XLA takes denormal numbers for 0. The specification's runs, in NumPy, "
            "have them and so reach 0 a little later."
        ),
        figure=drawn,
        rows=rows,
        tables=[_threshold_table(runs)],
        findings=_convergence_findings(runs, errors),
    )


def _rates(length: int) -> tuple[Any, Any]:
    """The theoretical lines of gradient descent and of accelerated methods."""
    steps, start = np.arange(length), np.linalg.norm(_START)
    return start * (1 - _MU / _L) ** steps, start * (1 - (_MU / _L) ** 0.5) ** steps


def _draw_convergence(runs: _Convex, errors: dict[str, Any]) -> Any:
    figure = lib.figure(12, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for index, (name, values) in enumerate(errors.items()):
        shown = lib.positive(values[:9001])
        look = plots.look(index) if name.startswith("Csawg") else _grey(name)
        left.plot(np.arange(len(shown)), np.where(shown > 1e-32, shown, np.nan), label=name, **look)
    for line in _rates(max(map(len, errors.values()))):
        left.plot(np.where(line > 1e-32, line, np.nan)[:9001], color="0.2", linestyle=":",
                  linewidth=1)  # fmt: skip
    left.set(xscale="log", yscale="log", xlim=(20, 9000), ylim=(1e-31, 100), xlabel="iteration",
             ylabel="‖w − w*‖", title="(a) convergence")  # fmt: skip
    left.legend(fontsize=8, loc="lower left")
    _draw_path(right, runs.planning[10])
    return figure


def _grey(name: str) -> dict[str, Any]:
    index = list(_RIVALS).index(name)
    return {"color": ("0.6", "0.45", "0.25")[index], "linestyle": ("-", "--", "-.")[index]}


def _draw_path(axis: Any, runs: lib.Runs) -> None:
    params, iteration = runs.observed[0], runs.iteration[0]
    planned = np.flatnonzero(np.diff(iteration) == 0)  # this evaluation was a projection
    for t in planned[:40]:
        axis.plot(*params[t : t + 2].T, color=plots.COLOURS[1], linewidth=1.2,
                  label="plan" if t == planned[0] else None)  # fmt: skip
    axis.plot(*params.T, ".", color=plots.COLOURS[0], markersize=3.5, label="ordinary step")
    axis.plot(0, 0, "k*", markersize=10, label="w*", zorder=5)
    axis.set(xlabel="w₁ (Q = 1000)", ylabel="w₂ (Q = 1)", title="(b) path of Csawg K10")
    axis.legend(fontsize=8)


def _crossing(runs: lib.Runs, bound: float) -> tuple[int, int] | None:
    """(outer iteration, evaluations) at whose end the error is at most ``bound``."""
    found = lib.first_at_most(_error_by_iteration(runs), bound)
    return None if found is None else (found, int(runs.at_iterations()[found]))


def _vanishes(runs: lib.Runs) -> int | None:
    """The outer iteration at whose end f is 0, to XLA, which takes denormal numbers for 0."""
    values = _loss_by_iteration(runs)
    return lib.first_at_most(values, float(np.finfo(values.dtype).tiny))


def _pair(found: tuple[int, int] | None) -> str:
    return "not reached" if found is None else f"{found[0]:,} ({found[1]:,})"


def _threshold_table(runs: _Convex) -> Any:
    header = ("K", "to 1e-10: specification", "ours", "to 1e-16: specification", "ours",
              "f = 0: specification", "ours")  # fmt: skip
    rows = []
    for k, found in runs.planning.items():
        first, second, vanishes = _REFERENCE[k]
        rows.append([
            str(k), _pair(first), _pair(_crossing(found, 1e-10)), _pair(second),
            _pair(_crossing(found, 1e-16)), lib.count(vanishes), lib.count(_vanishes(found)),
        ])  # fmt: skip
    return header, rows


def _convergence_findings(runs: _Convex, errors: dict[str, Any]) -> list[Finding]:
    two = errors["Csawg K2"]
    vanishes = {k: _vanishes(r) for k, r in runs.planning.items()}
    to_tiny = {k: (_crossing(r, 1e-16) or (10**9, 0))[0] for k, r in runs.planning.items()}
    best = min(to_tiny, key=lambda k: to_tiny[k])
    nesterov = errors["Nesterov"]
    early = [k for k in runs.planning if k != 2 and errors[f"Csawg K{k}"][100] > nesterov[100]]
    slope = errors["GD .00099"][-1] / errors["GD .00099"][-2]
    reached = [k for k, it in vanishes.items() if it is not None]
    findings = [
        Finding(
            "Csawg K2: error zero in less than 500 iterations",
            "0 before 500",
            f"{lib.number(lib.at(two, 500))} at 500; f = 0 from {lib.count(vanishes[2])} on",
            "holds if zero means the floor of a plot (1e-10 … 1e-22), not exactly",
        ),
        Finding(
            "The same in float32 (f = 0, by underflow)",
            "specification: 500",
            f"from iteration {lib.count(_vanishes(runs.single))} on",
            verdict((_vanishes(runs.single) or 10**9) <= 510),
        ),
        Finding(
            "K = 2 is the best",
            "K = 2",
            f"K = {best}: iterations to 1e-16 " + lib.listed(list(to_tiny.values()), _reached)
            + f" for K = {lib.listed(list(to_tiny), str)}",
            verdict(best == 2),
        ),
        Finding(
            "K10, K100 and K1000 eventually reach zero, too",
            "they do",
            f"f = 0 at iteration {lib.listed(list(vanishes.values()), lib.count)} for K = "
            f"{lib.listed(list(vanishes), str)}, of {len(_error(runs.planning[2])) - 1:,} "
            "evaluations",
            verdict(reached == list(vanishes))
            if len(reached) == len(vanishes)
            else f"holds for K = {lib.listed(reached, str) or 'none'} within these",
        ),
        Finding(
            "but are slower than Nesterov's method in the beginning",
            "slower",
            f"at iteration 100: Nesterov {lib.number(nesterov[100])}, "
            + ", ".join(f"K{k} {lib.number(errors[f'Csawg K{k}'][100])}"
                        for k in runs.planning if k != 2),
            verdict(len(early) == len(runs.planning) - 1),
        ),
        Finding(
            "GD with γ = .00099 follows the rate 1 − μ/L",
            f"{1 - _MU / _L:.5f} per step",
            f"{slope:.5f} per step",
            verdict(abs(slope - (1 - _MU / _L)) < 5e-5),
        ),
    ]  # fmt: skip
    for k in runs.planning:
        values = errors[f"Csawg K{k}"][:9001]
        line = _rates(len(values))[1]
        start = lib.below_from(values[line > 1e-300], line[line > 1e-300])
        spec = {2: "from 142 on", 10: "from 730 on"}.get(k, "never within 9000")
        findings.append(
            Finding(
                f"Csawg K{k} surpasses the line (1 − √(μ/L))ᵗ",
                f"“may be orders higher”; specification: below it {spec}",
                f"from iteration {start:,} on" if start is not None else "not within these runs",
                verdict(True) if start is not None else "does not hold within these iterations",
            )
        )
    return findings


def _reached(value: int) -> str:
    return "—" if value == 10**9 else f"{value:,}"


# Figure 4 ---------------------------------------------------------------------------------------


def step_sizes(settings: Settings, progress: Progress) -> Result:
    """Figure 4: the step sizes that Csawg learns on the convex problem."""
    runs = _runs(settings.quick)
    progress(0.9)
    with mpl.rc_context(plots.STYLE):
        drawn = lib.figure(11, 4)
        axes = drawn.subplots(1, 2)
        for component, (axis, label) in enumerate(zip(axes, ("Q = 1000", "Q = 1"), strict=True)):
            for index, (k, found) in enumerate(runs.planning.items()):
                iteration, sizes = _plans_until_underflow(found)
                look = {**plots.look(index), "marker": "." if len(sizes) < 30 else None}
                axis.plot(iteration, lib.positive(sizes[:, component]), label=f"K{k}", **look)
            axis.set(xscale="log", yscale="log", xlabel="iteration", ylabel="step size",
                     title=f"α of the component with {label}")  # fmt: skip
            axis.axhline(1 / _Q[component], color="0.3", linestyle=":", linewidth=1)
        axes[0].set_ylim(1e-6, 1e-1)
        axes[1].legend(fontsize=8, loc="lower right")
    rows = []
    for k, found in runs.planning.items():
        iteration, sizes = _plans_until_underflow(found)
        values = {"iteration": iteration, "alpha_stiff": sizes[:, 0], "alpha_slow": sizes[:, 1]}
        rows += lib.curve_rows({"window": k}, values)
    return Result(
        title="Figure 4: step sizes on the convex problem",
        text=(
            "Step sizes of all plans until f underflows to 0, after which they are 0 (or ratios "
            "of denormal numbers, where there are any). Dotted: 1/Q, the step size that jumps to "
            "the minimum. The paper calls the component with Q = 1 component one, although its Q "
            "is diag(1000, 1)."
        ),
        figure=drawn,
        rows=rows,
        findings=_step_size_findings(runs),
    )


def _plans_until_underflow(runs: lib.Runs) -> tuple[Any, Any]:
    """Outer iterations and step sizes of the plans made before f is exactly 0."""
    iteration, sizes = runs.plans()
    vanishes = _vanishes(runs)
    kept = iteration < (np.inf if vanishes is None else vanishes)
    return iteration[kept], sizes[kept]


def _from_law(found: lib.Runs) -> float:
    """The largest difference of α from 1 − (1 − γ)ⁿᴷ at plan n, K = 10, while f is above 1e-200."""
    iteration, sizes = _plans_until_underflow(found)
    kept = _loss_by_iteration(found)[iteration] > 1e-200
    law = 1 - (1 - _RATE) ** (10 * np.arange(1, len(iteration) + 1))
    return float(np.max(np.abs(sizes[:, 1] - law)[kept]))


def _step_size_findings(runs: _Convex) -> list[Finding]:
    peaks: dict[int, float] = {}
    for k, found in runs.planning.items():
        peaks[k] = float(_plans_until_underflow(found)[1][:, 1].max())
    difference = {name: _from_law(found) for name, found in
                  (("matched", runs.matched), ("lagged", runs.planning[10]))}  # fmt: skip
    exact = {
        k: float(
            np.mean([np.any(found.plans(r)[1][:, 1] == 1) for r in range(len(found.iteration))])
        )
        for k, found in runs.perturbed.items()
    }
    findings = [
        Finding(
            "α of the slow component peaks at exactly one for K2, K10 and K100",
            "1 exactly",
            "largest α before f underflows: "
            + ", ".join(f"K{k} {peak:.3f}" for k, peak in peaks.items()),
            verdict(all(peaks[k] == 1 for k in peaks if k != 1000)),
        ),
        Finding(
            "Runs from perturbed starts in which it is exactly 1 at some plan, underflow included",
            "all, or none; specification, with denormal numbers: 10 %, 17 % and 0 %",
            ", ".join(
                f"K{k}: {100 * share:.0f} % of {len(runs.perturbed[k].iteration)}"
                for k, share in exact.items()
            ),
            "holds for none" if not any(exact.values()) else "by chance, in some runs",
        ),
        Finding(
            "For K10 it is 1 − (1 − γ)ⁿᴷ at the n-th plan: exactly with matched pairs, about so "
            "with lagged ones",
            "specification",
            ", ".join(f"{name}: differs by up to {x:.1g}" for name, x in difference.items()),
            verdict(difference["matched"] < 1e-6),
        ),
    ]
    if 1000 in runs.planning:
        iteration, sizes = runs.planning[1000].plans()
        near = float(sizes[np.argmin(np.abs(iteration - 5000)), 1])
        findings += [
            Finding(
                "K1000 reaches about 0.97 in the figure",
                "0.97",
                f"{near:.3f} near iteration 5000",
                verdict(abs(near - 0.97) < 0.02),
            ),
            Finding(
                "and exactly 1 with more iterations",
                "1; specification: 0.9985 after 13,000",
                f"{float(sizes[-1, 1]):.4f} at iteration {int(iteration[-1]):,}",
                verdict(float(sizes[-1, 1]) == 1),
            ),
        ]
    return findings

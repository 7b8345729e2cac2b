"""Figures 7 and 8: repeated planning on Rosenbrock's function; and from other starts and rates."""

import functools
from typing import Any

import matplotlib as mpl
import numpy as np

from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_rosenbrock as rosenbrock
from optgrad.experiments.reproduce import planning_runs as lib

_EPISODE = {"projections": 5, "corrections": 10}
# Paper: iteration (from 0) and gradient evaluations at which the error is zero.
_PAPER = {10: (79, 465), 2: (17, 458)}
_HESSIAN = np.array([[802.0, -400.0], [-400.0, 200.0]])  # at w*


@functools.lru_cache(maxsize=2)
def repeated_runs(quick: bool) -> dict[int, lib.Runs]:
    """Algorithm 2 as printed, P = 5 and M = 10, γ = .001, by window; K = 5 beside the paper's."""
    lengths = {2: 600, 5: 600, 10: 600, 100: 700 if quick else 2000}
    with lib.double_precision():
        return {
            k: lib.follow(
                rosenbrock.loss, "csawg_repeated", [rosenbrock.START], length,
                fixed={"learning_rate": 1e-3, "window": k, **_EPISODE, **lib.PAPER},
            )
            for k, length in lengths.items()
        }  # fmt: skip


def zero_at(runs: lib.Runs) -> tuple[int, int] | None:
    """(outer iteration from 1, evaluations) after which the error is exactly 0."""
    ends = runs.at_iterations()
    found = lib.first_at_most(rosenbrock.errors(runs)[0][ends], 0.0)
    return None if found is None else (found, int(ends[found]))


# Figure 7 ---------------------------------------------------------------------------------------


def convergence(settings: Settings, progress: Progress) -> Result:
    """Figure 7: repeated planning against single planning and gradient descent; a path."""
    repeated = repeated_runs(settings.quick)
    progress(0.5)
    single = rosenbrock.planning_runs(settings.quick)
    descent = rosenbrock.descent_errors(settings.quick)[1e-3]
    progress(0.9)
    curves = {
        f"Csawg-p5 K{k}": rosenbrock.errors(r)[0][r.at_iterations()] for k, r in repeated.items()
    }
    curves |= {f"Csawg K{k}": rosenbrock.errors(r)[0][r.at_iterations()] for k, r in single.items()}
    curves["GD .001"] = descent
    with mpl.rc_context(plots.STYLE):
        figure = lib.figure(12, 4.2)
        left, right = figure.subplots(1, 2)
        for index, (name, values) in enumerate(curves.items()):
            shown = lib.positive(values[:1001])
            grey = {
                "color": "0.5",
                "linewidth": 1.0,
                "linestyle": ("-", "--", ":", "-.")[index % 4],
            }
            look = plots.look(index) if "p5" in name else grey
            left.plot(np.arange(len(shown)), shown, label=name, **look)
        left.set(xscale="log", yscale="log", ylim=(1e-12, 1e2), xlim=(1, 1000),
                 xlabel="iteration of the outer loop", ylabel="‖w − w*‖",
                 title="(a) convergence; a line that ends has reached exactly 0")  # fmt: skip
        left.legend(fontsize=8, loc="lower left")
        _draw_path(right, repeated[2])
    zeros = {k: zero_at(r) for k, r in repeated.items()}
    header = ("K", "paper: iteration from 0, evaluations", "ours: iteration from 0, evaluations",
              "first zero within the last plan", "largest α")  # fmt: skip
    table = [
        [str(k), "{}, {}".format(*_PAPER[k]) if k in _PAPER else "not given", _shown(zeros[k]),
         lib.count(lib.first_at_most(rosenbrock.errors(r)[0], 0.0)), lib.number(_peaks(r).max())]
        for k, r in repeated.items()
    ]  # fmt: skip
    rows = [
        row
        for name, values in curves.items()
        for row in lib.curve_rows(
            {"method": name}, {"iteration": np.arange(len(values)), "error": values}
        )
    ]
    return Result(
        title="Figure 7: repeated planning on Rosenbrock's function",
        text=(
            "Algorithm 2 as printed with P = 5 projections and M = 10 corrections after each, "
            "γ = .001, from (−1, 0), float64. A plan takes 55 gradient evaluations. The paper "
            "counts iterations from 0. Right: every iteration of the outer loop, K = 2, until the "
            "error is 0."
        ),
        figure=figure,
        rows=rows,
        tables=[(header, table)],
        findings=_convergence_findings(repeated, zeros, curves),
    )


def _shown(zero: tuple[int, int] | None) -> str:
    return "never" if zero is None else f"{zero[0] - 1}, {zero[1]}"


def _draw_path(axis: Any, runs: lib.Runs) -> None:
    ends = runs.at_iterations()
    zero = zero_at(runs)
    path = runs.observed[0][ends[: None if zero is None else zero[0] + 1]]
    reach = np.abs(path).max(axis=0)
    rosenbrock.contours(axis, (-1.2, -0.6), (max(1.4, reach[0]), max(1.3, reach[1])))
    axis.plot(*path.T, "o-", color=plots.COLOURS[0], markersize=4, linewidth=0.8)
    for index, point in enumerate(path[::2]):
        if np.linalg.norm(point - rosenbrock.MINIMIZER) > 0.05:
            offset = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
            axis.annotate(str(2 * index), point, **offset)
    axis.set_title("(b) path of Csawg-p5 K2, numbered by iteration")


def _peaks(runs: lib.Runs) -> Any:
    """The largest step size of each component."""
    sizes = runs.plans()[1]
    return np.max(sizes, axis=0)


def _convergence_findings(repeated: Any, zeros: Any, curves: Any) -> list[Finding]:
    findings = [
        Finding(
            f"Csawg-p5 K{k} reaches zero error",
            f"iteration {iteration} (from 0), {evaluations} gradient evaluations",
            "never" if zeros[k] is None
            else f"iteration {zeros[k][0] - 1}, {zeros[k][1]} evaluations, exactly 0",
            verdict(zeros[k] == (iteration + 1, evaluations)),
        )
        for k, (iteration, evaluations) in _PAPER.items()
    ]  # fmt: skip
    hundred = repeated[100]
    first = int(hundred.plans()[0][0]) if len(hundred.plans()[0]) else None
    stairs = curves["Csawg-p5 K100"]
    ends = np.arange(200, len(stairs), 100)
    drops = stairs[ends - 1] / np.maximum(stairs[ends], 1e-300)
    five = rosenbrock.errors(repeated[5])[0]
    lost = lib.first_at_most(-five, -1e3)
    return [
        *findings,
        Finding(
            "K100 plans for the first time at iteration 200, with little effect, and then goes "
            "down the stairs",
            "200",
            f"{first}; errors before over after the plans: "
            + ", ".join(f"{x:.2g}" for x in drops[:5]),
            verdict(first == 200 and bool(drops[0] < 1.5 and np.all(drops[1:5] > 1.5))),
        ),
        Finding(
            "Corrections stabilise repeated planning; a guarantee is left for future work",
            "no failure is mentioned, and K = 5 is left out",
            "K = 5, the same γ, P and M: "
            + (f"error above 1000 at iteration {repeated[5].iteration[0, lost]}" if lost is not None
               else f"error {lib.number(five[-1])}"),
            verdict(lost is None),
        ),
    ]  # fmt: skip


# Figure 8 ---------------------------------------------------------------------------------------


def step_sizes(settings: Settings, progress: Progress) -> Result:
    """Figure 8: the step sizes of repeated planning."""
    repeated = {k: r for k, r in repeated_runs(settings.quick).items() if k != 5}
    progress(0.9)
    smallest = float(np.linalg.eigvalsh(_HESSIAN)[0])
    rows: list[dict[str, Any]] = []
    with mpl.rc_context(plots.STYLE):
        figure = lib.figure(11, 4)
        axes = figure.subplots(1, 2)
        for index, (k, runs) in enumerate(repeated.items()):
            iteration, sizes = runs.plans()
            zero = zero_at(runs)
            kept = iteration <= (np.inf if zero is None else zero[0] + 2 * k)
            for component, axis in enumerate(axes):
                axis.plot(iteration[kept], sizes[kept, component], marker="o", markersize=4,
                          label=f"K{k}", **plots.look(index))  # fmt: skip
            values = {"iteration": iteration, "alpha_1": sizes[:, 0], "alpha_2": sizes[:, 1]}
            rows += lib.curve_rows({"window": k}, values)
        for component, axis in enumerate(axes):
            axis.axhline(1 / smallest, color="0.3", linestyle=":", linewidth=1)
            axis.axhline(0, color="0.3", linewidth=0.8)
            axis.set(xscale="log", xlabel="iteration", ylabel="step size",
                     title=f"α({component + 1})")  # fmt: skip
        axes[0].legend(fontsize=8)
    peaks = {k: _peaks(r) for k, r in repeated.items()}
    second = repeated[2].plans()[1][1]
    last = {k: r.plans()[1][-1] for k, r in repeated.items() if k != 100}
    return Result(
        title="Figure 8: step sizes of repeated planning",
        text=(
            "The plans of Figure 7 until shortly after the error is 0. Dotted: 1/λ of the smallest "
            f"Hessian eigenvalue at w*, λ = {smallest:.5f}."
        ),
        figure=figure,
        rows=rows,
        findings=[
            Finding(
                "The peaks of both step sizes are close to 2.5 for every K",
                f"2.5 (1/λ = {1 / smallest:.4f})",
                ", ".join(f"K{k} {x[0]:.3f}, {x[1]:.3f}" for k, x in peaks.items()),
                verdict(all(np.all(np.abs(x - 2.5) < 0.05) for x in peaks.values())),
            ),
            Finding(
                "α(2) can be negative in the first plans",
                "negative; specification: (.006, −.004) in the second plan of K2",
                f"({second[0]:.3f}, {second[1]:.3f}) in the second plan of K2",
                verdict(bool(second[1] < 0)),
            ),
            Finding(
                "They drop to zero when w* is reached",
                "0",
                ", ".join(f"K{k} {x[0]:g}, {x[1]:g}" for k, x in last.items()) + " at last",
                verdict(all(np.all(x == 0) for x in last.values())),
            ),
        ],
    )


# Other starts and rates -------------------------------------------------------------------------

_SOLVED = 1e-6  # an error at most this large
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "K2": ("csawg", {"window": 2}),
    "K10": ("csawg", {"window": 10}),
    "p5 K2": ("csawg_repeated", {"window": 2, **_EPISODE}),
    "p5 K10": ("csawg_repeated", {"window": 10, **_EPISODE}),
}
_GAMMAS = (5e-4, 6e-4, 7e-4, 8e-4, 9e-4, 1e-3, 1.1e-3, 1.2e-3, 1.4e-3, 1.5e-3, 1.6e-3, 1.8e-3)


def robustness(settings: Settings, progress: Progress) -> Result:
    """Not in the paper: 40 starts and twelve learning rates, with and without verification."""
    gammas = _GAMMAS[::4] if settings.quick else _GAMMAS
    count, evaluations = (4, 300) if settings.quick else (40, 2000)
    starts = rosenbrock.START + 0.2 * np.random.default_rng(1).normal(size=(count, 2))
    starts[0] = rosenbrock.START
    grid = np.tile(starts, (len(gammas), 1))
    swept = {"learning_rate": np.repeat(gammas, count)}
    final: dict[tuple[str, bool], Any] = {}
    rejected: dict[tuple[str, bool], Any] = {}
    for index, (name, (method, fixed)) in enumerate(_METHODS.items()):
        for verify in (False, True):
            options = {"verify": True} if verify else lib.PAPER
            with lib.double_precision():
                runs = lib.follow(
                    rosenbrock.loss, method, grid, evaluations, fixed={**fixed, **options},
                    swept=swept, observe=lambda params, data: params,
                )  # fmt: skip
            shape = (len(gammas), count)
            final[name, verify] = rosenbrock.errors(runs)[:, -1].reshape(shape)
            rejected[name, verify] = runs.rejected[:, -1].reshape(shape)
        progress((index + 1) / len(_METHODS))
    rows: list[dict[str, Any]] = [
        {"method": name, "verify": verify, "learning_rate": gamma, "starts": count,
         "solved": int(np.sum(e <= _SOLVED)), "diverged": int(np.sum(~(e < 1e3))),
         "median_error": float(f"{np.median(np.minimum(e, 1e6)):.4g}"),
         "rejected_per_run": float(np.mean(r))}
        for (name, verify), by_gamma in final.items()
        for gamma, e, r in zip(gammas, by_gamma, rejected[name, verify], strict=True)
    ]  # fmt: skip
    with mpl.rc_context(plots.STYLE):
        figure = lib.figure(12, 4)
        for axis, key, title in zip(
            figure.subplots(1, 2), ("solved", "diverged"),
            (f"error below {_SOLVED:g} after {evaluations:,} evaluations", "diverged"), strict=True,
        ):  # fmt: skip
            for index, (name, verify) in enumerate(final):
                mine = [
                    r[key] / count for r in rows if (r["method"], r["verify"]) == (name, verify)
                ]
                axis.plot(gammas, mine, color=plots.COLOURS[index // 2], marker="os"[verify],
                          linestyle="-" if verify else ":", markersize=4, linewidth=1.3,
                          label=f"{name}, verified" if verify else name)  # fmt: skip
            axis.set(xlabel="learning rate γ", ylabel=f"share of {count} starts", title=title,
                     ylim=(-0.03, 1.03))  # fmt: skip
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return Result(
        title="Beyond the paper: starts, learning rates and verification",
        text=(
            f"Rosenbrock's function from (−1, 0) and {count - 1} starts around it (deviation "
            f"0.2), {evaluations:,} gradient evaluations, float64. Dotted lines: the algorithms "
            "as printed; solid lines: the library's default, which takes a plan back unless the "
            "loss after it is at most the loss before. p5: repeated planning (P = 5, M = 10). The "
            "largest curvature in the valley's end is 1001.6, so that γ = .001 is about 1/L."
        ),
        figure=figure,
        rows=rows,
        findings=_robustness_findings(gammas, final),
    )


def _robustness_findings(gammas: Any, final: Any) -> list[Finding]:
    findings = []
    for name in ("p5 K2", "p5 K10"):
        works = [g for g, e in zip(gammas, final[name, False], strict=True) if e[0] <= _SOLVED]
        findings.append(
            Finding(
                f"{name} from (−1, 0): the learning rates that work",
                "γ = .001; specification: .0008 … .0012 (K2), .0008 … .0014 (K10)",
                ", ".join(f"{g:g}" for g in works) + f" of {', '.join(f'{g:g}' for g in gammas)}",
                "a narrow range around 1/L",
            )
        )
    for name in _METHODS:
        plain, verified = (np.mean(final[name, v] <= _SOLVED) for v in (False, True))
        lost = [int(np.sum(~(final[name, v] < 1e3))) for v in (False, True)]
        findings.append(
            Finding(
                f"{name}: verification prevents divergence",
                "specification: no run lost",
                f"{lost[0]} of {final[name, False].size} runs diverge without, {lost[1]} with it; "
                f"solved {100 * plain:.0f} % and {100 * verified:.0f} %",
                verdict(lost[1] == 0),
            )
        )
    return findings

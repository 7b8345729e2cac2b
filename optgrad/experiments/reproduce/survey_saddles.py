"""The toy table of the survey, and how saddles are passed: attracted, escaped, stuck."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_runs as lib
from optgrad.experiments.reproduce import survey_runs as runs
from optgrad.experiments.reproduce import survey_toys as toys


class Row(NamedTuple):
    """One method of the toy table."""

    label: str
    method: str
    hyperparams: Mapping[str, Mapping[str, Any]]  # toy's name ("" for all others) -> arguments
    golden: Mapping[str, int | None]  # the specification's steps in float64, None: not reached
    max_steps: int = 500

    def optimizer(self, toy: str) -> optax.GradientTransformationExtraArgs:
        """The optimizer for one toy, handed no more than it needs."""
        chosen = self.hyperparams.get(toy, self.hyperparams.get("", {}))
        return runs.create(self.method, **chosen)


NAMES = ("Q", "S2", "S6", "S0", "I", "R1", "R2")


def _golden(*steps: int | None) -> dict[str, int | None]:
    return dict(zip(NAMES, steps, strict=False))


def _euler(h: float, iterations: int = 3) -> dict[str, Any]:
    return {"learning_rate": h, "iterations": iterations}


TABLE = (
    Row("Newton", "newton", {}, {"Q": 1, "S2": None, "S6": None, "S0": None, "R1": 5, "R2": 6}),
    Row("saddle-free Newton", "saddle_free_newton", {"": {"damping": 0.0}},
        {"Q": 1, "S2": 11, "S6": 21, "S0": None, "I": 21, "R1": 5, "R2": 6}),
    Row("Lanczos saddle-free", "lanczos_saddle_free", {"": {"k": 2}, "Q": {"k": 12}},
        _golden(2, 15, 21, 67, 21, 26, 29)),
    Row("Lanczos saddle-free, kick", "lanczos_saddle_free", {"": {"k": 2, "kick": 0.1}},
        {"S2": 15, "S6": 15, "S0": 15, "I": 11}),
    Row("Krylov subspace descent", "krylov_subspace_descent", {"": {"k": 2}, "Q": {"k": 12}},
        _golden(1, 1, 3, None, 3, 4, 4)),
    Row("truncated Newton, trust", "truncated_newton", {"Q": {"radius0": 100.0}},
        _golden(12, 6, 6, None, 6, 36, 29)),
    Row("truncated Newton, lm", "truncated_newton", {"": {"mode": "lm"}},
        {"Q": 13, "S2": 8, "S6": 38, "R1": 49, "R2": 123}),
    Row("Hessian-free", "hessian_free", {}, {"R1": 26, "R2": 27}),
    Row("Gauss–Newton", "gauss_newton", {"": {"solver": "dense"}}, {"Q": 1, "R1": 2, "R2": 2}),
    Row("Levenberg–Marquardt", "levenberg_marquardt", {"": {"solver": "dense"}},
        {"Q": 4, "R1": 19, "R2": 21}),
    Row("NCG PR+", "nonlinear_cg", {"": {"curv_rtol": 0.01}}, _golden(17, 5, 4, None, 3, 6, 29)),
    Row("NCG FR", "nonlinear_cg", {"": {"curv_rtol": 0.01, "method": "fr"}},
        {"Q": 19, "R1": 6, "R2": 29}),
    Row("BFGS", "bfgs", {"": {"curv_rtol": 0.1}}, _golden(17, 4, 4, None, 8, 23, 24)),
    Row("L-BFGS (optax)", "lbfgs", {}, _golden(158, 4, 7, None, 28, 28, 34)),
    Row("implicit Euler", "implicit_euler",
        {"": _euler(10.0), "R1": _euler(100.0), "R2": _euler(100.0)},
        {"Q": 10, "S2": 4, "S6": 7, "S0": None, "R1": 8, "R2": 9}),
    Row("linearly implicit Euler", "implicit_euler",
        {"Q": _euler(1e4, 1), "R1": _euler(1.0, 1), "R2": _euler(1.0, 1), "": _euler(10.0, 1)},
        {"Q": 3, "S2": 8, "S6": 22, "R1": 46, "R2": 47}),
    Row("Adam .1", "adam", {"": {"learning_rate": 0.1}},
        {"S2": 97, "S6": 97, "S0": None, "I": 164, "R1": 2397, "R2": 1710}, 5000),
)  # fmt: skip


def table(settings: Settings, progress: Progress) -> Result:
    """Steps and gradient equivalents of every method on the toys, in float64 and float32."""
    chosen = TABLE[::5] if settings.quick else TABLE
    found: dict[tuple[str, str, str], toys.Solved] = {}
    for i, row in enumerate(chosen):
        for name in row.golden:
            toy = toys.TOYS[name]
            with lib.double_precision():
                found[row.label, name, "float64"] = _solve(row, toy, jnp.float64)
            found[row.label, name, "float32"] = _solve(row, toy, jnp.float32)
        progress((i + 1) / len(chosen))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw_table(chosen, found)
    rows = [
        {"method": label, "toy": name, "dtype": dtype, "steps": s.steps, "value": s.value,
         "gradient_equivalents": round(s.cost, 1) if np.isfinite(s.cost) else None,
         "increases": s.increases}
        for (label, name, dtype), s in found.items()
    ]  # fmt: skip
    tables = [
        (("method", *NAMES), [[row.label, *(_cell(found, row, n, dtype) for n in NAMES)]
                              for row in chosen])
        for dtype in ("float64", "float32")
    ]  # fmt: skip
    return Result(
        title="The toy table",
        text=(
            "Steps (gradient equivalents) to the target, – where it is not reached: Q a rotated "
            "quadratic in 12 dimensions of condition 1000, S2, S6 and S0 a saddle approached at a "
            "distance of 10⁻², 10⁻⁶ and 0 from its stable manifold, I the same badly conditioned, "
            "R1 and R2 Rosenbrock's function from two starts. The first table is in float64, the "
            "second in float32 with the targets that it can reach. In brackets the steps of the "
            "specification, float64."
        ),
        figure=drawn,
        rows=rows,
        tables=tables,
        findings=_table_findings(chosen, found),
    )


def _solve(row: Row, toy: toys.Toy, dtype: Any) -> toys.Solved:
    return toys.solve(toy, row.optimizer(toy.name), row.max_steps, dtype=dtype)


def _cell(found: Mapping[Any, toys.Solved], row: Row, name: str, dtype: str) -> str:
    if name not in row.golden:
        return ""
    solved = found[row.label, name, dtype]
    golden = "–" if row.golden[name] is None else str(row.golden[name])
    if solved.steps is None:
        return f"– [{golden}]"
    cost = f" ({solved.cost:.0f})" if np.isfinite(solved.cost) else ""
    return f"{solved.steps}{cost} [{golden}]"


def _table_findings(chosen: Sequence[Row], found: Mapping[Any, toys.Solved]) -> list[Finding]:
    findings = []
    for dtype in ("float64", "float32"):
        missed, total = [], 0
        for row in chosen:
            for name, golden in row.golden.items():
                steps = found[row.label, name, dtype].steps
                total += 1
                if golden is not None and (steps is None or steps > 1.5 * golden + 1):
                    missed.append(f"{row.label} {name}: {steps} for {golden}")
        findings.append(
            Finding(
                f"steps within 50 % of the specification, {dtype}",
                f"{total} entries",
                f"{total - len(missed)} of {total}" + "".join(f"; {m}" for m in missed),
                verdict(not missed),
            )
        )
    guarded = {"Lanczos saddle-free", "Krylov subspace descent", "truncated Newton, trust",
               "truncated Newton, lm", "Hessian-free", "Levenberg–Marquardt", "NCG PR+", "NCG FR",
               "BFGS"}  # fmt: skip
    rose = sum(s.increases for (label, _, _), s in found.items() if label in guarded)
    findings.append(
        Finding("methods that try their steps never increase the value", "0 increases",
                f"{rose} increases", verdict(rose == 0))
    )  # fmt: skip
    return findings


def _draw_table(chosen: Sequence[Row], found: Mapping[Any, toys.Solved]) -> Any:
    figure = lib.figure(7.5, 5.5)
    axis = figure.subplots()
    measured, golden, colours = [], [], []
    for index, row in enumerate(chosen):
        for name, steps in row.golden.items():
            solved = found[row.label, name, "float64"].steps
            if steps is not None and solved is not None:
                measured.append(solved)
                golden.append(steps)
                colours.append(index)
    spread = np.geomspace(1, max([*golden, *measured, 10]), 50)
    axis.fill_between(spread, spread / 1.5, spread * 1.5, color="0.9", label="± 50 %")
    for index, row in enumerate(chosen):
        mine = [i for i, c in enumerate(colours) if c == index]
        look = plots.look(index)
        axis.plot(np.array(golden)[mine], np.array(measured)[mine], linestyle="",
                  marker="osD^vP*"[index // 7 % 7], color=look["color"], markersize=5,
                  label=row.label)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="steps in the specification",
             ylabel="steps here, float64")  # fmt: skip
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


# --- escape ------------------------------------------------------------------------------------

ESCAPERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Newton": ("newton", {}),
    "saddle-free Newton": ("saddle_free_newton", {"damping": 0.0}),
    "Lanczos saddle-free": ("lanczos_saddle_free", {"k": 2}),
    "Lanczos saddle-free, kick .1": ("lanczos_saddle_free", {"k": 2, "kick": 0.1}),
    "truncated Newton, trust": ("truncated_newton", {}),
    "Krylov subspace descent": ("krylov_subspace_descent", {"k": 2}),
    "BFGS": ("bfgs", {"curv_rtol": 0.1}),
    "gradient descent .45": ("sgd", {"learning_rate": 0.45}),
    "Adam .1": ("adam", {"learning_rate": 0.1}),
}


def escape(settings: Settings, progress: Progress) -> Result:
    """Steps to pass the saddle, against the distance to its stable manifold, and exactly on it."""
    exponents = np.arange(1, 4 if settings.quick else 15)
    distances = np.append(10.0 ** -exponents.astype(float), 0.0)
    chosen = dict(list(ESCAPERS.items())[:: 4 if settings.quick else 1])
    steps: dict[str, list[int | None]] = {}
    ends: dict[str, list[Any]] = {}
    with lib.double_precision():
        for i, (label, (method, fixed)) in enumerate(chosen.items()):
            solved = _escapes(method, fixed, distances)
            steps[label] = [s.steps for s in solved]
            ends[label] = [jax.tree.map(float, s.params) for s in solved]
            progress((i + 1) / len(chosen))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw_escape(distances[:-1], steps)
    rows = [
        {"method": label, "distance": float(d), "steps": s, "x": end["x"], "y": end["y"]}
        for label in chosen
        for d, s, end in zip(distances, steps[label], ends[label], strict=True)
    ]
    return Result(
        title="Escape from a saddle",
        text=(
            "f = x² − y² + y⁴/4 from (1, y₀): steps until f ≤ −1 + 10⁻⁶ against the distance y₀ "
            "to the stable manifold y = 0 of the saddle, in float64; at most 500 steps. The last "
            "start is exactly on the manifold."
        ),
        figure=drawn,
        rows=rows,
        tables=[(
            ("method", *(f"{d:.0e}" for d in distances)),
            [[label, *("–" if s is None else str(s) for s in steps[label])] for label in chosen],
        )],
        findings=_escape_findings(distances, steps, ends),
    )  # fmt: skip


def _escapes(method: str, fixed: Mapping[str, Any], distances: Any) -> list[toys.Solved]:
    saddle = toys.TOYS["S2"]
    run = toys.compiled(saddle, runs.create(method, **fixed), 500)
    return [run({"x": jnp.array(1.0), "y": jnp.array(float(d))}) for d in distances]


def _draw_escape(distances: Any, steps: Mapping[str, list[int | None]]) -> Any:
    figure = lib.figure(8, 4)
    axis = figure.subplots()
    for index, (label, found) in enumerate(steps.items()):
        shown = [np.nan if s is None else s for s in found[:-1]]
        name = label if np.isfinite(shown).any() else f"{label} (never)"
        axis.plot(distances, shown, marker=".", label=name, **plots.look(index))
    axis.set(xscale="log", xlabel="distance y₀ to the stable manifold", ylabel="steps to pass it",
             ylim=(0, 140))  # fmt: skip
    axis.invert_xaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _escape_findings(
    distances: Any, steps: Mapping[str, list[int | None]], ends: Mapping[str, list[Any]]
) -> list[Finding]:
    found = []
    if "Newton" in steps:
        farthest = max(abs(e["x"]) + abs(e["y"]) for e in ends["Newton"])
        found.append(
            Finding(
                "Newton is attracted to the saddle from every one of these starts",
                "slides: “natural gradient attracts to saddle”",
                f"ends at most {farthest:.1e} from it",
                verdict(farthest < 1e-6),
            )
        )
    name = "saddle-free Newton"
    if name in steps:
        pairs = [(d, s) for d, s in zip(distances[:-1], steps[name][:-1], strict=True) if s]
        slope = np.polyfit(np.log2([1 / d for d, _ in pairs]), [s for _, s in pairs], 1)[0]
        found.append(
            Finding(
                "saddle-free Newton doubles the distance to the manifold in each step",
                "steps ∝ log₂(1/y₀): slope 1",
                f"slope {slope:.2f}",
                verdict(abs(slope - 1) < 0.1),
            )
        )
    on_it = [label for label, s in steps.items() if s[-1] is not None]
    with_chance = [label for label in on_it if label.startswith("Lanczos")]
    found.append(
        Finding(
            "exactly on the manifold nothing deterministic escapes",
            "only a random start or kick does",
            f"escape: {', '.join(on_it) or 'none'}",
            verdict(on_it == with_chance),
        )
    )
    return found

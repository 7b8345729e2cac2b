"""Performance profile of the second-order methods on public test problems, against other solvers.

The problems are the small unconstrained ones of CUTEst as sif2jax ports them; the rivals are
optax's L-BFGS and the solvers of optimistix and SciPy. All are charged alike, in gradient
equivalents.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import scipy.optimize

import optgrad
from optgrad.core import oracles
from optgrad.experiments import plots
from optgrad.experiments.reproduce import (
    Finding,
    Progress,
    Result,
    Settings,
    skipped_picture,
    verdict,
)
from optgrad.experiments.reproduce import planning_runs as lib
from optgrad.experiments.reproduce import survey_runs as runs

MAX_PARAMETERS = 12
STEPS = 150  # of optgrad's and optimistix' methods
BUDGET = 1000.0  # gradient equivalents
TOLERANCES = (1e-3, 1e-7)  # share of the largest known decrease that may be missing
_GRADIENT = 1.0
_TITLE = "Performance profile on CUTEst problems"


class Trace(NamedTuple):
    """A run: the lowest value so far, and what it had cost by then."""

    costs: npt.NDArray[Any]  # gradient equivalents, ascending, from 0
    values: npt.NDArray[Any]  # the lowest value so far, not finite ones left out

    def cost_of(self, bound: float) -> float:
        """What it cost to come to ``bound`` or below; infinite if it never did, or over budget."""
        cost = runs.first_cost(self.costs, self.values, bound)
        return cost if cost <= BUDGET else np.inf


Objective = Callable[[Any], Any]
Solver = Callable[[Objective, Any], Trace]  # (objective, start) -> what happened


def own_methods() -> dict[str, dict[str, Any]]:
    """Registered methods with their hyperparameters, the same for all problems."""
    return {
        "damped_newton": {"adaptive": True},
        "saddle_free_newton": {"adaptive": True},
        "lanczos_saddle_free": {"k": MAX_PARAMETERS},
        "krylov_subspace_descent": {"k": MAX_PARAMETERS},
        "truncated_newton": {},
        "nonlinear_cg": {},
        "bfgs": {},
    }


def solvers(quick: bool = False) -> dict[str, Solver]:
    """Label -> solver."""
    steps = 30 if quick else STEPS
    own = {name: _transformation(name, fixed, steps) for name, fixed in own_methods().items()}
    rivals = {
        "L-BFGS (optax)": _transformation("lbfgs", {}, steps),
        "BFGS (optimistix)": _optimistix("BFGS", steps),
        "NCG (optimistix)": _optimistix("NonlinearCG", steps),
        "BFGS (SciPy)": _scipy("BFGS"),
        "CG (SciPy)": _scipy("CG"),
        "L-BFGS-B (SciPy)": _scipy("L-BFGS-B"),
        "Newton-CG (SciPy)": _scipy("Newton-CG"),
        "trust-krylov (SciPy)": _scipy("trust-krylov"),
    }
    return {k: v for k, v in own.items() if not quick or k in {"bfgs", "truncated_newton"}} | {
        k: v for k, v in rivals.items() if not quick or k.startswith("L-BFGS")
    }


def cutest_problems(every: int) -> dict[str, tuple[Objective, Any]]:
    """Every n-th small unconstrained problem of sif2jax by name: (objective, start).

    Raises:
      ImportError: if sif2jax is not installed.
    """
    import sif2jax  # noqa: PLC0415  a test dependency, wanted by this figure only

    found = {}
    for problem in sif2jax.unconstrained_minimisation_problems:
        start = problem.y0
        if isinstance(start, jax.Array) and start.size <= MAX_PARAMETERS:
            objective = problem.objective
            args = problem.args
            found[str(problem.name)] = (
                lambda y, objective=objective, args=args: objective(y, args),
                start,
            )
    return {name: found[name] for name in sorted(found)[::every]}


def _transformation(name: str, fixed: Mapping[str, Any], steps: int) -> Solver:
    """A registered method, run for a number of updates in one compiled scan."""

    def solve(objective: Objective, start: Any) -> Trace:
        extras = optgrad.curvature_args(lambda params, batch: objective(params))
        found = runs.record(runs.create(name, **fixed), extras, start, steps, observe=objective)
        return _trace(objective, start, found.costs, found.observed)

    return solve


def _optimistix(name: str, steps: int) -> Solver:
    def solve(objective: Objective, start: Any) -> Trace:
        import equinox  # noqa: PLC0415  comes with optimistix
        import optimistix  # noqa: PLC0415  a test dependency, wanted by this figure only

        solver = getattr(optimistix, name)(rtol=1e-12, atol=1e-12)
        fn: Any = lambda y, args: (objective(y), None)  # noqa: E731
        options: dict[str, Any] = {}
        tags: frozenset[Any] = frozenset()
        shape = jax.eval_shape(objective, start)
        state = solver.init(fn, start, None, options, shape, None, tags)
        step = equinox.filter_jit(
            lambda y, state: solver.step(fn, y, None, options, state, tags)[:2]
        )
        value = jax.jit(objective)
        y, values = start, []
        for _ in range(steps):
            y, state = step(y, state)
            values.append(float(value(y)))
        costs = (_GRADIENT + oracles.VALUE_COST) * np.arange(1, steps + 1)
        return _trace(objective, start, costs, values)

    return solve


def _scipy(method: str) -> Solver:
    def solve(objective: Objective, start: Any) -> Trace:
        value_and_grad = jax.jit(jax.value_and_grad(objective))
        hessian_vector = jax.jit(lambda x, v: jax.jvp(jax.grad(objective), (x,), (v,))[1])
        spent, values = [0.0], [np.inf]

        class OverBudgetError(Exception):
            pass

        def charge(cost: float, value: float) -> None:
            if spent[-1] > BUDGET:
                raise OverBudgetError
            spent.append(spent[-1] + cost)
            values.append(value)

        def fun(x: Any) -> tuple[float, Any]:
            value, grad = value_and_grad(jnp.asarray(x))
            charge(_GRADIENT, float(value))
            return float(value), np.asarray(grad)

        def hessp(x: Any, v: Any) -> Any:
            charge(oracles.HESSIAN_PRODUCT_COST["exact"], values[-1])
            return np.asarray(hessian_vector(jnp.asarray(x), jnp.asarray(v)))

        second = {"hessp": hessp} if method in {"Newton-CG", "trust-krylov"} else {}
        failures = OverBudgetError, ValueError, np.linalg.LinAlgError
        # What it found until it failed counts.
        with np.errstate(all="ignore"), contextlib.suppress(*failures):
            scipy.optimize.minimize(
                fun, np.asarray(start), jac=True, method=method, tol=1e-12, **second
            )
        return _trace(objective, start, spent[1:], values[1:])

    return solve


def _trace(objective: Objective, start: Any, costs: Any, values: Any) -> Trace:
    first = float(objective(start))
    found = np.concatenate([[first], np.asarray(values, float)])
    lowest = np.minimum.accumulate(np.where(np.isfinite(found), found, np.inf))
    return Trace(np.concatenate([[0.0], np.asarray(costs, float)]), lowest)


def profile(settings: Settings, progress: Progress) -> Result:
    """The share of problems that each solver solves, over its cost relative to the cheapest."""
    with lib.double_precision():  # whose end also undoes that importing sif2jax enables it
        try:
            chosen = cutest_problems(40 if settings.quick else 10)
            import optimistix  # noqa: F401, PLC0415
        except ImportError as error:
            progress(1.0)
            return _skipped(error)
        traces = {}
        for i, (name, (objective, start)) in enumerate(chosen.items()):
            traces[name] = {
                label: solve(objective, jnp.asarray(start, float))
                for label, solve in solvers(settings.quick).items()
            }
            progress((i + 1) / len(chosen))
    costs = {tolerance: solve_costs(traces, tolerance) for tolerance in TOLERANCES}
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(costs)
    labels = list(next(iter(traces.values())))
    rows = [
        {"problem": name, "solver": label, "lowest": float(f"{found.values[-1]:.6g}")}
        | {f"cost_{t:g}": _number(costs[t][label][i]) for t in TOLERANCES}
        for i, (name, by_label) in enumerate(traces.items())
        for label, found in by_label.items()
    ]
    header = ("solver", *(f"solved to {t:g}, median cost" for t in TOLERANCES), "cheapest at 1e-3")
    first = costs[TOLERANCES[0]]
    least = np.min([first[x] for x in labels], axis=0)
    table = [
        [label, *(_solved(costs[t][label]) for t in TOLERANCES),
         str(int(np.sum((first[label] == least) & np.isfinite(least))))]
        for label in labels
    ]  # fmt: skip
    return Result(
        title=_TITLE,
        text=(
            f"{len(traces)} unconstrained CUTEst problems with at most {MAX_PARAMETERS} variables "
            "(every tenth of sif2jax by name), float64, from the start that they give. A problem "
            "is solved to τ when f ≤ f* + τ(f₀ − f*), with the lowest f* that any solver found. "
            f"At most {BUDGET:g} gradient equivalents and {STEPS} updates; the same "
            "hyperparameters, the defaults but for k = 12 and adaptive damping, on all problems. "
            "A gradient with its value is 1, a value ⅓, a product with the Hessian 2; a step of "
            "optimistix 4/3 (it does not count)."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, table)],
        findings=_findings(costs, len(traces)),
    )


def solve_costs(
    traces: Mapping[str, Mapping[str, Trace]], tolerance: float
) -> dict[str, npt.NDArray[Any]]:
    """Solver -> its cost on every problem, infinite where it was not solved."""
    labels = list(next(iter(traces.values())))
    costs: dict[str, list[float]] = {label: [] for label in labels}
    for by_label in traces.values():
        first = max(t.values[0] for t in by_label.values())
        lowest = min(t.values[-1] for t in by_label.values())
        bound = lowest + tolerance * (first - lowest)
        for label in labels:
            costs[label].append(by_label[label].cost_of(bound))
    return {label: np.array(x) for label, x in costs.items()}


def _draw(costs: Mapping[float, Mapping[str, npt.NDArray[Any]]]) -> Any:
    figure = lib.figure(11.5, 4.2)
    axes = figure.subplots(1, len(costs), sharey=True)
    for axis, (tolerance, by_label) in zip(axes, costs.items(), strict=True):
        best = np.min(list(by_label.values()), axis=0)
        for index, (label, cost) in enumerate(by_label.items()):
            with np.errstate(invalid="ignore"):
                ratios = np.sort(np.where(np.isfinite(cost), cost / best, np.inf))
            share = np.arange(1, len(ratios) + 1) / len(ratios)
            shown = np.isfinite(ratios)
            is_rival = "(" in label
            axis.step(np.append(ratios[shown], 1e3), np.append(share[shown], share[shown][-1:]
                      if shown.any() else 0.0), where="post", label=label,
                      **{**plots.look(index), "linewidth": 1.0 if is_rival else 1.9,
                         "linestyle": ":" if is_rival else "-"})  # fmt: skip
        axis.set(xscale="log", xlim=(1, 100), ylim=(0, 1.02), title=f"τ = {tolerance:g}",
                 xlabel="cost relative to the cheapest solver")  # fmt: skip
    axes[0].set_ylabel("share of problems solved")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def _findings(
    costs: Mapping[float, Mapping[str, npt.NDArray[Any]]], count: int
) -> Sequence[Finding]:
    found = []
    for tolerance, by_label in costs.items():
        solved = {label: int(np.isfinite(cost).sum()) for label, cost in by_label.items()}
        own = {k: v for k, v in solved.items() if "(" not in k}
        rivals = {k: v for k, v in solved.items() if "(" in k}
        best, rival = max(own, key=own.__getitem__), max(rivals, key=rivals.__getitem__)
        found.append(
            Finding(
                f"the best method here solves as many as the best rival (τ = {tolerance:g})",
                "not in the slides",
                f"{best} {own[best]}, {rival} {rivals[rival]} of {count}",
                verdict(own[best] >= rivals[rival]),
            )
        )
    return found


def _solved(cost: npt.NDArray[Any]) -> str:
    finite = cost[np.isfinite(cost)]
    return f"{len(finite)}, {np.median(finite):.0f}" if len(finite) else "0"


def _number(cost: float) -> float | None:
    return round(float(cost), 2) if np.isfinite(cost) else None


def _skipped(error: ImportError) -> Result:
    """The section of a report without the packages."""
    with mpl.rc_context(plots.STYLE):
        figure = skipped_picture("sif2jax or optimistix is missing")
    return Result(
        title=_TITLE,
        text=f"**Skipped: {error}.** `pip install sif2jax optimistix`, test dependencies both.",
        figure=figure,
        rows=[{"status": "skipped"}],
        findings=[Finding("profile", "not in the slides", f"skipped: {error}", "not tried")],
    )

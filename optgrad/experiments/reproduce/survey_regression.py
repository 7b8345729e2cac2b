"""Where curvature pays: a small regression, full batch, down to its noise floor."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpy.typing as npt

import optgrad
from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_runs as lib
from optgrad.experiments.reproduce import survey_runs as runs

EXAMPLES, WIDTH, NOISE = 200, 16, 0.01
FLOOR = 0.5 * NOISE**2  # mean loss of the function that made the data
RATES = {
    "momentum": (3e-3, 1e-2, 3e-2, 0.1),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
}
# label -> method, hyperparameters, updates
SECOND_ORDER: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "BFGS": ("bfgs", {"curv_rtol": 0.9}, 2000),
    "L-BFGS (optax)": ("lbfgs", {}, 2000),
    "NCG PR+": ("nonlinear_cg", {}, 1500),
    "truncated Newton, trust": ("truncated_newton", {"maxiter": 50}, 250),
    "Levenberg–Marquardt, CG": ("levenberg_marquardt", {"solver": "cg", "maxiter": 50}, 250),
    "Levenberg–Marquardt, dense": ("levenberg_marquardt", {"solver": "dense"}, 100),
    "Krylov subspace descent": ("krylov_subspace_descent", {"k": 20}, 80),
    "Lanczos saddle-free": ("lanczos_saddle_free", {"k": 20}, 150),
    "Gauss–Newton, undamped": ("gauss_newton", {"solver": "dense"}, 30),
}
FIRST_ORDER_STEPS = 20_000


def data(seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Inputs in [−2, 2] and noisy values of sin 3x + x/2."""
    generator = np.random.default_rng(seed)
    x = np.sort(generator.uniform(-2, 2, EXAMPLES))
    y = np.sin(3 * x) + 0.5 * x + NOISE * generator.standard_normal(EXAMPLES)
    return x[:, None], y


def initial_params(seed: int) -> list[dict[str, Any]]:
    """Of a 1-16-16-1 network with tanh, 321 numbers: N(0, 1/inputs), biases 0."""
    generator = np.random.default_rng(seed)
    sizes = (1, WIDTH, WIDTH, 1)
    return [
        {"w": jnp.asarray(generator.standard_normal((m, n)) / np.sqrt(m)), "b": jnp.zeros(n)}
        for m, n in itertools.pairwise(sizes)
    ]


def network(params: Any, x: Any) -> Any:
    """Outputs, shape (examples,)."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]


def residuals(params: Any, batch: Any) -> Any:
    """Half the sum of their squares is the mean loss ½(f(x) − y)²."""
    x, y = batch
    return (network(params, x) - y) / np.sqrt(EXAMPLES)


def loss(params: Any, batch: Any) -> Any:
    """Half the mean squared error."""
    return 0.5 * jnp.sum(residuals(params, batch) ** 2)


def regression(settings: Settings, progress: Progress) -> Result:
    """Loss against gradient equivalents, and the cost of coming to the noise floor."""
    seeds = range(1 if settings.quick else 2)
    shrink = 50 if settings.quick else 1
    curves: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
    with lib.double_precision():
        batch = tuple(jnp.asarray(a) for a in data())
        second = dict(list(SECOND_ORDER.items())[:: 4 if settings.quick else 1])
        for i, (label, (method, fixed, steps)) in enumerate(second.items()):
            curves[label] = [_run(method, fixed, steps // shrink + 1, s, batch) for s in seeds]
            progress((i + 1) / (len(second) + len(RATES)))
        for i, (method, rates) in enumerate(RATES.items()):
            label, curves_of_best = _best_rate(
                method, rates, FIRST_ORDER_STEPS // shrink, batch, seeds
            )
            curves[label] = curves_of_best
            progress((len(second) + i + 1) / (len(second) + len(RATES)))
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(curves)
    table = [
        (label, *(_cost_text(runs.first_cost(c[0], c[1], FLOOR)) for c in found),
         *(lib.number(float(np.nanmin(c[1]))) for c in found[:1]))
        for label, found in curves.items()
    ]  # fmt: skip
    rows = [
        {"method": label, "seed": seed, **row}
        for label, found in curves.items()
        for seed, (costs, values) in zip(seeds, found, strict=True)
        for row in lib.curve_rows({}, {"gradient_equivalents": costs, "loss": values}, 40)
    ]
    header = ("method", *(f"cost to the floor, start {s}" for s in seeds), "lowest loss, start 0")
    return Result(
        title="Where curvature pays: a small regression",
        text=(
            f"A 1-16-16-1 network with tanh (321 parameters) on {EXAMPLES} noisy values of "
            f"sin 3x + x/2, the whole data in each step, float64, {len(seeds)} start(s). The noise "
            f"floor is the loss {FLOOR:.0e} of the function that made the data. Learning rates of "
            "momentum and Adam are the best of four each for this very purpose; the second-order "
            "methods run with their defaults but for the sizes k and maxiter."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, table)],
        findings=_findings(curves),
    )


def _run(
    method: str, fixed: Mapping[str, Any], steps: int, seed: int, batch: Any
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    extras = optgrad.curvature_args(loss, network_outputs, output_loss, residuals)
    found = runs.record(
        runs.create(method, **fixed),
        extras,
        jax.tree.map(lambda x: x.astype(float), initial_params(seed)),
        steps,
        observe=lambda params: loss(params, batch),
        batch=batch,
    )
    return found.costs, found.observed


def network_outputs(params: Any, batch: Any) -> Any:
    """Of all examples."""
    return network(params, batch[0])


def output_loss(outputs: Any, batch: Any) -> Any:
    """Half the mean squared error of outputs."""
    return 0.5 * jnp.mean((outputs - batch[1]) ** 2)


def _best_rate(
    method: str, rates: Sequence[float], steps: int, batch: Any, seeds: Sequence[int]
) -> tuple[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
    """The rate that comes to the floor at the least cost, summed over starts."""
    tried = {
        rate: [_run(method, {"learning_rate": rate}, steps, s, batch) for s in seeds]
        for rate in rates
    }

    def rank(rate: float) -> tuple[float, float]:
        costs = [min(runs.first_cost(c[0], c[1], FLOOR), 1e9) for c in tried[rate]]
        return sum(costs), sum(float(np.nan_to_num(c[1][-1], nan=np.inf)) for c in tried[rate])

    best = min(rates, key=rank)
    return f"{method} {best:g}", tried[best]


def _cost_text(cost: float) -> str:
    return f"{cost:,.0f}" if np.isfinite(cost) else "never"


def _draw(curves: Mapping[str, Sequence[Any]]) -> Any:
    figure = lib.figure(8.5, 4.4)
    axis = figure.subplots()
    for index, (label, found) in enumerate(curves.items()):
        for start, (costs, values) in enumerate(found):
            axis.plot(costs, np.minimum.accumulate(values), label=None if start else label,
                      **{**plots.look(index), "alpha": 0.4 if start else 1.0})  # fmt: skip
    axis.axhline(FLOOR, color="0.5", linewidth=0.8)
    axis.text(1.5, FLOOR * 1.1, "noise floor", fontsize=8, color="0.4")
    axis.set(xscale="log", yscale="log", xlim=(1, FIRST_ORDER_STEPS), ylim=(2e-5, 3),
             xlabel="gradient equivalents", ylabel="lowest loss so far")  # fmt: skip
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _findings(curves: Mapping[str, Sequence[Any]]) -> list[Finding]:
    def typical(label: str) -> float:
        return float(np.median([runs.first_cost(c[0], c[1], FLOOR) for c in curves[label]]))

    first = {k: typical(k) for k in curves if k.split()[0] in RATES}
    best = min(first.values())
    found = []
    for label in ("BFGS", "truncated Newton, trust", "Levenberg–Marquardt, CG",
                  "Krylov subspace descent"):  # fmt: skip
        if label in curves:
            cost = typical(label)
            found.append(
                Finding(
                    f"{label} comes to the noise floor at no more than half the cost of Adam and "
                    "momentum",
                    "factor 2 or more",
                    f"{_cost_text(cost)} against {_cost_text(best)}",
                    verdict(2 * cost <= best),
                )
            )
    undamped = [label for label in curves if "undamped" in label]
    for label in undamped:
        cost = typical(label)
        found.append(
            Finding("undamped Gauss–Newton fails", "fails", _cost_text(cost),
                    verdict(not np.isfinite(cost)))
        )  # fmt: skip
    return found

"""Figure 9: heavy ball, RMSprop and Adam on Rosenbrock's function."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from optgrad.experiments import plots
from optgrad.experiments.reproduce import Finding, Progress, Result, Settings, verdict
from optgrad.experiments.reproduce import planning_repeated as repeated
from optgrad.experiments.reproduce import planning_rosenbrock as rosenbrock
from optgrad.experiments.reproduce import planning_runs as lib


class _Search(NamedTuple):
    """One optimizer and a grid of its hyperparameters."""

    name: str
    method: str
    grid: Mapping[str, tuple[float, ...]]
    fixed: Mapping[str, Any]


_SEARCHES = (
    _Search("heavy ball", "momentum", {"learning_rate": (0.0015,), "momentum": (0.8, 0.9)}, {}),
    _Search("heavy ball", "momentum", {"learning_rate": (0.001,), "momentum": (0.95,)}, {}),
    _Search(
        "RMSprop",
        "rmsprop",
        {"learning_rate": (5e-4, 1e-3, 1.5e-3, 1e-2), "decay": (0.8, 0.9, 0.99)},
        {"eps_in_sqrt": False},
    ),
    _Search(
        "Adam",
        "adam",
        {"learning_rate": (5e-3, 1e-2), "b1": (0.9, 0.99, 0.999), "b2": (0.99, 0.999, 0.9999)},
        {},
    ),
)
# Specification: errors at 1000, 2000 and 10,000 evaluations.
_REFERENCE = {
    ("GD", 0.001): "0.76/0.43/0.014",
    ("GD", 0.0015): "0.55/0.26/0.0019",
    ("heavy ball", 0.0015, 0.8): "0.024/0.0011/3.1e-14",
    ("heavy ball", 0.0015, 0.9): "0.0014/2.3e-06/2.7e-15",
    ("RMSprop", 0.001, 0.9): "1.4/0.41/0.00069",
    ("RMSprop", 0.0005, 0.9): "1.7/1.4/0.00055",
    ("RMSprop", 0.01, 0.9): "0.03 at last",
    ("Adam", 0.01, 0.9, 0.99): "0.3/7.9e-05/0.00014",
    ("Adam", 0.01, 0.9, 0.999): "1.6/1/1.5e-15",
    ("Adam", 0.005, 0.9, 0.999): "1.7/1.5/1.9e-07",
}
_MOMENTS = (1000, 2000, 10_000)
_LENGTH = 10_000


@functools.lru_cache(maxsize=2)
def _errors(quick: bool) -> dict[tuple[Any, ...], Any]:
    """(name, hyperparameters …) -> ‖w − w*‖ after each gradient evaluation."""
    length = 1200 if quick else _LENGTH
    found: dict[tuple[Any, ...], Any] = {}
    for rate, values in rosenbrock.descent_errors(quick).items():
        found["GD", rate] = values[: length + 1]
    for search in _SEARCHES:
        settings = list(itertools.product(*search.grid.values()))
        swept = dict(zip(search.grid, np.transpose(settings), strict=True))
        with lib.double_precision():
            runs = lib.follow(
                rosenbrock.loss, search.method, [rosenbrock.START] * len(settings), length,
                fixed=search.fixed, swept=swept,
            )  # fmt: skip
        found |= {
            (search.name, *chosen): values
            for chosen, values in zip(settings, rosenbrock.errors(runs), strict=True)
        }
    for k, planned in rosenbrock.planning_runs(quick).items():
        found[f"Csawg K{k}", 0.001] = rosenbrock.errors(planned)[0]
    for k, planned in repeated.repeated_runs(quick).items():
        if k in {2, 10}:
            found[f"Csawg-p5 K{k}", 0.001] = rosenbrock.errors(planned)[0]
    return found


def rivals(settings: Settings, progress: Progress) -> Result:
    """Figure 9: who is ahead when, by gradient evaluations."""
    errors = _errors(settings.quick)
    progress(0.9)
    with mpl.rc_context(plots.STYLE):
        drawn = _draw(errors)
    header = ("method", "specification: 1000/2000/10,000", *(f"error at {t:,}" for t in _MOMENTS),
              "below GD .001 from", "rises at most by, after 2,000")  # fmt: skip
    table = [
        [_label(key), _REFERENCE.get(key, ""), *(lib.number(lib.at(x, t)) for t in _MOMENTS),
         lib.count(lib.below_from(x, errors["GD", 0.001][: len(x)])), f"{_rise(x):.3g} ×"]
        for key, x in errors.items()
    ]  # fmt: skip
    rows = [
        row
        for key, x in errors.items()
        for row in lib.curve_rows(
            {"method": key[0], "setting": _setting(key)},
            {"evaluation": np.arange(len(x)), "error": x},
            40,
        )
    ]
    return Result(
        title="Figure 9: momentum and normalised gradients on Rosenbrock's function",
        text=(
            "All settings of the paper's search from (−1, 0), float64: heavy ball (α, p), RMSprop "
            "(α, β; from a zero average, ε = 1e-8 outside the root), Adam (α, β₁, β₂); p = .95 is "
            "ours (with α = .0015 it diverges). Left: the settings that the text speaks of; right: "
            "all of them at the end. "
            "Which of the paper's lines is which cannot be recovered from its text. The table's "
            "last column is the largest rise of an error above an earlier one after evaluation "
            "2,000 while it is above 1e-12, a measure of oscillation."
        ),
        figure=drawn,
        rows=rows,
        tables=[(header, table)],
        findings=_findings(errors),
    )


def _setting(key: tuple[Any, ...]) -> str:
    return ", ".join(f"{x:g}" for x in key[1:])


def _label(key: tuple[Any, ...]) -> str:
    return f"{key[0]} {_setting(key)}"


def _rise(values: Any, start: int = 2000) -> float:
    """The largest ratio of an error to an earlier one, both after ``start`` and above 1e-12."""
    late = values[min(start, len(values) - 1) :]
    late = late[np.isfinite(late)]
    lowest = np.minimum.accumulate(np.maximum(late, 1e-12))
    return float(np.max(np.maximum(late, 1e-12) / lowest, initial=1.0))


_SHOWN = {
    ("GD", 0.001): ("0.7", "-"),
    ("GD", 0.0015): ("0.7", "--"),
    ("heavy ball", 0.0015, 0.8): ("#56B4E9", "-"),
    ("heavy ball", 0.0015, 0.9): ("#56B4E9", "--"),
    ("RMSprop", 0.001, 0.9): ("#E69F00", "-"),
    ("RMSprop", 0.0005, 0.9): ("#E69F00", "--"),
    ("Adam", 0.01, 0.9, 0.99): ("#0072B2", "-"),
    ("Adam", 0.005, 0.9, 0.99): ("#0072B2", "--"),
    ("Adam", 0.01, 0.9, 0.999): ("black", "-"),
    ("Adam", 0.005, 0.9, 0.999): ("black", "--"),
    ("Csawg K2", 0.001): ("#009E73", "-"),
    ("Csawg K10", 0.001): ("#009E73", "--"),
    ("Csawg-p5 K2", 0.001): ("#D55E00", "-"),
    ("Csawg-p5 K10", 0.001): ("#D55E00", "--"),
}


def _draw(errors: Mapping[tuple[Any, ...], Any]) -> Any:
    figure = lib.figure(12, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for key, (colour, style) in _SHOWN.items():
        shown = lib.positive(errors[key])
        left.plot(shown, color=colour, linestyle=style, linewidth=1.2, label=_label(key))
    left.set(yscale="log", xlim=(0, None), ylim=(1e-15, 10), xlabel="gradient evaluation",
             ylabel="‖w − w*‖", title="error")  # fmt: skip
    left.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    families = list(dict.fromkeys(key[0] for key in errors))
    for index, family in enumerate(families):
        finals = [max(x[-1], 1e-17) for key, x in errors.items() if key[0] == family]
        right.plot([index] * len(finals), finals, "o", color=plots.COLOURS[0], alpha=0.6)
    right.set_xticks(range(len(families)), families, rotation=45, ha="right", fontsize=8)
    right.set(yscale="log", ylabel="‖w − w*‖ at the end", title="every setting (0 drawn at 1e-17)")
    return figure


def _findings(errors: Mapping[tuple[Any, ...], Any]) -> list[Finding]:
    descent = errors["GD", 0.001]
    final = {key: x[-1] for key, x in errors.items()}
    balls = {key[2]: x for key, x in errors.items() if key[0] == "heavy ball"}
    rms = {key: x for key, x in errors.items() if key[0] == "RMSprop"}
    adam = {key: x for key, x in errors.items() if key[0] == "Adam"}
    rises = {p: _rise(x, 50) for p, x in balls.items()}
    ahead = [descent[-1] / x[-1] for x in rms.values() if x[-1] < descent[-1]]
    crossing = _crossing(rms["RMSprop", 5e-4, 0.9], rms["RMSprop", 1e-3, 0.9])
    overtakes = {key: lib.below_from(x, descent) for key, x in adam.items()}
    fast = {k: x for k, x in adam.items() if k[3] == 0.99 and k[2] <= 0.99}
    slow = {k: overtakes[k] for k in adam if k[3] == 0.999 and k[2] == 0.9}
    planned = [errors[f"Csawg-p5 K{k}", 0.001] for k in (2, 10)]
    repeated_from = [lib.below_from(x, balls[0.8][: len(x)]) for x in planned]
    single = min(final[f"Csawg K{k}", 0.001] for k in rosenbrock.WINDOWS)
    best_adam = min(adam, key=lambda key: final[key])
    return [
        Finding(
            "Heavy ball is much faster than GD and single-step Csawg",
            "much faster",
            f"at the end p = .8 {lib.number(final['heavy ball', 0.0015, 0.8])}, p = .9 "
            f"{lib.number(final['heavy ball', 0.0015, 0.9])}; best Csawg {lib.number(single)}, GD "
            f"{lib.number(descent[-1])}",
            verdict(final["heavy ball", 0.0015, 0.8] < single < descent[-1]),
        ),
        Finding(
            "A large p inevitably leads to oscillation around the minimum in the end",
            "oscillation",
            "largest rise of the error after evaluation 50, above 1e-12: "
            + ", ".join(f"p = {p:g} {x:.2g} ×" for p, x in rises.items()),
            verdict(max(rises.values()) > 1.5),
        ),
        Finding(
            "RMSprop's curves intersect around 9,000 iterations",
            "9,000",
            f"β = .9: α = .0005 goes below α = .001 at {lib.count(crossing)}",
            verdict(crossing is not None and 8500 <= crossing <= _LENGTH),
        ),
        Finding(
            "One RMSprop was faster than GD, but the speedup is insignificant",
            "one",
            f"{len(ahead)} of {len(rms)} settings end below GD .001"
            + (f", by {min(ahead):.0f} … {max(ahead):.0f} ×" if ahead else ""),
            verdict(len(ahead) == 1),
        ),
        Finding(
            "Two lines of Adam are faster than GD after a bit less than 2,000 iterations and "
            "oscillate above heavy ball",
            "< 2,000",
            "β₂ = .99, β₁ ≤ .99: ahead of GD from "
            + _spread([overtakes[k] for k in fast]) + " on, end between "
            f"{lib.number(min(final[k] for k in fast))} and "
            f"{lib.number(max(final[k] for k in fast))}, rising by up to "
            f"{max(_rise(x) for x in fast.values()):.2g} ×",
            "holds, and earlier" if max((overtakes[k] or 10**9) for k in fast) < 1500
            else verdict(sum((overtakes[k] or 10**9) < 2100 for k in fast) >= 2),
        ),
        Finding(
            "Two black lines with the larger α end better, but are faster than GD only after "
            "about 6,000",
            "6,000, the larger α",
            ", ".join(f"{_label(k)}: {lib.count(t)}" for k, t in slow.items()),
            verdict(all(t is not None and 5000 < t < 7000 for t in slow.values())),
        ),
        Finding(
            "Adam can be slower than heavy ball",
            "slower",
            f"at 2,000: best Adam {lib.number(min(lib.at(x, 2000) for x in adam.values()))}, heavy "
            f"ball p = .9 {lib.number(lib.at(balls[0.9], 2000))}; at the end {_label(best_adam)} "
            f"{lib.number(final[best_adam])}, heavy ball "
            f"{lib.number(final['heavy ball', 0.0015, 0.9])}",
            "holds for the speed, not for the end"
            if final[best_adam] < 10 * final["heavy ball", 0.0015, 0.9]
            else verdict(True),
        ),
        Finding(
            "Repeated planning is faster than heavy ball after a few beginning iterations",
            "a few; specification: below p = .8 from evaluation 231/214 on",
            lib.listed(repeated_from, lib.count) + " (K2/K10)",
            verdict(None not in repeated_from),
        ),
    ]  # fmt: skip


def _crossing(slow: Any, fast: Any) -> int | None:
    """When the curve that is behind goes ahead for good, but for oscillations within 100 steps."""
    smooth = (np.convolve(np.log(x), np.full(100, 0.01), "valid") for x in (slow, fast))
    found = lib.below_from(*smooth)
    return None if found is None else found + 50


def _spread(values: list[int | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{min(known):,} … {max(known):,}" if known else "never"

"""Quick problems on which `optgrad.auto` is taken apart, and how two of its forms are compared."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optgrad.experiments import (
    catalogue,
    compilation,
    data,
    engine,
    gaps,
    problems,
    results,
    scores,
)
from optgrad.registry import Method

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Quick:
    """A problem, its budget and how many seeds it gets; ``vmapped``: where that is the faster."""

    build: Callable[[], problems.Problem]
    steps: int
    seeds: int
    vmapped: bool = False


def _named(name: str, **options: Any) -> Callable[[], problems.Problem]:
    return lambda: catalogue.create_problem(name, **options)


def _digits() -> problems.Problem:
    return problems.image_classification(data.load("digits"), "mlp_small", batch_size=64)


QUICK: Mapping[str, Quick] = {
    "quadratic_axes": Quick(
        _named("noisy_quadratic", spectrum="clustered", rotated=False, noise=0.1), 1000, 5, True
    ),
    "quadratic_rotated": Quick(_named("noisy_quadratic", noise=1.0), 1000, 5, True),
    "rosenbrock": Quick(_named("rosenbrock", dimension=10, noise=0.3), 2000, 5, True),
    "logistic": Quick(_named("sparse_logistic", batch_size=16), 1000, 5),
    "digits": Quick(_digits, 400, 5),
    "embedding": Quick(_named("embedding", batch_size=64, width=16), 1000, 3),
    "attention": Quick(_named("attention", batch_size=16, width=16, context=16), 600, 3),
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one is behind another in percent, as `gaps` counts it, and its standard error.

    The runs of a seed have the same start and the same batches, so the error is that of the mean
    of the differences seed by seed.
    """

    percent: float
    error: float

    @property
    def is_ahead(self) -> bool:
        """By more than 1 % and two standard errors."""
        return self.percent < -max(1.0, 2 * self.error)

    @property
    def is_behind(self) -> bool:
        """By more than 1 % and two standard errors."""
        return self.percent > 1.0 and not self.percent <= 2 * self.error


def train(
    quick: Quick,
    problem: problems.Problem,
    method: Method,
    settings: Sequence[Mapping[str, float]],
    **fixed: Any,
) -> list[gaps.Result]:
    """What each setting reached: the score of each seed at the start and after the last step.

    All settings and seeds share one compiled program.

    Args:
      quick: the budget.
      problem: what it builds.
      method: the optimizer.
      settings: hyperparameters that are traced, the same names in all.
      fixed: other hyperparameters.
    """
    vectorize = "vmap" if quick.vmapped else "map"
    trainer = engine.Trainer(problem, method, fixed, eval_every=quick.steps, vectorize=vectorize)
    rows = [setting for setting in settings for _ in range(quick.seeds)]
    values = {name: np.array([row[name] for row in rows]) for name in settings[0]}
    seeds = np.tile(np.arange(quick.seeds), len(settings))
    history = trainer.train(engine.Runs(values, seeds), quick.steps)
    found = history.metrics[problem.score.name].reshape(len(settings), quick.seeds, -1)
    return [gaps.Result("", run[:, 0].tolist(), run[:, -1].tolist()) for run in found]


def difference(mine: gaps.Result, other: gaps.Result, kind: gaps.Kind) -> Difference:
    """How far one is behind another, seed by seed.

    Examples:
      >>> mine = gaps.Result("", [2.3, 2.3], [0.21, 0.22])
      >>> found = difference(mine, gaps.Result("", [2.3, 2.3], [0.2, 0.2]), "loss")
      >>> round(found.percent, 6), round(found.error, 6), found.is_behind
      (7.5, 2.5, True)
    """
    if mine.failed:
        return Difference(math.inf, math.nan)
    here, there = np.asarray(mine.finals, float), np.asarray(other.finals, float)
    if kind == "points":
        each = there - here
    elif kind == "loss":
        each = (here - there) / abs(there.mean())
    else:
        tiny = np.finfo(np.float32).tiny
        logs = [np.log(np.maximum(x, tiny)) for x in (here, there, np.asarray(other.starts, float))]
        each = (logs[0] - logs[1]) / np.mean(logs[2] - logs[1])
    count = len(each)
    error = float(np.std(each, ddof=1)) / count**0.5 if count > 1 else math.nan
    return Difference(100 * float(np.mean(each)), 100 * error)


def numbers(mine: gaps.Result, other: gaps.Result, score: scores.Score) -> Row:
    """What a table has of a result, and how far it is behind another."""
    kind = gaps.kind_of(score)
    behind, final = difference(mine, other, kind), gaps.typical(mine, kind)
    return {
        "score": score.name, "final": float(f"{final:.6g}"), "text": score.text(final),
        "percent": round(behind.percent, 4), "error": round(behind.error, 4),
        "seeds": len(mine.finals),
    }  # fmt: skip


def write(rows: Sequence[Row], text: str, folder: Path, csv: str) -> None:
    """The report and, but for their texts, the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    results.write_csv(folder / csv, [{k: v for k, v in r.items() if k != "text"} for r in rows])
    (folder / "report.md").write_text(text, encoding="utf-8")


def main(
    description: str,
    measure: Callable[..., list[Row]],
    write_all: Callable[[Sequence[Row], Path], None],
    variants: Sequence[str] = (),
) -> None:
    """The command of a script that measures on these problems, and writes after each.

    Args:
      description: of the script.
      measure: name and problem -> rows; with ``variants``, called with those that are chosen.
      write_all: writes rows into a folder.
      variants: what can be chosen.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--problems", nargs="+", choices=QUICK, default=list(QUICK))
    if variants:
        parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    arguments = parser.parse_args()
    chosen = {"variants": arguments.variants} if variants else {}
    compilation.cache_on_disk()
    rows: list[Row] = []
    for name in arguments.problems:
        rows += measure(name, QUICK[name], **chosen)
        write_all(rows, arguments.output)
        print(f"{name}: done", flush=True)
        jax.clear_caches()


def percent(value: float) -> str:
    """A difference for a table.

    Examples:
      >>> percent(-0.123), percent(123.4), percent(math.inf)
      ('-0.12', '+123', 'diverged')
    """
    if math.isinf(value):
        return "diverged"
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+.3g}"
    return "+0.00" if text == "-0.00" else text

"""What the paper says about figures 3, 6 and 7, judged by paired differences over common seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from optgrad.experiments import compare
from optgrad.experiments.reproduce import Finding
from optgrad.experiments.reproduce import dissecting_claims as claims
from optgrad.experiments.reproduce import dissecting_training as training

Outcomes = Mapping[tuple[str, str], compare.Outcome]
_POINTS = {"mnist": 0.5, "cifar10": 2.0, "cifar100": 2.0}  # accuracies that close are alike
_SHARE = 0.1  # and losses within ten per cent of each other
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


class Pair(NamedTuple):
    """How much better ``first`` is than ``second``, by metric."""

    first: str
    second: str
    loss: claims.Difference  # of the second's final training loss from the first's
    accuracy: claims.Difference  # of the first's final test accuracy from the second's
    typical_loss: float
    at_edge: tuple[str, ...] = ()  # those whose rate may not be their best

    def text(self) -> str:
        """Both differences in words."""
        names = f"{training.LABELS[self.first]} against {training.LABELS[self.second]}"
        lower = self.loss._replace(mean=-self.loss.mean)
        return (
            f"{names}: training loss {lower.text(digits=4)}, accuracy "
            f"{self.accuracy.text(100, 2, ' points')}"
        )

    def judged(self, verdict: str) -> str:
        """The verdict on "first is better"; none where a better rate could overturn it."""
        overturned = {"holds": self.second, "does not hold": self.first}.get(verdict)
        return claims.UNDECIDED if overturned in self.at_edge else verdict


def pair(outcomes: Outcomes, name: str, first: str, second: str) -> Pair:
    """Compares two methods on a test problem, seed by seed."""
    one, other = outcomes[name, first], outcomes[name, second]
    accuracies = [compare.final_values(found, "test_accuracy") for found in (one, other)]
    losses = [compare.final_values(found, "train_loss") for found in (one, other)]
    kept = np.concatenate(losses)[np.isfinite(np.concatenate(losses))]
    return Pair(
        first,
        second,
        _difference(losses[1], losses[0]),
        _difference(*accuracies),
        float(kept.mean()) if len(kept) else np.nan,
        tuple(m for m, found in ((first, one), (second, other)) if found.tuned.at_edge),
    )


def _difference(first: Any, second: Any) -> claims.Difference:
    """Paired by seed; none where one of the methods has no runs."""
    shared = min(len(first), len(second))
    return claims.difference(first[:shared], second[:shared])


def _better(pairs: Sequence[Pair]) -> str:
    return _by_metric(
        claims.all_hold([p.judged(claims.is_above(p.loss)) for p in pairs]),
        claims.all_hold([p.judged(claims.is_above(p.accuracy)) for p in pairs]),
    )


def _alike(pairs: Sequence[Pair], points: float) -> str:
    return _between(-1.0, pairs, points)


def _no_gain(pairs: Sequence[Pair], points: float) -> str:
    """Not better by more than what counts as alike; it may be worse."""
    return _between(-np.inf, pairs, points)


def _between(worse: float, pairs: Sequence[Pair], points: float) -> str:
    """Better by no more than what counts as alike, and by no less than ``worse`` times that."""
    if any(p.at_edge for p in pairs):
        return claims.UNDECIDED
    lengths = [(p, _SHARE * p.typical_loss) for p in pairs]
    share = points / 100
    return _by_metric(
        claims.all_hold([claims.is_within(p.loss, worse * d, d) for p, d in lengths]),
        claims.all_hold([claims.is_within(p.accuracy, worse * share, share) for p in pairs]),
    )


def _by_metric(loss: str, accuracy: str) -> str:
    return loss if loss == accuracy else f"training loss: {loss}; test accuracy: {accuracy}"


def _finding(
    outcomes: Outcomes,
    name: str,
    statement: str,
    pairs: Sequence[tuple[str, str]],
    expected: Literal["better", "alike", "no gain"] = "better",
) -> Finding:
    found = [pair(outcomes, name, *names) for names in pairs]
    points = _POINTS[name]
    if expected == "better":
        meant, verdict = "lower training loss, higher test accuracy", _better(found)
    elif expected == "alike":
        meant = f"loss within {100 * _SHARE:g} %, accuracy within {points:g} points"
        verdict = _alike(found, points)
    else:
        meant = (
            f"loss less than {100 * _SHARE:g} % lower, accuracy less than {points:g} points higher"
        )
        verdict = _no_gain(found, points)
    edges = dict.fromkeys(training.LABELS[method] for p in found for method in p.at_edge)
    measured = "; ".join(p.text() for p in found)
    if edges:
        measured += f"; the best rate is at the edge of what was tried: {', '.join(edges)}"
    return Finding(f"{TITLES[name]}: {statement}", meant, measured, verdict)


# Figure 3 ---------------------------------------------------------------------------------------


def figure3(outcomes: Outcomes) -> list[Finding]:
    """The claims of section 4.2."""
    judges: Mapping[str, Callable[[Outcomes], list[Finding]]] = {
        "mnist": _mnist,
        "cifar10": _cifar10,
        "cifar100": _cifar100,
    }
    there = {name for name, _ in outcomes}
    return [found for name, judge in judges.items() if name in there for found in judge(outcomes)]


def _mnist(outcomes: Outcomes) -> list[Finding]:
    return [
        _finding(outcomes, "mnist", "Adam clearly outperforms M-SGD", [("adam", "momentum")]),
        _finding(
            outcomes, "mnist", "only a very small difference between M-SSD and Adam",
            [("m_ssd", "adam")], "alike",
        ),
        _finding(
            outcomes, "mnist", "M-SVAG is a considerable boost over M-SGD", [("m_svag", "momentum")]
        ),
        _finding(
            outcomes, "mnist", "M-SVAG is outperformed by both sign-based methods",
            [("adam", "m_svag"), ("m_ssd", "m_svag")],
        ),
    ]  # fmt: skip


def _cifar10(outcomes: Outcomes) -> list[Finding]:
    return [
        _finding(
            outcomes, "cifar10", "the sign-based methods have superior performance",
            [(sign, other) for sign in ("adam", "m_ssd") for other in ("momentum", "m_svag")],
        ),
        _finding(
            outcomes, "cifar10",
            "neither M-SSD nor M-SGD benefits significantly from variance adaptation",
            [("adam", "m_ssd"), ("m_svag", "momentum")], "no gain",
        ),
    ]  # fmt: skip


def _cifar100(outcomes: Outcomes) -> list[Finding]:
    ahead = pair(outcomes, "cifar100", "momentum", "adam")
    return [
        _finding(outcomes, "cifar100", "M-SGD outperforms Adam", [("momentum", "adam")]),
        Finding(
            "CIFAR-100: by almost 10 percentage points",
            "between 7 and 12 points",
            ahead.accuracy.text(100, 2, " points"),
            claims.is_within(ahead.accuracy, 0.07, 0.12),
        ),
        _stability(outcomes),
        _finding(
            outcomes, "cifar100",
            "variance adaptation has a small but significant positive effect for both",
            [("adam", "m_ssd"), ("m_svag", "momentum")],
        ),
        _early(outcomes),
    ]  # fmt: skip


def _stability(outcomes: Outcomes) -> Finding:
    """Variances of Adam's and M-SGD's final accuracy, by an F test."""
    spreads = {}
    for method in ("adam", "momentum"):
        values = compare.final_values(outcomes["cifar100", method], "test_accuracy")
        values = values[np.isfinite(values)]
        spreads[method] = (values.std(ddof=1) if len(values) > 1 else np.nan, len(values))
    (adam, n), (momentum, m) = spreads["adam"], spreads["momentum"]
    measured, told = f"{n} and {m} runs that did not diverge", claims.UNDECIDED
    if n > 1 and m > 1 and momentum > 0:
        p = float(scipy.stats.f.sf((adam / momentum) ** 2, n - 1, m - 1))
        measured = (
            f"standard deviations {100 * adam:.2f} and {100 * momentum:.2f} points, F test p = "
            f"{p:.2g}"
        )
        told = "holds" if p < 0.025 else "does not hold" if p > 0.975 else told
    return Finding(
        "CIFAR-100: Adam is much less stable, with larger variance in performance",
        "larger standard deviation of the test accuracy than M-SGD's",
        measured,
        told,
    )


def _early(outcomes: Outcomes) -> Finding:
    losses = [training.early_loss(outcomes["cifar100", m]) for m in ("momentum", "m_svag")]
    faster = _difference(*losses)
    return Finding(
        "CIFAR-100: M-SVAG starts faster than M-SGD",
        "lower mean training loss over the first third of the steps",
        f"M-SGD − M-SVAG: {faster.text(digits=4)}",
        claims.is_above(faster),
    )


# Figures 6 and 7 --------------------------------------------------------------------------------


def figure6(outcomes: Outcomes) -> list[Finding]:
    """Adam, Adam* and Adam*-mb are alike."""
    return [
        _finding(
            outcomes, name, "Adam and both variants exhibit very similar performance",
            [("adam_star", "adam"), ("adam_star_mb", "adam"), ("adam_star_mb", "adam_star")],
            "alike",
        )
        for name in dict.fromkeys(name for name, _ in outcomes)
    ]  # fmt: skip


def figure7(outcomes: Outcomes) -> list[Finding]:
    """M-SVAG and M-SVAG-mb are alike."""
    return [
        _finding(
            outcomes, name, "both versions of M-SVAG exhibit very similar performance",
            [("m_svag_mb", "m_svag")], "alike",
        )
        for name in dict.fromkeys(name for name, _ in outcomes)
    ]  # fmt: skip

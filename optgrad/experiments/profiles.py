"""Several studies together: performance profiles and mean ranks of the optimizers they share."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from optgrad.experiments import statistics
from optgrad.experiments.compare import Comparison, Outcome, final_scores, steps_to_target
from optgrad.experiments.scores import Score

COSTS = ("gradient evaluations to target", "final score")


@dataclasses.dataclass(frozen=True)
class Profile:
    r"""The performance profile of one optimizer (Dolan & Moré 2002, equation 2.1).

    .. math::
      \rho_s(\tau) = \frac 1{n_p} |\{p : t_{p,s} \le \tau \min_{s'} t_{p,s'}\}|

    Attributes:
      factors: where the share changes, increasing, the first one 1.
      shares: :math:`\rho_s` from that factor on, in [0, 1].
    """

    factors: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Profiles:
    """The profiles by one cost, over all instances, each a study with a seed.

    Attributes:
      cost: one of `COSTS`.
      profiles: label -> its profile; empty if there is no instance.
      instances: study -> how many of its seeds count.
      left_out: study -> why it has none.
    """

    cost: str
    profiles: Mapping[str, Profile]
    instances: Mapping[str, int]
    left_out: Mapping[str, str]


def performance_profiles(costs: Mapping[str, npt.ArrayLike]) -> dict[str, Profile]:
    """The share of instances on which each one's cost is within a factor of the best one's.

    Args:
      costs: label -> its cost on each instance, in the same order: not negative, ∞ where it failed.
        Where all failed nobody counts as the best.

    Raises:
      ValueError: a negative or missing cost, or not one for each instance.

    Examples:
      >>> found = performance_profiles({"a": [1.0, 2.0, 4.0], "b": [2.0, 1.0, float("inf")]})
      >>> found["a"].factors.tolist(), found["a"].shares.round(2).tolist()
      ([1.0, 2.0], [0.67, 1.0])
      >>> found["b"].factors.tolist(), found["b"].shares.round(2).tolist()
      ([1.0, 2.0], [0.33, 0.67])

    References:
      E. D. Dolan, J. J. Moré, *Benchmarking optimization software with performance profiles*,
      Mathematical Programming 91, 2002.
    """
    table = np.array([np.asarray(values, float) for values in costs.values()])
    if table.ndim != 2 or not np.all(table >= 0.0):
        raise ValueError(f"costs = {dict(costs)}; accepted: numbers >= 0, one for each instance")
    best = table.min(axis=0, initial=np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(table == best, 1.0, table / best)  # 0 / 0 is as good as the best
    ratios = np.where(np.isfinite(table), ratios, np.inf)
    return {label: _profile(row) for label, row in zip(costs, ratios, strict=True)}


def _profile(ratios: npt.NDArray[np.float64]) -> Profile:
    factors = np.unique(np.append(ratios[np.isfinite(ratios)], 1.0))
    shares = (ratios[:, None] <= factors).mean(axis=0) if ratios.size else np.zeros_like(factors)
    return Profile(factors, shares)


def profiles_by(cost: str, studies: Mapping[str, Comparison]) -> Profiles:
    """The profiles of the optimizers that all studies have, over their common seeds.

    Args:
      cost: ``"gradient evaluations to target"``, by the registry's nominal cost of a step, counted
        from the first evaluation after the start, or ``"final score"``: the share of errors for an
        accuracy, otherwise a loss that is never negative.
      studies: name -> study.
    """
    labels = common_labels(list(studies.values()))
    costs: dict[str, list[float]] = {label: [] for label in labels}
    instances, left_out = {}, {}
    for name, study in studies.items():
        chosen = [o for o in study.outcomes if o.config.label in costs]
        by_seed = {o.config.label: _costs(cost, o, study) for o in chosen}
        seeds = _common_seeds(list(by_seed.values()))
        if reason := _reason_against(cost, study.score, by_seed, seeds):
            left_out[name] = reason
            continue
        instances[name] = len(seeds)
        for label, found in by_seed.items():
            costs[label] += [found.get(seed, np.inf) for seed in seeds]
    profiles = performance_profiles(costs) if instances and labels else {}
    return Profiles(cost, profiles, instances, left_out)


def _costs(cost: str, outcome: Outcome, study: Comparison) -> dict[int, float]:
    """Seed -> cost of that final run; infinite if it failed."""
    if cost == "final score":
        score = study.score
        finals = final_scores(outcome, score)
        if score.in_percent:
            finals = {seed: 1.0 - value for seed, value in finals.items()}
        return {seed: np.inf if np.isnan(v) else v for seed, v in finals.items()}
    final = outcome.tuned.final
    if final is None:
        return {}
    first = final.history.steps[1]
    steps = np.maximum(steps_to_target(final, study.target, study.score), first)
    evaluations = steps * outcome.cost_per_step["gradient_evaluations"]
    evaluations = np.where(final.history.diverged_at > 0, np.inf, evaluations)
    return {int(seed): float(n) for seed, n in zip(final.seeds, evaluations, strict=True)}


def _common_seeds(by_label: Sequence[Mapping[int, float]]) -> list[int]:
    """Of those that have final runs; without any (nothing was stable) one fails with every seed."""
    having = [set(found) for found in by_label if found]
    return sorted(set.intersection(*having)) if having else []


def _reason_against(
    cost: str, score: Score, by_label: Mapping[str, Mapping[int, float]], seeds: Sequence[int]
) -> str:
    """Why a study has no instances; empty if it has."""
    if cost == "final score" and score.larger_is_better and not score.in_percent:
        return "a score of which more is better, and no share of errors"
    if not by_label:
        return "no optimizer that all studies have"
    if not seeds:
        return "no seed that all final runs have in common"
    if any(value < 0.0 for found in by_label.values() for value in found.values()):
        return "a negative score, of which there is no factor"
    return ""


def common_labels(studies: Sequence[Comparison]) -> list[str]:
    """The optimizers, by label, that all studies have, in the order of the first one."""
    having = [[outcome.config.label for outcome in study.outcomes] for study in studies]
    return [label for label in (having[0] if having else []) if all(label in h for h in having)]


def ranks(study: Comparison, labels: Sequence[str]) -> dict[str, float]:
    """Label -> rank among ``labels`` by the mean of its final runs; 1 is best, ties share theirs.

    Those without a finite value share the last ranks.
    """
    sign = -1.0 if study.score.larger_is_better else 1.0
    finals = {o.config.label: final_scores(o, study.score).values() for o in study.outcomes}
    means = sign * np.array([statistics.finite_mean(finals[label]) for label in labels])
    found = stats.rankdata(np.where(np.isnan(means), np.inf, means))
    return {label: float(rank) for label, rank in zip(labels, found, strict=True)}

"""Tables and sentences about several studies together."""

from collections.abc import Sequence

import numpy as np

from optgrad.experiments import profiles, report
from optgrad.experiments.stored import Study

RANKS = (
    "Rank of each optimizer by the mean of its final runs, among those that all studies have; 1 is "
    "best, equal means share their ranks, and who has no finite result is last."
)
PROFILES = (
    "Performance profile (Dolan & Moré 2002): the share of all pairs of a study and one of its "
    "common seeds at which an optimizer's cost is within the factor τ of the smallest cost there. "
    "At τ = 1 it is the share of pairs at which it is the best; at the right end, the share at "
    "which it gets there at all. Steps to target are counted to the first evaluation at the "
    "study's target; the cost of a final score is the share of errors (1 − accuracy) or the loss. "
    "A run that diverged, or an optimizer without a stable value, has an infinite cost."
)

Table = tuple[Sequence[str], list[list[str]]]


def labels(studies: Sequence[Study]) -> list[str]:
    """All optimizers by label; the place of one in the list is its colour everywhere."""
    return list(dict.fromkeys(o.config.label for s in studies for o in s.comparison.outcomes))


def overview(studies: Sequence[Study]) -> Table:
    """Header and rows: what was compared, and who won."""
    rows = []
    for study in studies:
        found, config = study.comparison, study.comparison.config
        ranking = found.ranking()
        best = ranking.order[0] if ranking.differences else "–"
        sizes = (len(found.outcomes), config.steps, config.seeds)
        rows.append([study.name, found.score.title, *map(str, sizes), best, ranking.winner or "–"])
    header = ("study", "score", "optimizers", "steps", "seeds", "best mean", "winner")
    return header, rows


def results(studies: Sequence[Study]) -> Table:
    """Header and rows: mean ± sd of each study's score, for each optimizer that any has."""
    found = labels(studies)
    rows = []
    for study in studies:
        score = study.comparison.score
        by_label = {
            record["optimizer"]: report.mean_sd(record, score.name, score.text)
            for record in study.comparison.summary()
        }
        cells = (by_label.get(label, "") for label in found)
        rows.append([f"{study.name}: {score.heading}", *cells])
    return ("mean ± sd of the score", *found), rows


def mean_ranks(studies: Sequence[Study]) -> Table:
    """Header and rows, the best first: mean rank over the studies, and the rank in each."""
    common = profiles.common_labels([study.comparison for study in studies])
    by_study = [profiles.ranks(study.comparison, common) for study in studies]
    means = {label: float(np.mean([ranks[label] for ranks in by_study])) for label in common}
    rows = [
        [label, f"{means[label]:.2f}", *(f"{ranks[label]:g}" for ranks in by_study)]
        for label in sorted(common, key=lambda label: means[label])
    ]
    return ("optimizer", "mean rank", *(study.name for study in studies)), rows


def not_common(studies: Sequence[Study]) -> str:
    """A sentence that names the optimizers that some study lacks; empty if there are none."""
    common = profiles.common_labels([study.comparison for study in studies])
    if lacking := [label for label in labels(studies) if label not in common]:
        return f"Left out, because not every study has them: {', '.join(lacking)}."
    return ""


def all_profiles(studies: Sequence[Study]) -> list[profiles.Profiles]:
    """By every cost of which there is an instance, and at least two optimizers."""
    by_name = {study.name: study.comparison for study in studies}
    found = [profiles.profiles_by(cost, by_name) for cost in profiles.COSTS]
    return [one for one in found if len(one.profiles) > 1]


def instances(found: profiles.Profiles) -> str:
    """A sentence: over what the shares are."""
    counted = ", ".join(f"{name} ({seeds} seeds)" for name, seeds in found.instances.items())
    text = f"By {found.cost}: {counted}."
    if found.left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
        text += f" Left out: {reasons}."
    return text

"""Intervals and tests, against SciPy and against their own promises."""

import numpy as np
import pytest
from scipy import stats

from optgrad.experiments import statistics


def finals(seed=0, count=8, **means):
    noise = np.random.default_rng(seed).normal(size=(len(means), count)) * 0.1
    return {
        label: {s: float(mean + noise[row, s]) for s in range(count)}
        for row, (label, mean) in enumerate(means.items())
    }


@pytest.mark.parametrize("larger_is_better", [True, False])
def test_differences_are_those_of_a_paired_t_test(larger_is_better):
    found = finals(a=0.0, b=0.3, c=1.0)
    ranking = statistics.ranking(found, larger_is_better=larger_is_better)
    assert list(ranking.order) == (["c", "b", "a"] if larger_is_better else ["a", "b", "c"])
    best, *rivals = ranking.order
    sign = 1 if larger_is_better else -1
    raw = []
    for label, difference in zip(rivals, ranking.differences, strict=True):
        test = stats.ttest_rel(list(found[best].values()), list(found[label].values()))
        low, high = np.sort(sign * np.array(test.confidence_interval(0.95)))
        np.testing.assert_allclose([difference.low, difference.high], [low, high], rtol=1e-12)
        assert difference.label == label
        raw.append(test.pvalue)
    np.testing.assert_allclose([d.p for d in ranking.differences], statistics.holm(raw), rtol=1e-9)


def test_winner_needs_every_rival_told_apart():
    assert statistics.ranking(finals(a=0.0, b=1.0), larger_is_better=True).winner == "b"
    assert (
        statistics.ranking(finals(seed=1, a=0.0, b=1.0, c=1.0), larger_is_better=True).winner
        is None
    )
    assert statistics.ranking(finals(a=0.0), larger_is_better=True).winner is None
    few = finals(count=2, a=0.0, b=9.0)
    assert statistics.ranking(few, larger_is_better=True).winner is None


def test_a_difference_without_spread():
    same = {"a": dict.fromkeys(range(4), 1.0), "b": dict.fromkeys(range(4), 1.0)}
    found = statistics.ranking(same, larger_is_better=True)
    assert found.winner is None
    assert found.differences[0].p == 1.0
    better = same | {"a": dict.fromkeys(range(4), 2.0)}
    assert statistics.ranking(better, larger_is_better=True).winner == "a"


def test_diverged_runs():
    found = finals(a=0.0, b=1.0)
    found["b"][3] = np.nan
    found["c"] = dict.fromkeys(range(8), np.nan)
    ranking = statistics.ranking(found, larger_is_better=True)
    assert list(ranking.order) == ["b", "a", "c"]
    assert [d.label for d in ranking.differences] == ["a"]
    assert ranking.differences[0].seeds == 7
    assert ranking.winner is None, "it diverged once"
    found["a"][0] = np.nan
    del found["b"][3]
    assert statistics.ranking(found, larger_is_better=True).winner == "b"


def test_nothing_finite():
    found = {"a": {0: np.nan}, "b": {}}
    assert statistics.ranking(found, larger_is_better=True) == statistics.Ranking(
        ["a", "b"], (), None
    )


def test_error_rate_of_the_winner():
    """Among five that are all alike, one is called the winner at most about one time in twenty."""
    called = [
        statistics.ranking(
            finals(seed, 5, a=0.0, b=0.0, c=0.0, d=0.0, e=0.0), larger_is_better=True
        ).winner
        for seed in range(400)
    ]
    assert sum(x is not None for x in called) <= 0.05 * 400


def test_holm_against_its_definition():
    p = np.random.default_rng(0).uniform(size=7) ** 3
    order = np.sort(p)
    corrected = [
        max(min(1.0, (len(p) - j) * order[j]) for j in range(i + 1)) for i in range(len(p))
    ]
    np.testing.assert_allclose(np.sort(statistics.holm(p)), corrected)


def test_median_interval():
    """Against SciPy's, and where there is next to nothing."""
    values = np.random.default_rng(1).normal(size=40)
    expected = stats.bootstrap(
        (values,), np.median, n_resamples=10_000, method="percentile"
    ).confidence_interval
    np.testing.assert_allclose(statistics.median_interval(values), expected, atol=0.1)
    assert statistics.median_interval([2.0]) == (2.0, 2.0)
    assert np.isnan(statistics.median_interval([])).all()
    with pytest.raises(ValueError, match="level = 1"):
        statistics.median_interval([1.0], level=1.0)

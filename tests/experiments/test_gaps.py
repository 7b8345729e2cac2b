"""How far an optimizer is behind: by hand, for each kind of score, and where runs failed."""

import math

import numpy as np
import pytest

from optgrad.experiments import gaps
from optgrad.experiments.function_problems import EXCESS
from optgrad.experiments.gaps import Result
from optgrad.experiments.scores import ACCURACY, LOSS, Score

NAN = math.nan


def test_the_kind_follows_from_the_score():
    assert [gaps.kind_of(score) for score in (ACCURACY, LOSS, EXCESS)] == [
        "points",
        "loss",
        "decades",
    ]
    with pytest.raises(ValueError, match="test_reward; accepted: a share"):
        gaps.kind_of(Score("reward", larger_is_better=True))


def test_points_of_accuracy():
    auto = Result("auto", [0.1] * 2, [0.95, 0.97])
    adam = Result("adam", [0.1] * 3, [0.96, 0.97, 0.98])
    found = gaps.gap(auto, adam, "points")
    assert found.percent == pytest.approx(1.0)
    assert found.error == pytest.approx(100 * math.hypot(0.01, 0.01 / 3**0.5))
    assert math.isnan(found.ratio)
    assert gaps.gap(adam, auto, "points").percent == pytest.approx(-1.0)


def test_a_loss_relative_to_the_best():
    auto, adam = Result("auto", [9.0], [0.22, 0.20]), Result("adam", [7.0], [0.2])
    found = gaps.gap(auto, adam, "loss")
    assert found.percent == pytest.approx(5.0)
    assert math.isnan(found.error)  # of one seed


def test_decades_below_each_ones_own_start():
    """From 100 to 1e-1 and 1e-3, from 10 to 1e-4: four of five decades."""
    auto, adam = Result("auto", [100.0, 100.0], [1e-1, 1e-3]), Result("adam", [10.0], [1e-4])
    found = gaps.gap(auto, adam, "decades")
    assert found.percent == pytest.approx(20.0)
    assert found.ratio == pytest.approx(100.0)
    assert not found.within(1.0)
    assert gaps.gap(adam, adam, "decades").within(0.0)


def test_an_excess_of_zero_is_the_smallest_number():
    found = gaps.gap(Result("auto", [1.0], [0.0]), Result("adam", [1.0], [1e-3]), "decades")
    assert found.percent < -1000
    assert np.isfinite(found.percent)


def test_decades_behind_one_that_gained_none_are_unknown():
    found = gaps.gap(Result("auto", [1.0], [0.5]), Result("adam", [1.0], [2.0]), "decades")
    assert math.isnan(found.percent)
    assert not found.within(1.0)


@pytest.mark.parametrize("finals", [[], [0.1, NAN], [0.1, math.inf]])
@pytest.mark.parametrize("kind", ["points", "loss", "decades"])
def test_one_run_that_diverges_is_a_failure(finals, kind):
    failed, fine = Result("auto", [1.0] * len(finals), finals), Result("adam", [1.0], [0.5])
    assert failed.failed
    found = gaps.gap(failed, fine, kind)
    assert found.percent == math.inf
    assert not found.within(1.0)
    assert gaps.best([failed, fine], kind) is fine
    assert gaps.best([failed], kind) is None


@pytest.mark.parametrize(("kind", "name"), [("points", "b"), ("loss", "a"), ("decades", "c")])
def test_the_best_by_the_mean_that_fits(kind, name):
    """Of an excess the geometric mean: one bad run of 0.6 does not undo a decade."""
    results = [
        Result("a", [1.0] * 2, [0.2, 0.2]),
        Result("b", [1.0] * 2, [0.5, 0.5]),
        Result("c", [1.0] * 2, [0.01, 0.6]),
    ]
    assert gaps.best(results, kind).label == name

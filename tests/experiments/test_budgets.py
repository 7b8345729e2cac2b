"""Equal budgets, and how exactly a learning rate must be met."""

import math

import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import budgets, robustness, tuning
from optgrad.experiments.engine import History
from optgrad.experiments.scores import ACCURACY, LOSS


@pytest.mark.parametrize("method", registry.methods(), ids=lambda m: m.name)
def test_gradient_evaluations_are_spent_and_no_more(method):
    steps, eval_every = budgets.of_gradient_evaluations(3000, 300, method.cost)
    assert steps % eval_every == 0
    assert 0.9 * 3000 < steps * method.cost <= 3000 + 1e-9
    assert eval_every * method.cost <= 300 + 1e-9


def test_a_cost_of_one_changes_nothing():
    assert budgets.of_gradient_evaluations(700, 70, 1.0) == (700, 70)


def test_there_is_at_least_one_step():
    assert budgets.of_gradient_evaluations(2, 1, 201.0) == (1, 1)
    assert budgets.of_seconds(0.001, 50, 1.0) == (50, 50)


def test_seconds_are_filled_with_whole_intervals():
    assert budgets.of_seconds(1.0, 10, 0.003) == (330, 10)
    assert budgets.of_seconds(0.3, 1, 0.1) == (3, 1)  # whatever 0.3/0.1 rounds to


# Robustness -----------------------------------------------------------------------------------


def stage(name, reached, metric="test_accuracy", diverged=(), **others):
    """One run of two evaluations for each value."""
    values = np.array(list(reached), float)
    history = History(
        np.array([0, 10]),
        {metric: np.array([[0.0, y] for y in reached.values()])},
        np.array([5 if value in diverged else 0 for value in values]),
        0.0,
    )
    return tuning.Stage(name, values, np.zeros(len(values), int), history, others)


def accuracy_curve(reached, **more):
    return robustness.sensitivity([stage("tuning", reached, **more)], "test_accuracy", ACCURACY,
                                  is_grid=True)  # fmt: skip


def test_crossings_are_interpolated_in_the_logarithm():
    """Straight lines in log10(rate) from 0.5 up to 1 and down again: within x it is 4x decades."""
    found = accuracy_curve({1e-3: 0.5, 1e-2: 1.0, 1e-1: 0.5})
    for tolerance in (0.01, 0.1, 0.25):
        low, high, at_edge = found.within(tolerance)
        assert low == pytest.approx(10 ** (-2 - 2 * tolerance))
        assert high == pytest.approx(10 ** (-2 + 2 * tolerance))
        assert found.within(tolerance).factor == pytest.approx(10 ** (4 * tolerance))
        assert not at_edge


def test_the_range_has_no_gap_and_stops_at_the_edge():
    found = accuracy_curve({1e-4: 0.99, 1e-3: 0.5, 1e-2: 1.0, 1e-1: 0.99})
    low, high, at_edge = found.within(0.05)
    assert 1e-3 < low < 1e-2  # not down to 1e-4
    assert (high, at_edge) == (1e-1, True)


def test_towards_a_rate_that_diverged_it_ends_at_the_last_that_did_not():
    found = accuracy_curve({1e-3: 0.5, 1e-2: 1.0, 1e-1: 0.99, 1.0: 0.99}, diverged=[1.0])
    assert found.within(0.05)[1:] == (1e-1, False)


def test_rates_found_unstable_in_the_search_are_no_edge():
    stages = [
        stage("stability", {10.0: 0.1, 1.0: 0.2, 0.1: 0.9}),
        stage("tuning", {1e-2: 0.5, 1e-1: 0.9}),
    ]
    found = robustness.sensitivity(stages, "test_accuracy", ACCURACY, is_grid=True)
    assert found.values.tolist() == [1e-2, 1e-1, 1.0, 10.0]
    assert found.within(0.01)[1:] == (1e-1, False)


def test_of_a_loss_the_limit_is_above_the_best():
    reached = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 3.0}  # crosses 2.2 a fifth of a decade away
    stages = [stage("tuning", reached, metric="test_loss")]
    found = robustness.sensitivity(stages, "test_loss", LOSS, is_grid=True)
    assert found.within(0.10).low == pytest.approx(10**-2.2)
    assert found.within(0.10).high == pytest.approx(10**-1.8)


def test_of_several_hyperparameters_the_others_are_at_their_best():
    values = {1e-3: 0.5, 1e-2: 1.0}
    one, two = stage("tuning", values), stage("tuning", {k: v / 2 for k, v in values.items()})
    both = tuning.Stage(
        "tuning",
        np.concatenate([one.values, two.values]),
        np.zeros(4, int),
        History(
            one.history.steps,
            {"test_accuracy": np.concatenate([s.history.metrics["test_accuracy"]
                                              for s in (two, one)])},
            np.zeros(4, int),
            0.0,
        ),
        {"b1": np.array([0.5, 0.5, 0.9, 0.9])},
    )  # fmt: skip
    found = robustness.sensitivity([both], "test_accuracy", ACCURACY, is_grid=True)
    assert found.reached.tolist() == [0.5, 1.0]
    assert robustness.sensitivity([both], "test_accuracy", ACCURACY, is_grid=False) is None


@pytest.mark.parametrize(
    "reached", [{0.1: 0.5}, {0.0: 0.5, 0.1: 0.6}, {0.1: 0.0, 1.0: 0.0}, {0.1: math.nan, 1.0: 0.5}]
)
def test_where_there_is_no_such_curve(reached):
    diverged = [v for v, y in reached.items() if math.isnan(y)]
    found = accuracy_curve(reached, diverged=diverged or ())
    assert (found is None) == (not diverged)


def test_nothing_tuned_has_none():
    assert robustness.sensitivity([], "test_accuracy", ACCURACY, is_grid=True) is None
    everything = {0.1: 0.5, 1.0: 0.5}
    assert accuracy_curve(everything, diverged=everything) is None


@pytest.mark.parametrize("best", [-1.0])
def test_a_negative_loss_has_no_fractions(best):
    stages = [stage("tuning", {0.1: best, 1.0: 2.0}, metric="test_loss")]
    assert robustness.sensitivity(stages, "test_loss", LOSS, is_grid=True) is None

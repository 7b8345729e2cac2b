"""Performance profiles and ranks, against explicit ones."""

import dataclasses

import numpy as np
import pytest

from optgrad.experiments import profiles
from optgrad.experiments.compare import Comparison
from optgrad.experiments.scores import LOSS, Score

from .made_up import made_up_comparison


def share_within(costs, label, factor):
    """Dolan & Moré, equation (2.1), one instance after the other."""
    instances = list(zip(*costs.values(), strict=True))
    own = list(costs).index(label)
    within = [row[own] <= factor * min(row) and row[own] < np.inf for row in instances]
    return sum(within) / len(within)


@pytest.mark.parametrize("salt", range(5))
def test_a_profile_is_that_of_dolan_and_more(salt):
    random = np.random.RandomState(salt)
    costs = {label: random.randint(1, 9, 20).astype(float) for label in "abc"}
    costs["b"][random.rand(20) < 0.3] = np.inf
    found = profiles.performance_profiles(costs)
    for label, profile in found.items():
        assert profile.factors[0] == 1.0
        assert np.all(np.diff(profile.factors) > 0)
        for factor in (1.0, 1.2, 2.0, 3.7, 1e6):
            at = np.searchsorted(profile.factors, factor, side="right") - 1
            assert profile.shares[at] == pytest.approx(share_within(costs, label, factor))


def test_where_all_fail_nobody_is_best_and_zero_is_as_good_as_zero():
    found = profiles.performance_profiles({"a": [np.inf, 0.0], "b": [np.inf, 0.0], "c": [1, 2]})
    assert found["a"].shares.tolist() == [0.5]
    assert (found["c"].factors.tolist(), found["c"].shares.tolist()) == ([1.0], [0.5])
    (alone,) = profiles.performance_profiles({"a": [np.inf, 2.0]}).values()
    assert alone.shares.tolist() == [0.5]


@pytest.mark.parametrize("costs", [{"a": [-1.0]}, {"a": [float("nan")]}, {}])
def test_costs_that_have_no_factors_are_refused(costs):
    with pytest.raises(ValueError, match="costs = "):
        profiles.performance_profiles(costs)


def test_a_run_that_diverged_later_has_not_reached_the_target():
    study = made_up_comparison()
    adam = study.outcomes[0]
    history = adam.tuned.final.history
    late = history._replace(diverged_at=np.full_like(history.diverged_at, 40))
    final = dataclasses.replace(adam.tuned.final, history=late)
    tuned = dataclasses.replace(adam.tuned, final=final)
    outcomes = (dataclasses.replace(adam, tuned=tuned), *study.outcomes[1:])
    study = dataclasses.replace(study, outcomes=outcomes)
    found = profiles.profiles_by("gradient evaluations to target", {"one": study})
    assert found.profiles["adam"].shares.tolist() == [0.0]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_the_same_scores_in_another_order_are_a_tie(order):
    values = np.array([0.1, 0.2, 0.3])
    study = made_up_comparison()

    def with_finals(outcome, found):
        history = outcome.tuned.final.history
        metrics = {**history.metrics, "test_accuracy": history.metrics["test_accuracy"].copy()}
        metrics["test_accuracy"][:, -1] = found
        final = dataclasses.replace(
            outcome.tuned.final,
            history=history._replace(metrics=metrics, diverged_at=np.zeros(3, int)),
        )
        return dataclasses.replace(outcome, tuned=dataclasses.replace(outcome.tuned, final=final))

    one, other = study.outcomes[:2]
    outcomes = (with_finals(one, values), with_finals(other, values[order]))
    study = dataclasses.replace(study, outcomes=outcomes)
    assert set(profiles.ranks(study, [o.config.label for o in outcomes]).values()) == {1.5}


def test_instances_are_the_common_seeds_of_those_with_final_runs():
    """Seeds 1 to 3 but for the untuned one, 0 to 2; nothing was stable for sgd: it fails."""
    study = made_up_comparison()
    found = profiles.profiles_by("gradient evaluations to target", {"one": study})
    assert found.instances == {"one": 2}
    assert found.profiles["sgd"].shares.tolist() == [0.0]
    assert found.profiles["adam"].shares[-1] == 1.0
    # Its seed 1 is the second run, at 17 steps diverged with an accuracy of 0.3; seed 2 the third.
    by_error = profiles.profiles_by("final score", {"one": study}).profiles
    assert by_error["M-SVAG, β=0.5"].shares[-1] == 0.5
    adam = study.outcomes[0].tuned.final.history.metrics["test_accuracy"][:2, -1]  # seeds 1, 2
    lbfgs = study.outcomes[3].tuned.final.history.metrics["test_accuracy"][1:, -1]
    svag = study.outcomes[1].tuned.final.history.metrics["test_accuracy"][:2, -1]
    errors = 1 - np.array([adam, np.where(np.isnan(svag), -np.inf, svag), lbfgs])
    wins = (errors[0] == errors.min(axis=0)).mean()
    profile = by_error["adam"]
    assert profile.shares[0] == pytest.approx(wins)
    assert profile.factors[-1] == pytest.approx((errors[0] / errors.min(axis=0)).max())


def test_only_shared_optimizers_count():
    one, other = made_up_comparison(), made_up_comparison(("adam", "a", "b", "c"))
    assert profiles.common_labels([one, other]) == ["adam"]
    found = profiles.profiles_by("gradient evaluations to target", {"one": one, "other": other})
    assert list(found.profiles) == ["adam"]
    assert found.instances == {"one": 3, "other": 3}
    none = made_up_comparison(("x", "a", "b", "c"))
    found = profiles.profiles_by("gradient evaluations to target", {"one": one, "none": none})
    assert (found.profiles, found.instances) == ({}, {})


def test_scores_that_have_no_factors_are_left_out_and_named():
    study = made_up_comparison()
    rising = dataclasses.replace(study, score=Score("accuracy", larger_is_better=True))
    assert "more is better" in profiles.profiles_by("final score", {"s": rising}).left_out["s"]
    falling = dataclasses.replace(study, score=LOSS)
    study.outcomes[0].tuned.final.history.metrics["test_loss"][:] = -1.0
    assert "negative" in profiles.profiles_by("final score", {"s": falling}).left_out["s"]
    assert "s" in profiles.profiles_by("gradient evaluations to target", {"s": falling}).instances


def test_ranks_share_ties_and_put_failures_last():
    study = made_up_comparison()
    for outcome in study.outcomes[:2]:
        outcome.tuned.final.history.metrics["test_accuracy"][:] = 0.5
    found = profiles.ranks(study, ["adam", "M-SVAG, β=0.5", "sgd", "lbfgs"])
    assert found == {"adam": 2.5, "M-SVAG, β=0.5": 2.5, "sgd": 4.0, "lbfgs": 1.0}
    loss = Comparison(study.config, "p", study.outcomes, 0.6, LOSS)
    assert profiles.ranks(loss, ["adam", "sgd"]) == {"adam": 1.0, "sgd": 2.0}

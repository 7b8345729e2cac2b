"""The tuning protocol, on a trainer that only pretends: its numbers are formulas of the rate."""

import itertools
import math

import numpy as np
import pytest

import optgrad
from optgrad import registry
from optgrad.experiments import tuning
from optgrad.experiments.engine import History
from optgrad.experiments.tuning import rate_grid, tune

STEPS, EVAL_EVERY = 40, 10


class FakeTrainer:
    """Diverges above ``stable``; the nearer the rate to ``best``, the higher the accuracy.

    Args:
      best: rate of the highest accuracy on the validation set; on the test set it is ten times
        smaller, and the losses are smallest at other rates again.
      stable: the largest rate whose loss falls.
      diverges: the smallest rate that diverges.
      at_once: as a trainer's ``vectorize == "vmap"``.
    """

    def __init__(
        self, best=0.03, stable=1.0, diverges=5.0, *, at_once=False, low=1e-4, high=10.0,
        peak_early=False, broken_seeds=(), tunes=True,
    ):  # fmt: skip
        self.method = registry.Method(
            name="fake", factory=optgrad.m_svag, scale_by=None, family="test", title="",
            reference="", equation="",
            tunes=registry.Tunable("learning_rate", low, high) if tunes else None,
        )  # fmt: skip
        self.best, self.stable, self.diverges = best, stable, diverges
        self.peak_early, self.broken_seeds = peak_early, broken_seeds
        self.vectorize = "vmap" if at_once else "map"
        self.eval_every = EVAL_EVERY
        self.calls = []  # (values, seeds, steps)

    def train(self, runs, steps, on_interval=None, waves=None):
        assert set(runs.hyperparams) <= {"learning_rate"}
        values = runs.hyperparams.get("learning_rate", np.full(len(runs.seeds), math.nan))
        assert len(values) == len(runs.seeds)
        self.calls.append((list(map(float, values)), list(map(int, runs.seeds)), steps))
        evaluations = np.arange(0, steps + 1, self.eval_every)
        progress = evaluations / STEPS
        rows = [self._row(v, s, progress) for v, s in zip(values, runs.seeds, strict=True)]
        diverged = np.array([
            2 if value >= self.diverges or seed in self.broken_seeds else 0
            for value, seed in zip(values, runs.seeds, strict=True)
        ])  # fmt: skip
        metrics = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        for row in metrics.values():
            row[diverged > 0, 1:] = np.nan
        if on_interval:
            for run, column in itertools.product(range(len(values)), range(len(evaluations))):
                record = {name: m[run, column] for name, m in metrics.items()}
                on_interval(run, int(evaluations[column]), record)
        return History(evaluations, metrics, diverged, 0.5)

    def _row(self, value, seed, progress):
        def off(best):  # decades from the best rate
            return 0.0 if math.isnan(value) else abs(math.log10(value / best))

        rise = 4 * progress * (1 - progress) if self.peak_early else progress
        slope = 1.0 if value > self.stable else -1.0
        noise = 1e-4 * seed
        return {
            "validation_accuracy": 0.1 + rise * (0.8 - 0.1 * off(self.best)) + noise,
            "test_accuracy": 0.1 + rise * (0.8 - 0.1 * off(self.best / 10)) + noise,
            "validation_loss": 2.0 + slope * progress * (1.5 - 0.1 * off(self.best / 3)),
            "test_loss": 2.0 + slope * progress * (1.5 - 0.1 * off(self.best / 30)),
            "train_loss": np.where(progress > 0, 2.0 + slope * progress, np.nan),
        }


def stages(tuned, name):
    return [stage for stage in tuned.stages if stage.name == name]


# The grid -------------------------------------------------------------------------------------


def test_rate_grid():
    assert rate_grid(1e-2, 1.0).tolist() == [1.0, 0.6, 0.3, 0.1, 0.06, 0.03, 0.01]
    assert rate_grid(0.02, 0.5).tolist() == [0.3, 0.1, 0.06, 0.03]
    assert rate_grid(0.06, 0.06).tolist() == [0.06]
    assert rate_grid(0.4, 0.5).tolist() == []
    assert rate_grid(1e-6, 1e-4).tolist() == [1e-4, 6e-5, 3e-5, 1e-5, 6e-6, 3e-6, 1e-6]
    assert rate_grid(60, 300).tolist() == [300, 100, 60]


@pytest.mark.parametrize("exponent", range(-8, 4))
@pytest.mark.parametrize("mantissa", [1, 3, 6])
def test_two_decades_of_the_grid_are_seven_points_and_exact(mantissa, exponent):
    """As the search asks for them: the lower end is a quotient, which rounds."""
    high = float(f"{mantissa}e{exponent}")
    grid = rate_grid(high / 10**2.0, high)
    assert len(grid) == 7
    assert grid[0] == high
    assert grid[-1] == float(f"{mantissa}e{exponent - 2}")
    assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize("method", [m for m in registry.methods() if m.tunes], ids=lambda m: m.name)
def test_the_grid_spans_the_range_of_every_method(method):
    grid = rate_grid(method.tunes.low, method.tunes.high)
    assert len(grid) >= 7
    assert min(grid) == method.tunes.low
    assert max(grid) == method.tunes.high


# The search -----------------------------------------------------------------------------------


def test_the_search_goes_down_from_the_top_until_a_rate_is_stable():
    trainer = FakeTrainer(stable=1.0)
    tuned = tune(trainer, steps=STEPS, seeds=3)
    assert [s.name for s in tuned.stages] == ["stability"] * 4 + ["tuning", "replication"]
    # One run and one interval each, and no more once a rate is stable.
    assert trainer.calls[:4] == [([rate], [0], EVAL_EVERY) for rate in (10.0, 6.0, 3.0, 1.0)]
    assert trainer.calls[4] == ([1.0, 0.6, 0.3, 0.1, 0.06, 0.03, 0.01], [0] * 7, STEPS)
    assert trainer.calls[5] == ([0.03] * 3, [1, 2, 3], STEPS)
    assert (tuned.hyperparameter, tuned.best, tuned.at_edge) == ("learning_rate", 0.03, False)
    assert tuned.final is tuned.stages[-1]


def test_where_runs_share_a_program_all_are_tried_at_once_with_the_same_result():
    trainer = FakeTrainer(stable=1.0, at_once=True)
    tuned = tune(trainer, steps=STEPS, seeds=3)
    one_by_one = FakeTrainer(stable=1.0)
    assert tuned.best == tune(one_by_one, steps=STEPS, seeds=3).best
    everything = rate_grid(1e-4, 10.0).tolist()
    assert trainer.calls[0] == (everything, [0] * len(everything), EVAL_EVERY)
    assert trainer.calls[1:] == one_by_one.calls[4:]


def test_two_decades_below_the_largest_stable_rate_are_searched_below_the_range_too():
    trainer = FakeTrainer(stable=6e-4, best=2e-5)
    tuned = tune(trainer, steps=STEPS, seeds=1)
    assert trainer.calls[-2][0] == [6e-4, 3e-4, 1e-4, 6e-5, 3e-5, 1e-5, 6e-6]
    assert tuned.best == 3e-5  # 2e-5 is nearer to it than to 1e-5 on a logarithmic scale


def test_the_number_of_decades():
    trainer = FakeTrainer(stable=1.0)
    tune(trainer, steps=STEPS, seeds=1, decades=1.0)
    assert trainer.calls[-2][0] == [1.0, 0.6, 0.3, 0.1]


def test_rates_of_the_user_replace_the_grid():
    trainer = FakeTrainer(stable=1.0, best=0.05)
    tuned = tune(trainer, steps=STEPS, seeds=1, rates=[0.05, 7.0, 0.5, 2e-4])
    assert [call[0] for call in trainer.calls[:2]] == [[7.0], [0.5]]
    assert sorted(trainer.calls[2][0]) == [2e-4, 0.05, 0.5]
    assert tuned.best == 0.05
    assert not tuned.at_edge


def test_replications_use_seeds_that_the_tuning_has_not_seen():
    trainer = FakeTrainer()
    tuned = tune(trainer, steps=STEPS, seeds=4, tuning_seeds=3)
    seen = {int(s) for stage in tuned.stages[:-1] for s in stage.seeds}
    assert seen == {0, 1, 2}
    assert tuned.final.seeds.tolist() == [3, 4, 5, 6]
    (stage,) = stages(tuned, "tuning")
    assert sorted(zip(stage.values.tolist(), stage.seeds.tolist(), strict=True)) == sorted(
        itertools.product(rate_grid(0.01, 1.0).tolist(), range(3))
    )


@pytest.mark.parametrize(
    ("select_by", "best"),
    [
        ("validation_accuracy", 0.1),
        ("test_accuracy", 0.01),
        ("validation_loss", 0.03),  # of a loss the smallest: 0.1/3
        ("test_loss", 0.003),
    ],
)
@pytest.mark.parametrize("protocol", ["search", "grid"])
def test_the_metric_and_its_direction(select_by, best, protocol):
    trainer = FakeTrainer(best=0.1, stable=0.1)
    tuned = tune(trainer, steps=STEPS, seeds=1, select_by=select_by, protocol=protocol)
    assert tuned.best == best


def test_the_best_value_on_the_way_counts_not_the_last():
    tuned = tune(FakeTrainer(best=0.03, peak_early=True), steps=STEPS, seeds=1)
    (stage,) = stages(tuned, "tuning")
    by_value = tuning.scores(stage, "validation_accuracy")
    np.testing.assert_allclose(by_value[0.03], 0.9)  # reached half-way; 0.1 at the end
    assert tuned.best == 0.03


def test_scores_are_averaged_over_seeds():
    stage = tuning.Stage(
        "tuning",
        np.array([1.0, 1.0, 0.1, 0.1]),
        np.array([0, 1, 0, 1]),
        History(
            np.array([0, 10]),
            {
                "test_accuracy": np.array([[0.1, 0.9], [0.1, 0.5], [0.1, 0.6], [np.nan, 0.7]]),
                "test_loss": np.array([[3.0, 1.0], [3.0, 2.0], [3.0, 1.2], [3.0, 2.5]]),
            },
            np.zeros(4, int),
            0.0,
        ),
    )
    assert tuning.scores(stage, "test_accuracy") == pytest.approx({1.0: 0.7, 0.1: 0.65})
    assert tuning.scores(stage, "test_loss") == pytest.approx({1.0: -1.5, 0.1: -1.85})


def test_a_rate_that_diverged_with_any_seed_scores_minus_infinity():
    trainer = FakeTrainer(best=4.0, stable=10.0, diverges=4.0)
    tuned = tune(trainer, steps=STEPS, seeds=2, protocol="grid")
    by_value = tuning.scores(tuned.stages[0], "validation_accuracy")
    assert {v for v, score in by_value.items() if score == -math.inf} == {10.0, 6.0}
    assert tuned.best == 3.0
    one_seed = FakeTrainer(best=0.03, broken_seeds=[1])
    tuned = tune(one_seed, steps=STEPS, seeds=2, protocol="grid")
    assert set(tuning.scores(tuned.stages[0], "validation_accuracy").values()) == {-math.inf}
    assert tuned.best is None


def test_a_rate_that_diverges_later_is_not_chosen_in_the_search():
    """Stable over one interval with seed 0, but not with another seed."""
    tuned = tune(FakeTrainer(broken_seeds=[1]), steps=STEPS, seeds=2, tuning_seeds=2)
    assert [s.name for s in tuned.stages] == ["stability"] * 4 + ["tuning"]
    assert tuned.best is None
    assert tuned.final is None
    assert tuned.at_edge


@pytest.mark.parametrize("at_once", [False, True])
def test_no_rate_is_stable(at_once):
    trainer = FakeTrainer(stable=1e-9, at_once=at_once)
    tuned = tune(trainer, steps=STEPS, seeds=3)
    assert (tuned.hyperparameter, tuned.best, tuned.final) == ("learning_rate", None, None)
    tried = [value for values, _, _ in trainer.calls for value in values]
    assert tried == rate_grid(1e-4, 10.0).tolist()
    assert {steps for _, _, steps in trainer.calls} == {EVAL_EVERY}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (("validation_loss", 1), 2.5),  # above the start at the end
        (("train_loss", 1), 2.5),  # above the start on average on the way
        (("validation_loss", 1), np.nan),
    ],
)
def test_what_counts_as_stable(column, value):
    trainer = FakeTrainer(stable=10.0, diverges=100.0)
    train, (name, index) = trainer.train, column

    def worse_at_the_top(runs, steps, on_interval=None, waves=None):
        history = train(runs, steps, on_interval)
        history.metrics[name][runs.hyperparams["learning_rate"] > 2.0, index:] = value
        return history

    trainer.train = worse_at_the_top
    tuned = tune(trainer, steps=STEPS, seeds=1)
    assert max(stages(tuned, "tuning")[0].values) == 1.0


def test_stability_without_a_validation_split_is_judged_by_the_test_loss():
    trainer = FakeTrainer(stable=1.0)
    train = trainer.train

    def without_validation(*args):
        history = train(*args)
        kept = {k: v for k, v in history.metrics.items() if not k.startswith("validation")}
        return history._replace(metrics=kept)

    trainer.train = without_validation
    tuned = tune(trainer, steps=STEPS, seeds=1, select_by="test_loss")
    assert max(stages(tuned, "tuning")[0].values) == 1.0


def test_the_training_loss_is_compared_with_its_own_start():
    """It may be far above the validation loss, for it has the L2 term."""
    trainer = FakeTrainer(stable=1.0)
    train = trainer.train

    def regularised(*args):
        history = train(*args)
        history.metrics["train_loss"] += 5.0
        return history._replace(first_loss=np.full(len(history.diverged_at), 7.0))

    trainer.train = regularised
    tuned = tune(trainer, steps=STEPS, seeds=1)
    assert max(stages(tuned, "tuning")[0].values) == 1.0


# The edge -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "best", "at_edge"),
    [
        ({"best": 0.03, "stable": 1.0}, 0.03, False),
        ({"best": 1e-9, "stable": 1.0}, 0.01, True),  # the lowest that was tried
        ({"best": 1e9, "stable": 1.0, "diverges": 100}, 1.0, False),  # the largest stable one
        ({"best": 1e9, "stable": 10.0, "diverges": 100}, 10.0, True),  # the top of the range
    ],
)
def test_at_edge_of_the_search(trainer, best, at_edge):
    tuned = tune(FakeTrainer(**trainer), steps=STEPS, seeds=1)
    assert (tuned.best, tuned.at_edge) == (best, at_edge)


@pytest.mark.parametrize(
    ("trainer", "best", "at_edge"),
    [
        ({"best": 0.03, "diverges": 100}, 0.03, False),
        ({"best": 1e-9, "diverges": 100}, 1e-4, True),
        ({"best": 1e9, "diverges": 100}, 10.0, True),
        ({"best": 1e9, "diverges": 2.0}, 1.0, False),  # higher ones were tried and diverged
    ],
)
def test_at_edge_of_the_grid(trainer, best, at_edge):
    tuned = tune(FakeTrainer(stable=10.0, **trainer), steps=STEPS, seeds=1, protocol="grid")
    assert (tuned.best, tuned.at_edge) == (best, at_edge)


@pytest.mark.parametrize(
    ("rates", "best", "at_edge"),
    [
        ([100.0, 10.0, 1e-3], 1e-3, True),  # the largest stable one, and the lowest of all
        ([0.3, 0.1], 0.1, False),  # of two each is an end
    ],
)
def test_at_edge_of_the_users_rates(rates, best, at_edge):
    tuned = tune(FakeTrainer(best=1e-9), steps=STEPS, seeds=1, rates=rates)
    assert (tuned.best, tuned.at_edge) == (best, at_edge)
    grid = tune(FakeTrainer(best=1e-9), steps=STEPS, seeds=1, rates=rates, protocol="grid")
    assert (grid.best, grid.at_edge) == (best, at_edge)


# The other protocols --------------------------------------------------------------------------


def test_grid_trains_every_rate_with_every_seed_in_one_batch():
    trainer = FakeTrainer(best=0.3, stable=1e-9)  # what is stable does not matter here
    tuned = tune(trainer, steps=STEPS, seeds=3, protocol="grid", rates=[0.1, 1.0, 0.3])
    ((values, seeds, steps),) = trainer.calls
    assert steps == STEPS
    assert sorted(zip(values, seeds, strict=True)) == sorted(
        itertools.product([0.1, 0.3, 1.0], range(3))
    )
    assert tuned.best == 0.3
    assert [s.name for s in tuned.stages] == ["tuning"]
    assert tuned.final.name == "replication"  # the runs at the best rate, not trained again
    assert tuned.final.values.tolist() == [0.3] * 3
    assert tuned.final.seeds.tolist() == [0, 1, 2]
    whole = tuned.stages[0]
    for name, values in tuned.final.history.metrics.items():
        np.testing.assert_array_equal(values, whole.history.metrics[name][whole.values == 0.3])


def test_grid_defaults_to_the_whole_range():
    trainer = FakeTrainer()
    tune(trainer, steps=STEPS, seeds=1, protocol="grid")
    assert trainer.calls[0][0] == rate_grid(1e-4, 10.0).tolist()


@pytest.mark.parametrize("how", ["protocol none", "nothing to tune"])
def test_without_tuning_only_the_seeds_are_trained(how):
    trainer = FakeTrainer(tunes=how != "nothing to tune")
    protocol = "none" if how == "protocol none" else "search"
    tuned = tune(trainer, steps=STEPS, seeds=3, protocol=protocol)
    ((values, seeds, steps),) = trainer.calls
    assert np.isnan(values).all()  # no hyperparameter was handed over
    assert (seeds, steps) == ([0, 1, 2], STEPS)
    assert (tuned.hyperparameter, tuned.best, tuned.at_edge) == (None, None, False)
    assert tuned.final is tuned.stages[0]


def test_a_rate_given_twice_counts_once():
    tuned = tune(FakeTrainer(), steps=STEPS, seeds=2, protocol="grid", rates=[0.1, 0.1])
    assert tuned.final.seeds.tolist() == [0, 1]


# Records --------------------------------------------------------------------------------------


def test_rows_are_one_per_run_and_evaluation():
    tuned = tune(FakeTrainer(), steps=STEPS, seeds=2)
    rows = list(tuned.final.rows())
    assert len(rows) == 2 * 5
    assert [(row["seed"], row["step"]) for row in rows] == list(
        itertools.product([1, 2], [0, 10, 20, 30, 40])
    )
    assert {(row["stage"], row["value"], row["diverged_at"]) for row in rows} == {
        ("replication", 0.03, 0)
    }
    history = tuned.final.history
    for i, row in enumerate(rows):
        assert row["test_loss"] == history.metrics["test_loss"][i // 5, i % 5]
        assert {type(row[k]) for k in ("seed", "step", "diverged_at")} == {int}


def test_reports_carry_stage_value_seed_and_step():
    calls = []
    tune(FakeTrainer(), steps=STEPS, seeds=2, on_interval=lambda stage, r: calls.append((stage, r)))
    assert [stage for stage, _ in itertools.groupby(calls, key=lambda c: c[0])] == [
        "stability", "tuning", "replication",
    ]  # fmt: skip
    assert len(calls) == 4 * 2 + 7 * 5 + 2 * 5
    last = calls[-1][1]
    assert (last["value"], last["seed"], last["step"]) == (0.03, 2, STEPS)
    assert last["test_loss"] < 2.0

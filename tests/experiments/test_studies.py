"""Studies, run: several hyperparameters, budgets and published defaults, from end to end."""

import dataclasses
import json

import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import (
    checkpoint,
    compare,
    measurement,
    plots,
    report,
    results,
    sweep,
    timing,
    tuning,
)
from optgrad.experiments.config import load_config
from optgrad.experiments.engine import History
from optgrad.experiments.search_space import points

TINY = {
    "problem": "noisy_quadratic",
    "problem_options": {"dimension": 2},
    "steps": 8,
    "eval_every": 4,
    "seeds": 2,
    "tuning.protocol": "grid",
}


def compared(optimizers, journal=None, **fields):
    return compare.run_comparison(
        load_config(overrides={**TINY, "optimizers": optimizers, **fields}), journal=journal
    )


# Points ---------------------------------------------------------------------------------------


class FakeTrainer:
    """Reaches a loss that is a formula of the hyperparameters; diverges from 1 on."""

    def __init__(self, static):
        self.method = registry.get_method("adam")
        self.static, self.calls = static, []

    def train(self, runs, steps, on_interval=None, waves=None):
        rates, b1 = runs.hyperparams["learning_rate"], runs.hyperparams["b1"]
        self.calls.append((rates.tolist(), runs.seeds.tolist()))
        loss = np.log10(rates / 0.01) ** 2 + b1 - 0.5 * self.static["nesterov"] + 1e-3 * runs.seeds
        diverged = np.where(rates >= 1, 3, 0)
        reached = np.where(diverged, np.nan, loss)
        metrics = {"test_loss": np.stack([np.full(len(loss), 9.0), reached], axis=1)}
        for row, value in enumerate(reached):
            on_interval(row, steps, {"test_loss": value})
        return History(np.array([0, steps]), metrics, diverged, 0.5)


SPACE = {"learning_rate": (1.0, 0.1, 0.01), "b1": (0.5, 0.9), "nesterov": (False, True)}


def tuned_by_formula(space, **more):
    made, seen = [], []

    def make(static):
        made.append(FakeTrainer(static))
        return made[-1]

    tried = points(space, "grid")
    trainers = sweep.Trainers(make, registry.get_method("adam"), tried)
    found = sweep.tune_points(
        trainers, tried, steps=10, seeds=3, tuning_seeds=2, select_by="test_loss",
        on_interval=lambda stage, record: seen.append((stage, record)), **more,
    )  # fmt: skip
    return found, made, seen


def test_every_point_with_every_tuning_seed_and_the_best_with_fresh_ones():
    found, made, seen = tuned_by_formula(SPACE)
    assert found.chosen == {"learning_rate": 0.01, "b1": 0.5, "nesterov": True}
    tuning_stage, final = found.stages
    assert sorted(zip(tuning_stage.points, tuning_stage.seeds.tolist(), strict=True)) == sorted(
        (tuple(point.values()), seed) for point in points(SPACE, "grid") for seed in range(2)
    )
    assert final.seeds.tolist() == [2, 3, 4]
    assert set(final.points) == {(0.01, 0.5, True)}
    assert [trainer.static for trainer in made] == [{"nesterov": False}, {"nesterov": True}]
    assert [len(trainer.calls) for trainer in made] == [1, 2]  # one program for each static value
    assert seen[0][1]["value"] == "1, b1 = 0.5, nesterov = False"
    assert (seen[-1][0], seen[-1][1]["seed"]) == ("replication", 4)


def test_runs_of_several_trainers_are_put_into_one_order():
    found, _, _ = tuned_by_formula(SPACE)
    stage = found.stages[0]
    for (rate, b1, nesterov), seed, reached in zip(
        stage.points, stage.seeds, stage.history.metrics["test_loss"][:, 1], strict=True
    ):
        expected = np.log10(rate / 0.01) ** 2 + b1 - 0.5 * nesterov + 1e-3 * seed
        np.testing.assert_allclose(reached, np.nan if rate >= 1 else expected)


def test_marginal_scores_are_those_at_the_best_of_the_others():
    found, _, _ = tuned_by_formula(SPACE)
    by_rate, by_b1, by_nesterov = (tuning.scores(found.stages[0], "test_loss", number=i)
                                   for i in range(3))  # fmt: skip
    assert by_rate == pytest.approx({1.0: -np.inf, 0.1: -1.0005, 0.01: -0.0005})
    assert by_b1 == pytest.approx({0.5: -0.0005, 0.9: -0.4005})
    assert by_nesterov == pytest.approx({False: -0.5005, True: -0.0005})


def test_points_that_all_diverge_have_no_winner():
    found, made, _ = tuned_by_formula({**SPACE, "learning_rate": (1.0, 10.0)})
    assert (found.best, found.final, found.chosen, found.at_edge) == (None, None, {}, True)
    assert sum(len(trainer.calls) for trainer in made) == 2


# Several hyperparameters ----------------------------------------------------------------------


def test_a_point_of_a_sweep_is_what_a_run_with_these_values_is(tmp_path):
    space = {"learning_rate": {"low": 1e-3, "high": 1e-1, "num": 2}, "b1": [0.0, 0.9]}
    comparison = compared([{"method": "adam", "space": space}])
    (outcome,) = comparison.outcomes
    assert outcome.compilations == 1  # all are traced
    stage, final = outcome.tuned.stages
    assert len(stage.points) == 4
    assert set(final.seeds.tolist()) == {1, 2}
    alone = {"method": "adam", "hyperparams": {"learning_rate": 0.1, "b1": 0.9}}
    expected = compared([alone], seeds=1, **{"tuning.protocol": "none"}).outcomes[0].tuned.final
    row = stage.points.index((0.1, 0.9))
    for name, values in expected.history.metrics.items():
        np.testing.assert_allclose(stage.history.metrics[name][row], values[0], rtol=1e-5)
    assert_written(comparison, tmp_path / "out")


def assert_written(comparison, folder):
    """Each point can be read from the tables, and the chosen one from summary and report."""
    results.write(comparison, folder)
    header, first, *_ = (folder / "metrics.csv").read_text().splitlines()
    assert header.split(",")[:5] == ["optimizer", "stage", "value", "hyperparams.b1", "seed"]
    assert first.split(",")[:5] == ["adam", "tuning", "0.001", "0.0", "0"]
    (record,) = json.loads((folder / "summary.json").read_text())["summary"]
    chosen = comparison.outcomes[0].tuned.chosen
    assert (record["best"], record["others"]) == (chosen["learning_rate"], {"b1": chosen["b1"]})
    text = (folder / "report.md").read_text()
    assert f"{chosen['learning_rate']:g}, b1 = {chosen['b1']:g}" in text
    assert "learning_rate in [0.001, 0.1] (log); b1 of 0, 0.9: 4 points with 1 seed(s)" in text
    svg = (folder / "sensitivity.svg").read_text()
    assert all(label in svg for label in ("learning_rate", "b1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizers", "protocol", "expected"),
    [
        (["momentum", {"method": "sgd", "hyperparams": {"learning_rate": 0.1}}], "search", [3, 4]),
        (["momentum", {"method": "adam", "space": {"learning_rate": [0.1, 0.01]}}], "grid", [3, 4]),
        (["momentum", {"method": "sgd", "hyperparams": {"learning_rate": 0.1}}], "grid", [0, 1]),
    ],
)
def test_all_final_runs_have_the_same_seeds(optimizers, protocol, expected):
    """They are compared seed by seed."""
    fields = {"tuning.protocol": protocol, "tuning.seeds": 3, "tuning.rates": [0.1, 0.01]}
    comparison = compared(optimizers, **fields, published_defaults=True)
    assert [sorted(set(o.tuned.final.seeds.tolist())) for o in comparison.outcomes] == [
        expected, expected
    ]  # fmt: skip
    published = [o.published.seeds.tolist() for o in comparison.outcomes if o.published]
    assert all(seeds == expected for seeds in published)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["random", "halton"])
def test_drawn_points_of_a_method_without_a_space_are_of_its_range(protocol, tmp_path):
    fields = {"tuning.protocol": protocol, "tuning.samples": 5, "tuning.sample_seed": 3}
    comparison = compared(["momentum", {"method": "sgd", "hyperparams": {"learning_rate": 0.1}}],
                          **fields)  # fmt: skip
    drawn, fixed = comparison.outcomes
    low, high = registry.get_method("momentum").tunes[1:]
    values = drawn.tuned.stages[0].values
    assert len(set(values.tolist())) == 5
    assert ((values >= low) & (values <= high)).all()
    assert fixed.tuned.hyperparameter is None
    assert "5 points were drawn" in report.markdown(comparison, {})
    results.write(comparison, tmp_path / "out")


@pytest.mark.slow
def test_static_values_are_compiled_each():
    space = {"learning_rate": [0.01, 0.1], "nesterov": [False, True]}
    (outcome,) = compared([{"method": "adam", "space": space}]).outcomes
    assert outcome.compilations == 2
    assert len(outcome.tuned.stages[0].points) == 4


@pytest.mark.slow
def test_pictures_of_random_points_and_of_values_that_are_no_numbers(tmp_path):
    space = {
        "learning_rate": {"low": 1e-3, "high": 0.1},
        "b1": {"low": 0.001, "high": 0.9, "scale": "linear"},
        "nesterov": [False, True],
    }
    fields = {"tuning.protocol": "random", "tuning.samples": 4}
    comparison = compared([{"method": "adam", "space": space}], **fields)
    results.write(comparison, tmp_path / "out")
    svg = (tmp_path / "out" / "sensitivity.svg").read_text()
    assert all(label in svg for label in ("nesterov", "True", "False"))
    scales = [axis.get_xscale() for axis in plots.sensitivity(comparison).axes]
    assert scales == ["log", "linear", "linear"]
    assert not (tmp_path / "out" / "robustness.svg").exists()  # no two points share a rate


# Budgets --------------------------------------------------------------------------------------


def test_a_budget_in_gradient_evaluations():
    """LossGrad pays 4/3 for a step."""
    sgd = {"method": "sgd", "hyperparams": {"learning_rate": 0.1}}
    fields = {"budget": "gradient_evaluations", "tuning.protocol": "none"}
    comparison = compared([sgd, "lossgrad"], **fields)
    cheap, dear = (outcome.tuned.final.history.steps.tolist() for outcome in comparison.outcomes)
    assert (cheap, dear) == ([0, 4, 8], [0, 3, 6])
    assert comparison.units == ("gradient_evaluations",)
    axis = plots.curves(comparison, unit=comparison.units[0]).axes[1]
    assert [line.get_xdata().tolist() for line in axis.lines[:2]] == [[0, 4, 8]] * 2
    text = report.markdown(comparison, {})
    assert "after 8 gradient evaluations" in text
    assert "| lossgrad | 6 | 1.333 | 8 |" in text
    worst = comparison.outcomes[1].tuned.final.history.metrics[comparison.score.name][:, -1].max()
    _, record = dataclasses.replace(comparison, target=worst).summary()
    taken = (record["steps_to_target"], record["gradient_evaluations_to_target"])
    assert taken in {(3, 4), (6, 8)}


SECONDS = {"steps": None, "budget": "seconds", "budget_seconds": 1.0, "published_defaults": True,
           "tuning.protocol": "none"}  # fmt: skip


def test_a_budget_in_seconds_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = iter([0.05, 0.01])
    monkeypatch.setattr(timing, "_measure", lambda *_: next(measured))
    adam = {"method": "adam", "hyperparams": {"learning_rate": 0.1}}
    with checkpoint.begin(tmp_path / "out", {}, seconds=1e9) as journal:
        (outcome,) = compared([adam], journal, **SECONDS).outcomes
    assert outcome.tuned.final.history.steps.tolist() == [0, 4, 8, 12, 16, 20]
    assert outcome.published.history.steps[-1] == 20
    monkeypatch.setattr(
        "optgrad.experiments.executable.Executable.advance", None
    )  # trained no more
    with checkpoint.resume(tmp_path / "out") as journal:
        comparison = compared([adam], journal, **SECONDS)
    (again,) = comparison.outcomes
    assert again.seconds_per_step == 0.05
    assert again.tuned.final.history.steps[-1] == 20
    for name, values in outcome.tuned.final.history.metrics.items():
        np.testing.assert_array_equal(again.tuned.final.history.metrics[name], values)
    text = report.markdown(comparison, {})
    assert "| adam | 20 | 1 | 20 | 50 | 1 |" in text
    assert "![curves](curves.svg)" in text
    assert comparison.units == ("seconds",)


def test_the_measured_seconds_are_those_of_a_step(monkeypatch):
    """The clock advances by a second at each look: an interval of four steps takes one."""
    ticks = iter(range(100))
    comparison_of = load_config(overrides={**TINY, "optimizers": ["sgd"], "measure_seconds": True})
    problem = compare.load_problem(comparison_of)
    study = compare.studies.Study(compare._with_selection(comparison_of, problem), problem,
                                  comparison_of.optimizers[0])  # fmt: skip
    monkeypatch.setattr(measurement, "clock", lambda: float(next(ticks)))
    assert timing._measure(study.trainers({}), {"learning_rate": 0.1}) == 0.25


# Published defaults ---------------------------------------------------------------------------


@pytest.mark.slow
def test_published_defaults_beside_the_tuned_result():
    optimizers = [
        {"method": "adam", "hyperparams": {"learning_rate": 0.1, "b1": 0.5}},
        {"method": "sgd", "hyperparams": {"learning_rate": 0.1}},  # nobody states a default
    ]
    fields = {"published_defaults": True, "tuning.protocol": "none"}
    comparison = compared(optimizers, **fields)
    adam, sgd = comparison.outcomes
    assert sgd.published is None
    assert adam.published.seeds.tolist() == adam.tuned.final.seeds.tolist()
    given = {"method": "adam", "hyperparams": {"learning_rate": 1e-3}}
    expected = compared([given], **{"tuning.protocol": "none"}).outcomes[0].tuned.final
    for name, values in expected.history.metrics.items():
        np.testing.assert_allclose(adam.published.history.metrics[name], values, rtol=1e-5)
    header, rows = report.table(comparison)
    column = header.index("at published defaults")
    mean = expected.history.metrics[comparison.score.name][:, -1].mean()
    assert rows[0][column].startswith(comparison.score.text(mean))
    assert rows[1][column] == "–"

"""One after the other or together: by the clock, which is a false one here."""

import itertools

import pytest

from optgrad.experiments import checkpoint, measurement
from optgrad.experiments.measurement import Cost, choose

from .test_engine import EVAL_EVERY, make_runs, make_trainer

SECONDS = {"map": Cost(1.0, 1e-3), "vmap": Cost(1.0, 1e-4)}


def choice(default, run_steps, runs=8, costs=SECONDS):
    asked = []

    def measure(way):
        asked.append(way)
        return costs[way]

    found = choose(default, runs, run_steps, 10, measure)
    return found.vectorize, asked, found.why


@pytest.mark.parametrize(
    ("default", "run_steps", "expected", "asked"),
    [
        ("map", 400, "map", []),  # fewer than fifty intervals
        ("map", 2000, "map", ["map"]),  # two seconds
        (
            "map",
            10_000,
            "vmap",
            ["map", "vmap"],
        ),  # ten, of which half is more than two of compiling
        ("vmap", 10_000, "vmap", ["vmap"]),
        ("vmap", 10**6, "vmap", ["vmap", "map"]),
    ],
)
def test_it_is_measured_where_it_pays(default, run_steps, expected, asked):
    assert choice(default, run_steps)[:2] == (expected, asked)


def test_a_small_gain_changes_nothing():
    """So that repetitions of a study agree."""
    for gain, expected in ((1.2, "map"), (1.3, "vmap")):
        costs = {"map": Cost(1.0, 1e-3), "vmap": Cost(1.0, 1e-3 / gain)}
        found, asked, why = choice("map", 10**5, costs=costs)
        assert (found, asked) == (expected, ["map", "vmap"])
        assert "1 ms" in why


def test_one_run_has_nothing_to_choose():
    assert choice("map", 10**6, runs=1)[:2] == ("map", [])


@pytest.mark.parametrize("vectorize", ["map", "vmap"])
def test_cost_is_that_of_a_step_of_one_run(monkeypatch, vectorize):
    """A clock by which every interval takes a second, the first three with its compilation."""
    times = itertools.chain([0.0, 3.0], (float(10 + t // 2 * 2 + t % 2) for t in itertools.count()))
    monkeypatch.setattr(measurement, "clock", lambda: next(times))
    trainer = make_trainer("sgd", vectorize=vectorize)
    found = measurement.cost(trainer.executable, {"learning_rate": 0.1}, 4)
    runs = 4 if vectorize == "vmap" else 1
    assert found == Cost(2.0, 1.0 / (EVAL_EVERY * runs))


def test_a_study_keeps_its_choice(tmp_path, monkeypatch):
    """When it goes on, whatever the clock says then."""
    answers = {"chosen": measurement.Choice("vmap", "together: because")}
    monkeypatch.setattr(measurement, "choose_way", lambda *arguments: answers["chosen"])
    results = tmp_path / "results"

    def chosen(journal):
        trainer = make_trainer("sgd", vectorize="auto")
        waves = checkpoint.Waves(journal, "sgd")
        trainer.choose({"learning_rate": 0.1}, 8, 10**6, waves)
        assert trainer.notes[-1] == "together: because"
        return trainer.vectorize, trainer.executable.together

    with checkpoint.begin(results, {}) as journal:
        assert chosen(journal) == ("vmap", True)
        journal.finish({"label": "sgd", "number": 0}, [], 0.0)
    answers["chosen"] = measurement.Choice("map", "otherwise")
    with checkpoint.resume(results) as journal:
        assert chosen(journal) == ("vmap", True)


@pytest.mark.parametrize("vectorize", ["map", "vmap"])
def test_what_was_asked_for_is_not_measured(monkeypatch, vectorize):
    monkeypatch.setattr(measurement, "choose_way", lambda *arguments: pytest.fail("measured"))
    trainer = make_trainer("sgd", vectorize=vectorize)
    trainer.choose({"learning_rate": 0.1}, 8, 10**9)
    assert trainer.vectorize == vectorize


def test_the_clock_is_read_on_real_runs(monkeypatch):
    """A short problem, for which nothing is too short."""
    monkeypatch.setattr(measurement, "_LEAST_INTERVALS", 1)
    trainer = make_trainer("sgd", vectorize="auto")
    trainer.choose({"learning_rate": 0.1}, 4, 10**9)
    assert trainer.vectorize in measurement.WAYS
    assert "ms a step of a run" in trainer.notes[-1]
    trainer.train(make_runs([0.1], range(2)), EVAL_EVERY)

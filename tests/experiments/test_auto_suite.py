"""The suite behind `optgrad.auto`: every file of it, a tiny run from end to end, its numbers."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import optgrad
from experiments.made_up import made_up_comparison
from optgrad.experiments import gaps, profiles

ROOT = Path(optgrad.__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "auto"
STUDIES = sorted(path for path in FOLDER.rglob("*.toml") if path.parent.name != "optimizers")


@pytest.fixture(scope="module")
def suite():
    yield from imported("auto_suite")


@pytest.fixture(scope="module")
def evidence(suite):
    return suite.auto_evidence


def imported(name):
    """A script of benchmarks/, which is no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module(name)
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_study_loads_with_every_group(path, suite):
    steps = {suite.settings_of(path, group).steps for group in ("constant", "cosine")}
    assert len(steps) == 1
    tuned = suite.settings_of(path, "cosine")
    assert tuned.schedule.kind == "cosine"
    assert tuned.seeds >= 3
    assert all(len(tuned.points(optimizer)) >= 9 for optimizer in tuned.optimizers)


def test_quick_studies_come_first(suite):
    names = list(suite.study_files(FOLDER))
    assert names[0].startswith("quadratic")
    assert names[-1].startswith("all_cnn")
    assert len(names) == len(set(names)) == len(list(FOLDER.glob("*.toml")))


def test_the_number_of_steps_is_put_in_its_place(suite):
    found = suite._with_steps([{"method": "auto", "hyperparams": {"total_steps": "steps"}}], 70)
    assert found == [{"method": "auto", "hyperparams": {"total_steps": 70}}]


def test_methods_that_are_not_registered_are_left_out(suite):
    assert suite._registered(["adam", "no_such", {"method": "sgd", "label": "x"}]) == [
        {"method": "adam"},
        {"method": "sgd", "label": "x"},
    ]


def test_a_problem_that_was_changed_is_another(suite, tmp_path):
    path, problem = tmp_path / "study.toml", tmp_path / "mine.py"
    path.write_text('problem = "mine.py"\nsteps = 20\neval_every = 10\n')
    problem.write_text("def problem(*, batch_size): ...\n")
    before = suite._what_counts(suite.settings_of(path, "auto"))
    assert suite._what_counts(suite.settings_of(path, "auto")) == before
    problem.write_text("def problem(*, batch_size): return 1\n")
    assert suite._what_counts(suite.settings_of(path, "auto")) != before


# The evidence, of made-up comparisons ------------------------------------------------------------


def study(evidence, name="study", **finals):
    """A study of accuracies: label -> what its runs end with, the rate-free ones as `auto`'s."""
    groups = {}
    for group, values in finals.items():
        made = made_up_comparison()
        outcome = made.outcomes[3]  # nothing tuned
        history = outcome.tuned.final.history
        accuracy = history.metrics["test_accuracy"].copy()
        accuracy[:, -1] = values
        metrics = {**history.metrics, "test_accuracy": accuracy}
        stage = dataclasses.replace(outcome.tuned.final, history=history._replace(metrics=metrics))
        tuned = dataclasses.replace(outcome.tuned, final=stage, stages=(stage,), best=0.1)
        label = {"auto": "auto", "parameter_free": "dog"}.get(group, "adam")
        optimizer = outcome.config.model_copy(update={"label": label})
        replaced = dataclasses.replace(outcome, config=optimizer, tuned=tuned)
        groups[group] = dataclasses.replace(made, outcomes=(replaced,))
    return evidence.Evidence(name, groups)


def test_the_bar_is_asked_of_auto_against_the_best_constant_rate(evidence):
    found = study(evidence, auto=[0.9] * 3, parameter_free=[0.8] * 3, constant=[0.905] * 3,
                  cosine=[0.95] * 3)  # fmt: skip
    rows = evidence.gap_rows([found])
    asked = [row for row in rows if row["bar"] is not None]
    assert [(row["optimizer"], row["against"], row["passes"]) for row in asked] == [
        ("auto", "constant", True)
    ]
    assert asked[0]["percent"] == pytest.approx(0.5)
    behind = {(row["optimizer"], row["against"]): row["percent"] for row in rows}
    assert behind["dog", "cosine"] == pytest.approx(15.0)
    planned = evidence.bar_of(found, "cosine", "auto, total_steps")
    assert planned == 0.3
    assert "**no**" not in evidence.verdicts_table(rows)
    assert "| dog | adam" not in evidence.verdicts_table(rows)


def test_a_study_is_an_instance_of_the_profile(evidence):
    pair = [
        study(evidence, "first", auto=[0.9] * 3, parameter_free=[0.8] * 3),
        study(evidence, "second", auto=[0.9] * 3, parameter_free=[0.95, 0.95, np.nan]),
    ]
    labels = evidence.common_labels(pair)
    assert labels == ["auto", "dog"]
    costs = evidence.profile_costs(pair, labels)
    assert costs["auto"] == pytest.approx([0.1, 0.1])
    assert costs["dog"] == pytest.approx([0.2, np.inf])
    found = profiles.performance_profiles(costs)
    assert evidence.share_at(found["dog"], 1.9) == 0.0
    assert evidence.share_at(found["dog"], 2.1) == 0.5
    assert evidence.first_below(found["auto"], found["dog"]) is None
    assert evidence.first_below(found["dog"], found["auto"]) == 1.0
    assert "| dog | 0.00 | 0.00 | 0.00 | 0.50 | 0.50 | never | yes |" in evidence.profile_table(
        found
    )


def test_the_worst_of_each_optimizer_is_in_the_table(evidence):
    pair = [
        study(evidence, "first", auto=[0.9] * 3, constant=[0.91] * 3),
        study(evidence, "second", auto=[0.9, 0.9, np.nan], constant=[0.95] * 3),
    ]
    table = evidence.matrix_table(evidence.gap_rows(pair), "constant")
    assert "| first | +1.00 |" in table
    assert "| **worst** | diverged |" in table


def test_what_was_not_run_is_said(evidence):
    assert "| study | 40 | 64 | 1 | not run | 1 | not run |" in evidence.times_table(
        [study(evidence, auto=[0.9] * 3, constant=[0.9] * 3)]
    )


@pytest.mark.slow
def test_a_tiny_suite_from_end_to_end(suite, evidence, tmp_path, monkeypatch, capsys):
    """Run, found finished, run again, and its evidence."""
    path = tmp_path / "rosenbrock_tiny.toml"
    path.write_text('problem = "rosenbrock"\nsteps = 20\neval_every = 10\ntuning.seeds = 1\n')
    folder = tmp_path / "out" / path.stem
    for group in ("constant", "cosine", "parameter_free"):
        settings = suite.settings_of(path, group)
        assert suite.run_group(settings, folder / group, again=False) > 0
        assert suite.run_group(settings, folder / group, again=False) is None
    assert "other settings" not in capsys.readouterr().out
    other = settings.model_copy(update={"seeds": 1})
    assert suite.run_group(other, folder / group, again=False) is None
    assert "other settings" in capsys.readouterr().out
    evidence.write(tmp_path / "out", [path.stem, "not_run"], tmp_path / "evidence")
    text = (tmp_path / "evidence" / "report.md").read_text()
    assert "Not run: not_run." in text
    kept = json.loads((tmp_path / "evidence" / "results.json").read_text())
    assert all(revision in text for revision in kept[0]["revisions"].values())
    assert {row["group"] for row in kept[0]["optimizers"]} == {
        "constant", "cosine", "parameter_free"
    }  # fmt: skip
    assert gaps.kind_of(evidence.read(tmp_path / "out", [path.stem])[0].any.score) == "decades"
    size = sum(file.stat().st_size for file in (tmp_path / "evidence").iterdir())
    assert size < 1_000_000

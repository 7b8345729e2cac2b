"""Studies read back from disk are those that were written; what is none is refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from optgrad.experiments import plots, report, results, stored
from optgrad.experiments.results import ResultsError
from optgrad.experiments.tuning import Tuned, runs_at

from .made_up import made_up_comparison, stage


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A results folder with pretended pictures, not to be changed."""
    folder = tmp_path_factory.mktemp("stored") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "figures", lambda comparison: {})
        results.write(made_up_comparison(), folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "results")


def test_the_report_of_what_was_read_is_the_one_that_was_written(written):
    study = stored.load_study(written)
    found = report.markdown(study.comparison, study.environment)
    text = (written / "report.md").read_text(encoding="utf-8")
    parts = [x.partition("## Environment") for x in (found, text)]  # JSON sorts the environment
    assert parts[0][0] == parts[1][0]
    assert sorted(parts[0][2].splitlines()) == sorted(parts[1][2].splitlines())


def test_every_run_comes_back_with_every_digit(written):
    found, expected = stored.load_study(written).comparison, made_up_comparison()
    assert found.summary() == expected.summary()
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert [s.name for s in one.tuned.stages] == [s.name for s in other.tuned.stages]
        for a, b in zip(one.tuned.stages, other.tuned.stages, strict=True):
            np.testing.assert_array_equal(a.values, b.values)
            np.testing.assert_array_equal(a.seeds, b.seeds)
            np.testing.assert_array_equal(a.history.diverged_at, b.history.diverged_at)
            for name, values in b.history.metrics.items():
                np.testing.assert_array_equal(a.history.metrics[name], values)
        assert one.seconds == sum(stage.history.seconds for stage in one.tuned.stages[:1])


def change(**fields):
    def apply(folder):
        path = folder / "summary.json"
        found = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return apply


def cut_in_half(folder):
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda folder: (folder / "summary.json").unlink(), "no results of optgrad compare"),
        (lambda folder: (folder / "summary.json").write_text("{"), "cannot be read as results"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "format = None; accepted: 1"),
        (change(format=2), "format = 2; accepted: 1"),
        (change(format=None), "format = None; accepted: 1"),
        (change(target=None), "'target' is missing"),
        (change(score={"metric": "m", "what": 1}), "what"),
        (change(summary=[]), "'adam' is missing"),
        (lambda folder: (folder / "metrics.csv").unlink(), "metrics.csv"),
        (lambda folder: (folder / "metrics.csv").write_text(""), "metrics.csv is empty"),
        (cut_in_half, "cannot be read as results"),
        (lambda folder: (folder / "config.toml").write_text("stepz = 1"), "did you mean 'steps'"),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused_with_the_reason(folder, damage, expected):
    damage(folder)
    with pytest.raises(ResultsError, match=re.escape(expected)) as error:
        stored.load_study(folder)
    assert str(folder) in str(error.value)


def test_an_unfinished_study_is_refused_with_the_way_on(tmp_path):
    (tmp_path / "results.partial").mkdir()
    for name in ("results", "results.partial"):
        with pytest.raises(ResultsError, match=r"unfinished; .*optgrad resume .*/results$"):
            stored.load_study(tmp_path / name)


def test_a_reproduction_is_named_as_such(tmp_path):
    (tmp_path / "config.toml").write_text("reproduce = 'dissecting-adam'")
    with pytest.raises(ResultsError, match=r"a reproduction \(dissecting-adam\)"):
        stored.load_study(tmp_path)


def test_studies_of_one_name_are_told_apart_by_their_folders(written, tmp_path):
    places = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]
    for place in places:
        shutil.copytree(written, place)
    names = [study.name for study in stored.load_studies(places[1:])]
    assert names == ["mlp_small on digits (x)", "mlp_small on digits (y)"]
    names = [study.name for study in stored.load_studies(places)]
    assert names == [f"mlp_small on digits ({tail})" for tail in ("a/x", "b/x", "b/y")]
    with pytest.raises(ResultsError, match="given twice"):
        stored.load_studies([places[0], places[0] / ".." / "x"])


def test_the_final_runs_of_a_grid_are_found_within_it(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figures", lambda comparison: {})
    whole = made_up_comparison()
    pairs = [(value, seed) for value in (0.1, 0.06) for seed in range(3)]
    grid = stage("tuning", *zip(*pairs, strict=True), 3)
    tuned = Tuned("learning_rate", 0.06, True, (grid,), runs_at(grid, 0.06))
    outcome = dataclasses.replace(whole.outcomes[0], tuned=tuned)
    expected = dataclasses.replace(whole, outcomes=(outcome,))
    config = whole.config.model_copy(update={"optimizers": whole.config.optimizers[:1]})
    results.write(dataclasses.replace(expected, config=config), tmp_path / "results")
    found = stored.load_study(tmp_path / "results").comparison
    assert found.summary() == expected.summary()
    assert found.outcomes[0].tuned.final.seeds.tolist() == [0, 1, 2]

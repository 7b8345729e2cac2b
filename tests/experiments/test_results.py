"""The results folder: complete, recomputable from its own numbers, and whole or not at all."""

import csv
import dataclasses
import json
import math
import os
import re
import struct
import subprocess
import tomllib
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import optgrad
from optgrad.experiments import plots, report, results
from optgrad.experiments.compare import Comparison, Outcome
from optgrad.experiments.config import load_config
from optgrad.experiments.results import ResultsError
from optgrad.experiments.tuning import Tuned

from .made_up import METRICS, STEPS, made_up_comparison, stage

PICTURES = ("curves", "curves_gradient_evaluations", "sensitivity", "robustness")
FILES = {
    "config.toml", "metrics.csv", "summary.csv", "summary.json", "environment.json", "report.md",
    *(f"{name}.{suffix}" for name in PICTURES for suffix in ("svg", "png")),
}  # fmt: skip


@pytest.fixture
def comparison():
    return made_up_comparison()


@pytest.fixture
def quick(monkeypatch):
    """Pictures that cost nothing, where they are not what is tested."""
    monkeypatch.setattr(plots, "figures", lambda comparison: dict.fromkeys(plots.names(comparison)))
    monkeypatch.setattr(plots, "save", lambda figure, path: path.write_text("a picture"))


@pytest.fixture
def folder(tmp_path, comparison, quick):
    """A results folder (with pretended pictures) that has nothing beside it."""
    results.write(comparison, tmp_path / "results")
    return tmp_path / "results"


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tree_of(root):
    """Everything below a folder, hidden or not, with its content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


# What is in it --------------------------------------------------------------------------------


def test_the_folder_holds_everything_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["results"]


def test_metrics_are_complete(folder, comparison):
    rows = read_csv(folder / "metrics.csv")
    expected = {}
    for outcome in comparison.outcomes:
        for one in outcome.tuned.stages:
            for run in range(len(one.seeds)):
                for column, step in enumerate(STEPS):
                    key = (outcome.config.label, one.name, str(float(one.values[run])),
                           str(one.seeds[run]), str(step))  # fmt: skip
                    expected[key] = one.history, run, column
    keys = ("optimizer", "stage", "value", "seed", "step")
    found = {tuple(row[k] for k in keys): row for row in rows}
    assert len(found) == len(rows) == len(expected)
    assert set(found) == set(expected)
    for key, (source, run, column) in expected.items():
        row = found[key]
        assert set(row) == {*keys, *METRICS, "diverged_at"}
        assert int(row["diverged_at"]) == source.diverged_at[run]
        for name in METRICS:  # every digit, so that nothing is lost
            np.testing.assert_array_equal(float(row[name]), source.metrics[name][run, column])


def test_the_summary_follows_from_the_metrics(folder):
    """Recomputed from metrics.csv alone: mean, sd (n−1), steps to target, divergence."""
    metrics = read_csv(folder / "metrics.csv")
    summary = {row["optimizer"]: row for row in read_csv(folder / "summary.csv")}
    assert list(summary) == ["adam", "M-SVAG, β=0.5", "sgd", "lbfgs"]
    for label, row in summary.items():
        runs = {}
        for m in metrics:
            if m["optimizer"] == label and m["stage"] == "replication":
                runs.setdefault(m["seed"], []).append(m)
        assert int(row["seeds"]) == len(runs)
        stable = [run for run in runs.values() if run[-1]["diverged_at"] == "0"]
        assert int(row["diverged"]) == len(runs) - len(stable)
        for name in ("test_accuracy", "test_loss", "train_loss"):
            final = [float(run[-1][name]) for run in stable]
            if not final:
                assert row[f"{name}_mean"] == row[f"{name}_sd"] == ""
                continue
            mean = math.fsum(final) / len(final)
            variance = math.fsum((x - mean) ** 2 for x in final) / (len(final) - 1)
            np.testing.assert_allclose(float(row[f"{name}_mean"]), mean, rtol=1e-12)
            np.testing.assert_allclose(float(row[f"{name}_sd"]), math.sqrt(variance), rtol=1e-9)
        firsts = sorted(
            next((int(m["step"]) for m in run if float(m["test_accuracy"]) >= 0.6), math.inf)
            for run in runs.values()
        )
        middle = firsts[len(firsts) // 2] if firsts else math.inf  # of three seeds
        assert row["steps_to_target"] == ("" if middle == math.inf else f"{float(middle)}")
        assert float(row["target_accuracy"]) == 0.6
    assert {row["steps_to_target"] for row in summary.values()} > {""}  # some did, some did not
    assert (summary["adam"]["best"], summary["adam"]["tuned"]) == ("0.06", "learning_rate")
    assert [summary[k]["at_edge"] for k in summary] == ["False", "True", "True", "False"]
    assert summary["M-SVAG, β=0.5"]["diverged"] == "1"
    assert summary["lbfgs"]["best"] == summary["lbfgs"]["tuned"] == ""


def test_one_seed_has_no_deviation(comparison):
    final = stage("replication", [0.1], [1], 3)
    outcome = Outcome(
        comparison.config.optimizers[0], Tuned("learning_rate", 0.1, False, (final,), final), 1, 1.0
    )
    (record,) = Comparison(comparison.config, "p", (outcome,), 0.6).summary()
    assert record["test_loss_sd"] is None
    assert record["test_loss_mean"] == final.history.metrics["test_loss"][0, -1]
    assert report.mean_sd(record, "test_loss", "{:.2f}".format) == f"{record['test_loss_mean']:.2f}"


def test_a_target_that_most_seeds_miss_is_not_reached(comparison):
    outcome = comparison.outcomes[0]
    final = outcome.tuned.final
    accuracy = final.history.metrics["test_accuracy"]
    accuracy[:] = 0.5
    accuracy[0, 2] = 0.7  # one of three, and only on the way
    (record,) = Comparison(comparison.config, "p", (outcome,), 0.6).summary()
    assert record["steps_to_target"] is None
    accuracy[2, 3:] = 0.65
    (record,) = Comparison(comparison.config, "p", (outcome,), 0.6).summary()
    assert record["steps_to_target"] == 30.0  # the median of 20, 30 and never


def test_the_configuration_in_the_folder_is_the_same_again(folder, comparison):
    again = load_config(folder / "config.toml")
    # Places on this machine are left out: the repetition would refuse its own output folder.
    places = {"output": None, "data_dir": None}
    assert again == comparison.config.model_copy(update=places) != comparison.config
    tree = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    assert (tree["model"], tree["eval_every"]) == ("mlp_small", 10)  # resolved


def test_the_environment_names_versions_and_device(folder):
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["optgrad"] == optgrad.__version__
    for name in ("jax", "optax", "flax", "numpy", "python", "platform", "device", "revision"):
        assert environment[name]


def test_the_revision_is_that_of_the_package_and_of_no_checkout_around_it(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    package = tmp_path / "optgrad"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(optgrad, "__file__", str(package / "__init__.py"))
    assert results._revision() == "unknown"
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "somebody's"], check=True)
    assert results._revision() == "unknown"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "the package's"], check=True)
    assert re.fullmatch("[0-9a-f]{12}", results._revision())
    (package / "__init__.py").write_text("1")
    assert results._revision().endswith("-dirty")


def test_the_report_says_what_was_found(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    for part in (
        "M-SVAG, β=0.5 | 0.1 (edge)",
        "none stable",
        "not tuned",
        "(1 diverged)",
        "0.03 (step 17)",  # what diverged, and where
        "after 40 steps",
        "60.00 %",
        "validation accuracy",
        "optgrad compare --config config.toml",
        f"optgrad: {optgrad.__version__}",
    ):
        assert part in text, part
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / name).is_file()
    tables = {
        part.splitlines()[0]: [line for line in part.splitlines() if line.startswith("|")]
        for part in re.split("\n## |\n(?=Medians)", f"Summary\n{text}")
    }
    medians = next(name for name in tables if name.startswith("Medians"))
    assert [line.split(" | ")[4] for line in tables[medians][2:]] == ["3 |", "2 |", "0 |", "3 |"]
    # One had no stable value.
    for title, rows in (("Summary", 4), ("Who is ahead", 2), (medians, 4), ("Robustness", 4)):
        table = tables[title]
        assert len(table) == 2 + rows
        assert len({line.count("|") for line in table}) == 1
    assert "no winner is called" in text or "is the winner" in text
    mean, sd = (float(read_csv(folder / "summary.csv")[0][f"test_accuracy_{k}"])
                for k in ("mean", "sd"))  # fmt: skip
    assert f"{100 * mean:.2f} ± {100 * sd:.2f}" in text


def test_a_choice_by_the_test_set_is_admitted(comparison):
    config = comparison.config
    tuning = config.tuning.model_copy(update={"select_by": "test_accuracy"})
    leaky = Comparison(config.model_copy(update={"tuning": tuning}), "p", comparison.outcomes, 0.6)
    assert "optimistic" in report.markdown(leaky, {})
    assert "optimistic" not in report.markdown(comparison, {})


# The pictures ---------------------------------------------------------------------------------


def test_the_pictures_are_real_and_the_same_every_time(tmp_path, comparison):
    results.write(comparison, tmp_path / "one")
    for name in PICTURES:
        png = (tmp_path / "one" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", png[16:24])
        assert min(width, height) > 300
        assert len(png) > 10_000
        svg = (tmp_path / "one" / f"{name}.svg").read_text(encoding="utf-8")
        ET.fromstring(svg)
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
        assert any("adam" in t for t in texts), texts  # text stays text
        assert any("M-SVAG, β=0.5" in t for t in texts), texts
    curves = (tmp_path / "one" / "curves.svg").read_text(encoding="utf-8")
    for label in ("training loss", "test loss", "test accuracy", "adam (0.06)", "lbfgs"):
        assert label in curves
    assert "sgd" not in curves  # nothing stable: no curve
    assert curves.count("FillBetweenPolyCollection") + curves.count("PolyCollection") >= 9

    for name, figure in plots.figures(comparison).items():
        plots.save(figure, tmp_path / f"{name}.svg")
        again = (tmp_path / f"{name}.svg").read_bytes()
        assert again == (tmp_path / "one" / f"{name}.svg").read_bytes()


def test_the_shade_is_one_standard_deviation(comparison):
    figure = plots.curves(comparison)
    loss_axis = figure.axes[1]
    final = comparison.outcomes[0].tuned.final.history.metrics["test_loss"]
    line, shade = loss_axis.lines[0], loss_axis.collections[0]
    np.testing.assert_allclose(line.get_ydata(), final.mean(axis=0))
    corners = shade.get_paths()[0].vertices
    top = max(y for x, y in corners if x == STEPS[-1])
    np.testing.assert_allclose(top - final[:, -1].mean(), final[:, -1].std(ddof=1), rtol=1e-6)


def test_nothing_tuned_has_no_sensitivity(comparison):
    only = Comparison(comparison.config, "p", comparison.outcomes[3:], 0.6)
    assert set(plots.figures(only)) == {"curves"}
    assert "sensitivity" not in report.markdown(only, {})


def test_pictures_of_nothing_do_not_warn(comparison):
    nothing = Comparison(comparison.config, "p", comparison.outcomes[2:3], 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plots.figures(nothing)


@pytest.mark.parametrize("label", ["$b_$", "_adam"])
def test_any_label_can_be_drawn(tmp_path, comparison, label):
    first = comparison.outcomes[0]
    renamed = dataclasses.replace(first, config=first.config.model_copy(update={"label": label}))
    drawn = plots.curves(Comparison(comparison.config, "p", (renamed,), 0.6))
    plots.save(drawn, tmp_path / "curves.svg")
    assert label in (tmp_path / "curves.svg").read_text(encoding="utf-8")


# Whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_nothing(tmp_path, comparison, monkeypatch, error):
    def fail(comparison):
        raise error

    monkeypatch.setattr(plots, "figures", fail)
    with pytest.raises(ResultsError if isinstance(error, OSError) else type(error)):
        results.write(comparison, tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_the_earlier_results(folder, comparison, monkeypatch):
    def fail(figure, path):
        raise OSError("disk full")

    before = tree_of(folder.parent)
    monkeypatch.setattr(plots, "save", fail)
    with pytest.raises(ResultsError, match=r"output = .*results cannot be written: disk full"):
        results.write(comparison, folder, overwrite=True)
    assert tree_of(folder.parent) == before


def test_a_failing_last_rename_puts_the_earlier_results_back(folder, comparison, monkeypatch):
    before, replace = tree_of(folder.parent), os.replace

    def fail_into_place(source, destination):
        if Path(destination) == folder and ".old." not in str(source):
            raise OSError("the file system is gone")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_into_place)
    with pytest.raises(ResultsError):
        results.write(comparison, folder, overwrite=True)
    assert tree_of(folder.parent) == before


def test_an_existing_folder_is_refused(folder, comparison):
    before = tree_of(folder.parent)
    with pytest.raises(ResultsError, match=r"exists already; choose another, or let --overwrite"):
        results.write(comparison, folder)
    assert tree_of(folder.parent) == before


def test_overwrite_replaces_the_whole_folder(folder, comparison):
    (folder / "notes.txt").write_text("old")
    smaller = Comparison(comparison.config, "p", comparison.outcomes[:1], 0.6)
    results.write(smaller, folder, overwrite=True)
    only_one = {f"{PICTURES[1]}.{suffix}" for suffix in ("svg", "png")}  # its steps cost the same
    assert {path.name for path in folder.iterdir()} == FILES - only_one
    assert len(read_csv(folder / "summary.csv")) == 1
    assert not (folder / "notes.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["results"]


def test_overwrite_replaces_only_results(tmp_path, comparison, quick):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("years of work")
    before = tree_of(tmp_path)
    with pytest.raises(ResultsError, match="not written by optgrad"):
        results.write(comparison, precious, overwrite=True)
    with pytest.raises(ResultsError, match="not written by optgrad"):
        results.write(comparison, precious / "chapter1.tex", overwrite=True)
    assert tree_of(tmp_path) == before


def test_an_empty_folder_and_missing_parents_are_used(tmp_path, comparison, quick):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        results.write(comparison, folder)
        assert {path.name for path in folder.iterdir()} == FILES


def test_the_folder_can_be_read_by_others(folder):
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_destination_below_a_file_is_refused(tmp_path):
    """As for a folder that may not be written to, which root may."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "results", tmp_path / "file" / "deeper" / "results"):
        with pytest.raises(ResultsError, match=rf"output = {path} cannot be written: "):
            results.check_destination(path, overwrite=True)


def test_checking_leaves_no_trace_in_the_parent(tmp_path):
    results.check_destination(tmp_path / "results", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_name_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="output"):
        results.check_destination(tmp_path / ("x" * 300), overwrite=False)


def test_the_current_folder_is_refused_at_once_or_written(tmp_path, comparison, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        results.check_destination(Path(), overwrite=False)
    except ResultsError:
        return
    results.write(comparison, Path())
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_summary_json_has_everything(folder):
    """And is JSON, which knows no NaN."""
    text = (folder / "summary.json").read_text(encoding="utf-8")

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert set(found) == {
        "format", "problem", "score", "target", "config", "environment", "summary", "ranking"
    }  # fmt: skip
    assert found["config"]["steps"] == 40
    assert found["environment"]["optgrad"] == optgrad.__version__
    labels = [row["optimizer"] for row in found["summary"]]
    assert sorted(found["ranking"]["order"]) == sorted(labels)
    best, *others = (
        row for label in found["ranking"]["order"] for row in found["summary"]
        if row["optimizer"] == label
    )  # fmt: skip
    for row in others:
        if row["test_accuracy_mean"] is not None:
            assert row["test_accuracy_mean"] <= best["test_accuracy_mean"]
    assert best["test_accuracy_median_low"] <= best["test_accuracy_median"]
    assert best["test_accuracy_median"] <= best["test_accuracy_median_high"]

"""The report of several studies: what it says, that it is whole, and what it refuses."""

import dataclasses
import html
import json
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from optgrad.experiments import across, event_files, merged_report, page, plots, results, stored
from optgrad.experiments.results import ResultsError

from .made_up import STEPS, made_up_comparison
from .made_up import stage as made_up_stage

EVIL = "<script>alert('evil')</script>"
OTHERS = ("adam", "a|b & <b>c</b>", EVIL, "newton")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two studies that have one optimizer in common; the second with names that are HTML."""
    place = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "figures", lambda comparison: {})
        results.write(made_up_comparison(), place / "first")
        results.write(made_up_comparison(OTHERS, f"{EVIL} $x$"), place / "second")
    return stored.load_studies([place / "first", place / "second"])


@pytest.fixture(scope="module")
def folder(studies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    merged_report.write(studies, folder)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


PICTURES = ("curves", "curves_gradient_evaluations", "sensitivity", "robustness")


def test_the_folder_is_complete(folder):
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    pictures = {f"{i}-{name}-{kind}" for i, name in enumerate(("first", "second"), 1)
                for kind in PICTURES}  # fmt: skip
    assert found == {"config.toml", "report.html", "report.md"} | {
        f"figures/{name}.svg" for name in pictures
    }


def test_markdown_shows_every_picture_and_no_html(folder):
    found = (folder / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", found)
    assert sorted(shown) == sorted(str(p.relative_to(folder)) for p in folder.glob("figures/*"))
    assert "<" not in found
    assert "&lt;script>" in found
    for line in found.splitlines():
        if "a\\|b" in line and line.startswith("| a"):
            break
    else:
        pytest.fail("no row of the optimizer with a bar in its name")


def test_the_same_optimizer_has_the_same_colour_in_every_picture(folder, studies):
    """And those of the second study other ones than those of the first."""
    order = across.labels(studies)
    assert order == ["adam", "M-SVAG, β=0.5", "sgd", "lbfgs", *OTHERS[1:]]
    for path in folder.glob("figures/*.svg"):
        ET.parse(path)
    for name, labels in (("first", ("adam", "lbfgs")), ("second", ("adam", "newton"))):
        svg = (folder / "figures" / f"{1 + (name == 'second')}-{name}-curves.svg").read_text()
        lines = set(re.findall(r"stroke: (#\w{6})", svg.lower()))
        for label in labels:
            assert plots.look(order.index(label))["color"].lower() in lines


def test_the_page_needs_nothing_beside_it(text):
    assert "plotly.js v" in text
    own = re.sub(r"(?s)<script>.*?</script>", "", text)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", own)
    assert "default-src 'none'" in own  # and if it asked for anything it would not get it


def test_names_are_text_and_no_html(text):
    """As HTML, within the numbers for the script; and shown as they are."""
    assert EVIL not in text
    assert html.escape(EVIL) in text.replace("&#39;", "&#x27;")
    assert "<b>c</b>" not in text
    drawn = numbers(text)
    assert EVIL in drawn["looks"]


def numbers(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_the_page_draws_the_numbers_of_the_studies(text, studies):
    first = numbers(text)["studies"][0]
    final = studies[0].comparison.outcomes[0].tuned.final.history.metrics
    assert first["metrics"][0]["key"] == "test_accuracy"
    assert {m["key"] for m in first["metrics"]} == set(final)
    assert list(first["stages"]) == ["final runs", "stability", "tuning"]
    line = first["stages"]["final runs"]["test_accuracy"][0]
    assert (line["label"], line["name"], line["x"]) == ("adam", "0.06", STEPS.tolist())
    accuracy = 100 * final["test_accuracy"]
    np.testing.assert_allclose(line["y"], accuracy.mean(axis=0))
    np.testing.assert_allclose(line["sd"], accuracy.std(axis=0, ddof=1), atol=1e-12)
    losses = first["stages"]["final runs"]["train_loss"][0]  # none before the first step
    assert losses["x"] == STEPS[1:].tolist()
    tried = first["stages"]["tuning"]["test_loss"]
    assert [(x["name"], x["chosen"]) for x in tried if x["label"] == "adam"] == [
        ("0.1", False), ("0.06", True)
    ]  # fmt: skip
    (adam, _) = first["sensitivity"]["lines"]
    assert (adam["x"], adam["best"]) == ([0.06, 0.1], 0.06)
    profile = numbers(text)["profiles"]
    assert profile == []  # of a single common optimizer there is none


def test_profiles_and_ranks_of_studies_that_share_their_optimizers(studies, tmp_path):
    same = [studies[0], stored.Study("again", tmp_path, studies[0].comparison, {})]
    header, rows = across.mean_ranks(same)
    assert header[2:] == ("mlp_small on digits", "again")
    means = [float(row[1]) for row in rows]
    assert means == sorted(means) == [1.0, 2.0, 3.0, 4.0]
    found = across.all_profiles(same)
    assert [one.cost for one in found] == ["gradient evaluations to target", "final score"]
    assert all(one.instances == {"mlp_small on digits": 2, "again": 2} for one in found)
    assert "figures/profiles.svg" in merged_report.markdown(same)
    figure = plots.profiles(found, across.labels(same))
    for axis, one in zip(figure.axes, found, strict=True):
        shown = {line.get_label(): line.get_ydata() for line in axis.lines}
        assert {k: max(y) for k, y in shown.items()} == {
            k: max(p.shares) for k, p in one.profiles.items()
        }
    assert across.not_common(same) == ""
    assert "sgd" in across.not_common(studies)


def test_event_files_are_written_on_request(studies, tmp_path):
    merged_report.write(studies[:1], tmp_path / "report", tensorboard=True)
    runs = {str(p.parent.relative_to(tmp_path / "report" / "tensorboard" / "1-first"))
            for p in tmp_path.rglob("events.*")}  # fmt: skip
    rows = {(o.config.label, event_files.name_of(s, run))
            for o in studies[0].comparison.outcomes for s in o.stages
            for run in range(len(s.seeds))}  # fmt: skip
    assert {run.partition("/")[2] for run in runs} == {name for _, name in rows}
    assert len(runs) == len(rows)
    assert "M-SVAG, %CE%B2=0.5/tuning-0.06-seed0" in runs
    assert "lbfgs/replication-seed2" in runs


def test_every_run_has_event_files_of_its_own(tmp_path):
    """With several tuned hyperparameters, of which one is text, and at the published defaults."""
    others = {
        "momentum": np.array([0.5, 0.9, 0.9]),
        "solver": np.array(["a/b", "a/b", None], object),
    }
    several = dataclasses.replace(made_up_stage("tuning", [0.1] * 3, [0] * 3, 1), others=others)
    assert [event_files.name_of(several, run) for run in range(3)] == [
        "tuning-0.1-momentum=0.5-solver=a%2Fb-seed0",
        "tuning-0.1-momentum=0.9-solver=a%2Fb-seed0",
        "tuning-0.1-momentum=0.9-solver=None-seed0",
    ]
    comparison = made_up_comparison()
    outcome = comparison.outcomes[0]
    outcome = dataclasses.replace(
        outcome,
        tuned=dataclasses.replace(outcome.tuned, stages=(several,)),
        published=made_up_stage("published", [1e-3] * 2, [1, 2], 2),
    )
    event_files.write(dataclasses.replace(comparison, outcomes=(outcome,)), tmp_path)
    assert {p.parent.name for p in tmp_path.rglob("events.*")} == {
        *(event_files.name_of(several, run) for run in range(3)),
        "published-0.001-seed1",
        "published-0.001-seed2",
    }


@pytest.mark.parametrize("label", ["..", ".", "a/b", "../../x", "c:\\d"])
def test_event_files_stay_below_their_folder(tmp_path, label):
    comparison = made_up_comparison((label, "b", "c", "d"))
    event_files.write(comparison, tmp_path / "out" / "events")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["events"]
    assert len(list((tmp_path / "out" / "events").iterdir())) == 4


@pytest.mark.slow
def test_tensorboard_reads_the_event_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    comparison = made_up_comparison()
    event_files.write(comparison, tmp_path)
    history = comparison.outcomes[1].tuned.final.history
    (below,) = [p for p in tmp_path.iterdir() if p.name.startswith("M-SVAG")]
    for run, seed in enumerate((1, 2, 3)):
        reader = EventAccumulator(str(below / f"replication-0.1-seed{seed}"))
        reader.Reload()
        tags = {metric.replace("_", "/", 1): metric for metric in history.metrics}
        assert set(reader.Tags()["scalars"]) == set(tags)
        for tag, metric in tags.items():
            finite = np.isfinite(history.metrics[metric][run])
            events = reader.Scalars(tag)
            assert [event.step for event in events] == STEPS[finite].tolist()
            values = [event.value for event in events]
            np.testing.assert_allclose(values, history.metrics[metric][run][finite], rtol=1e-6)


# Refusals -------------------------------------------------------------------------------------


def test_the_results_themselves_are_never_replaced(studies):
    folder = studies[0].folder
    for output in (folder, folder.parent):
        with pytest.raises(ResultsError, match="accepted: another folder"):
            merged_report.write(studies, output, overwrite=True)
    assert (folder / "metrics.csv").is_file()


def test_a_failure_midway_leaves_nothing(studies, tmp_path, monkeypatch):
    def fail(figure, path):
        raise OSError("disk full")

    monkeypatch.setattr(plots, "save", fail)
    with pytest.raises(ResultsError, match="disk full"):
        merged_report.write(studies, tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [(page, "jinja2", "report"), (page, "plotly", "report"),
     (event_files, "tensorboardX", "tensorboard")],
)  # fmt: skip
def test_a_missing_extra_is_named(monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}, .*pip install "optgrad\[{extra}\]"'):
        module.check_installed()

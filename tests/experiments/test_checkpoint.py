"""Interrupted studies: nothing is lost, nothing is mixed up, and the numbers are the same."""

import contextlib
import functools
import itertools
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from optgrad import registry
from optgrad.experiments import checkpoint, cli, data, engine, problems, tuning
from optgrad.experiments import config as config_lib

ROOT = Path(__file__).parents[2]
TUNING = {"steps": 4, "seeds": 2, "rates": [1e6, 0.01], "protocol": "grid"}  # the first diverges


class InterruptedError(Exception):
    """Stands for whatever ends a process."""


@functools.cache
def trainer(vectorize="map"):
    problem = problems.image_classification(
        data.load("digits").split_validation(0.15),
        "mlp_small",
        batch_size=8,
        model_options={"hidden": (3,)},
    )
    method = registry.get_method("adam")
    return engine.Trainer(problem, method, eval_every=1, vectorize=vectorize)


def study(journal=None, stop_at=None, vectorize="map", **changes):
    """All metrics of a tiny study, ended by force at its n-th evaluation if there is one."""
    count = itertools.count(1)

    def on_interval(stage, record):
        if next(count) == stop_at:
            raise InterruptedError

    waves = checkpoint.Waves(journal, "adam")
    options = TUNING | changes
    tuned = tuning.tune(trainer(vectorize), on_interval=on_interval, waves=waves, **options)
    return [list(stage.rows()) for stage in tuned.stages]


def assert_same(found, expected):
    assert repr(found) == repr(expected)  # of floats, nan is nan and each bit shows


@pytest.mark.parametrize("vectorize", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_interrupted_again_and_again(tmp_path, vectorize):
    """At every seventh evaluation, those that are read again included."""
    expected = study(vectorize=vectorize)
    results = tmp_path / "results"
    with pytest.raises(InterruptedError), checkpoint.begin(results, {}, seconds=0) as journal:
        study(journal, 7, vectorize)
    count = len([row for stage in expected for row in stage])
    for stop_at in range(14, count, 7):
        with pytest.raises(InterruptedError), checkpoint.resume(results, seconds=0) as journal:
            study(journal, stop_at, vectorize)
    with checkpoint.resume(results, seconds=0) as journal:
        assert_same(study(journal, vectorize=vectorize), expected)
        journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    results = tmp_path / "results"
    with checkpoint.begin(results, {}, seconds=1e9) as journal:
        expected = study(journal)

    def fail(*arguments):
        pytest.fail("trained again")

    monkeypatch.setattr("optgrad.experiments.executable.Executable.advance", fail)
    with checkpoint.resume(results) as journal:
        assert_same(study(journal), expected)


def test_an_interrupted_wave_goes_on_from_its_state(tmp_path):
    """It does not begin anew, which would give the same numbers."""
    results = tmp_path / "results"
    with pytest.raises(InterruptedError), checkpoint.begin(results, {}, seconds=0) as journal:
        study(journal, 4)
    with checkpoint.resume(results) as journal:
        wave = checkpoint.Waves(journal, "adam").next(
            {"learning_rate": np.array(1e6)}, np.array(0), 4
        )
        assert wave.finished() is None
        begun = trainer().executable.init({"learning_rate": np.float32(1e6)}, np.uint32(0))
        state, records = wave.load(begun)
        assert state.step == 2, "the third evaluation was interrupted before it was kept"
        assert [len(run) for run in records] == [3]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    results = tmp_path / "results"
    with checkpoint.begin(results, {}, seconds=1e9) as journal:
        expected = study(journal)
    path = results.with_name("results.partial") / "waves.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with checkpoint.resume(results) as journal:
        assert_same(study(journal), expected)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == whole.count(b"\n")


def test_another_study_is_refused(tmp_path):
    results = tmp_path / "results"
    with checkpoint.begin(results, {}, seconds=1e9) as journal:
        study(journal)
    with (
        checkpoint.resume(results) as journal,
        pytest.raises(checkpoint.CheckpointError, match="holds another study: wave 0 of adam"),
    ):
        study(journal, steps=6)


def test_two_processes_never_work_in_one_folder(tmp_path):
    results = tmp_path / "results"
    with checkpoint.begin(results, {}):
        for attempt in (checkpoint.begin(results, {}, anew=True), checkpoint.resume(results)):
            with pytest.raises(checkpoint.CheckpointError, match="another process"), attempt:
                pass


def test_an_unfinished_study_is_not_overwritten_unasked(tmp_path):
    results = tmp_path / "results"
    with checkpoint.begin(results, {"number": 1}):
        pass
    with (
        pytest.raises(checkpoint.CheckpointError, match="go on with it: optgrad resume"),
        checkpoint.begin(results, {"number": 2}),
    ):
        pass
    with checkpoint.resume(results) as journal:
        assert journal.study == {"number": 1}
    with checkpoint.begin(results, {"number": 2}, anew=True) as journal:
        assert journal.is_empty


def test_an_error_before_anything_was_measured_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoint.begin(tmp_path / "results", {}):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_while_a_study_is_set_up_leaves_nothing(tmp_path, monkeypatch, moment):
    """Its description is written by then, but there is no journal yet."""
    set_up = checkpoint.Journal.__init__

    def interrupted(self, folder, *args, **kwargs):
        assert (folder / "study.json").is_file()
        if moment == "after":
            set_up(self, folder, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Journal, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt), checkpoint.begin(tmp_path / "results", {}):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_cannot_be_thrown_away_is_whole(tmp_path, monkeypatch):
    results = tmp_path / "results"
    with checkpoint.begin(results, {"number": 1}) as journal:
        journal.finish({"label": "adam", "number": 0}, [], 1.0)

    def refuse(self, missing_ok=False):
        raise PermissionError(f"{self} is to stay")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with (
            pytest.raises(checkpoint.CheckpointError, match="is to stay"),
            checkpoint.begin(results, {"number": 2}, anew=True),
        ):
            raise AssertionError
    with checkpoint.resume(results) as journal:
        assert journal.study == {"number": 1}
        assert not journal.is_empty


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume(tmp_path, exists):
    results = tmp_path / "results"
    if exists:
        results.mkdir()
    expected = "its study is finished" if exists else "no unfinished study"
    with pytest.raises(checkpoint.CheckpointError, match=expected), checkpoint.resume(results):
        pass


# As a user ------------------------------------------------------------------------------------

COMMAND = [
    "compare", "--optimizers", "adam", "--steps", "4", "--eval-every", "1", "--seeds", "1",
    "--rates", "0.01", "--set", "model_options.hidden=[3]", "--set", "checkpoint_seconds=0",
]  # fmt: skip


FULL_DISK = """
import optgrad.experiments.checkpoint as c, resource
first = c.Journal.save
def save(*a):
    first(*a)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
c.Journal.save = save
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes there")
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, as_user):
    """No file can grow any more from the second checkpoint on; then there is room again."""
    run = as_user(*COMMAND, "--output", "results", cwd=tmp_path, prelude=FULL_DISK)
    assert run.returncode == 2
    assert "checkpoint in results.partial: " in run.stderr
    assert "optgrad resume results" in run.stderr
    assert "ERROR:" not in run.stderr  # of orbax; tensorstore's threads cannot be silenced
    assert not (tmp_path / "results").exists()
    run = as_user("resume", "results", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "results" / "summary.csv").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["results"]


def test_refusals_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    run = CliRunner().invoke(cli.app, [*COMMAND, "--output", "file/results"])
    assert run.exit_code == 2
    assert "output = file/results cannot be written" in run.output
    run = CliRunner().invoke(cli.app, ["resume", "results"])
    assert run.exit_code == 2
    assert "there is no unfinished study in results.partial" in run.output
    with checkpoint.begin(tmp_path / "results", {}):
        run = CliRunner().invoke(cli.app, [*COMMAND, "--output", "results"])
    assert run.exit_code == 2
    assert "another process works in results.partial" in run.output


@pytest.mark.slow
def test_resume_warns_of_another_environment(tmp_path, as_user):
    tiny = {"optimizers": ["adam"], "steps": 4, "seeds": 1, "tuning.rates": [0.01]}
    settings = config_lib.load_config(overrides=tiny)
    given = {
        "config": cli._resolved(settings),
        "environment": {"jax": "0.0.1"},
    }
    with checkpoint.begin(tmp_path / "results", given):
        pass
    run = as_user("resume", "results.partial", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "jax was 0.0.1 and is" in run.stderr
    assert (tmp_path / "results" / "summary.csv").exists()


def test_what_a_killed_process_had_prepared_is_removed(tmp_path, monkeypatch):
    """Killed while it wrote the results; but nothing that only looks similar."""
    monkeypatch.chdir(tmp_path)
    for name in (".results.ab1_9zxy", ".results.old.ab1_9zxy", ".results.d", ".resultsXab1_9zxy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("")
    (tmp_path / ".results.abcdefgh").write_text("a file")
    run = CliRunner().invoke(cli.app, [*COMMAND, "--output", "results"])
    assert run.exit_code == 0, run.output
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        ".results.abcdefgh", ".results.d", ".resultsXab1_9zxy", "results"
    ]  # fmt: skip


def test_nothing_is_logged_of_a_folder_that_is_gone(tmp_path, caplog):
    """Orbax' own clean-up ran in a thread that nobody waited for, and found no folder."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for i in range(30):
            with pytest.raises(ZeroDivisionError), checkpoint.begin(tmp_path / str(i), {}):
                _ = 1 / 0
    finally:
        sys.setswitchinterval(interval)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_half_written_is_removed(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), checkpoint.begin(tmp_path / "a", {}) as journal:
        journal.finish({"label": "adam", "number": 0}, [], 1.0)
        raise KeyboardInterrupt
    half = tmp_path / "a.partial" / "state" / "7.orbax-checkpoint-tmp-1"
    half.mkdir(parents=True)
    with checkpoint.resume(tmp_path / "a") as journal:
        assert not half.exists()
        assert not journal.is_empty

"""Studies drawn at random are valid, and a soak sees what is lost."""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optgrad.experiments import cli, config, soak


def test_random_studies_are_valid():
    """Every one that may be drawn is a configuration that is accepted."""
    draws, seen = random.Random(0), set()
    for _ in range(100):
        command, flag, names, steps_flag, steps, *settings = soak.random_study(draws)
        assert (command, flag, steps_flag) == ("compare", "--optimizers", "--steps")
        overrides = dict(config.parse_override(text) for text in settings[1::2])
        overrides |= {"optimizers": names.split(","), "steps": int(steps)}
        config.load_config(None, overrides)
        seen |= {*names.split(",")}
    assert seen <= {*soak.methods()}
    assert len(soak.methods()) > 20


class Fake:
    """Stands in for the processes: a study of two steps, killed now and then."""

    def __init__(self, metrics="a", left=()):
        self.metrics, self.left = metrics, left

    def __call__(self, arguments, folder, seconds=None):
        undisturbed = arguments[-1] == "undisturbed"
        partial = folder / "killed.partial"
        if not undisturbed and not partial.exists():
            partial.mkdir()
            (partial / "study.json").touch()
            return False
        results = folder / ("undisturbed" if undisturbed else "killed")
        results.mkdir()
        (results / soak.METRICS).write_text("a" if undisturbed else self.metrics)
        for name in () if undisturbed else self.left:
            (folder / name).mkdir()
        if partial.exists():
            (partial / "study.json").unlink()
            partial.rmdir()
        return True


def test_soak_counts(tmp_path, monkeypatch):
    """At least one study, however short the time; the folder is empty afterwards."""
    monkeypatch.setattr(soak, "_run", Fake())
    lines = []
    tally = soak.soak(0.0, 0, tmp_path, lines.append)
    assert (tally.studies, tally.kills, len(lines)) == (1, 1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fake", "message"), [(Fake("b"), "metrics of .* differ"), (Fake(left=[".hidden"]), "left")]
)
def test_soak_sees_losses(tmp_path, monkeypatch, fake, message):
    """Other metrics, or a folder that stays; both stay to be looked at."""
    monkeypatch.setattr(soak, "_run", fake)
    with pytest.raises(soak.LostError, match=message):
        soak.soak(0.0, 0, tmp_path)
    assert (tmp_path / "killed").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = CliRunner().invoke(cli.app, ["soak", "--minutes", "0"])
    assert run.exit_code == 2


@pytest.mark.slow
def test_what_does_not_go_together_is_drawn_again(tmp_path, monkeypatch):
    """A study that is refused before it begins is none."""
    monkeypatch.setattr(soak, "random_study", lambda draws: arguments.pop(0))
    refused = ["compare", "--optimizers", "m_svag_mb", "--problem", "rosenbrock", "--steps", "2"]
    arguments, lines = [refused], []
    with pytest.raises(IndexError, match="pop"):  # it was drawn again
        soak.soak(0.0, 0, tmp_path, lines.append)
    assert "B = 1" in lines[0]


@pytest.mark.slow
def test_soak_of_real_studies(tmp_path):
    """``kill -9``; `optgrad soak --minutes 20` does as many as there is time for."""
    run = subprocess.run(
        [sys.executable, "-m", "optgrad", "soak", "--minutes", "0", "--seed", "1"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all metrics bit-identical" in run.stdout
    assert list(Path(tmp_path).iterdir()) == []

"""The problems that nothing of `optgrad.auto` was chosen on: they can be trained."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

import optgrad
from optgrad.experiments import engine, user_problems

FOLDER = Path(optgrad.__file__).resolve().parent.parent / "configs" / "auto"
STUDIES = sorted((FOLDER / "held_out").glob("*.toml"))
STEPS = 300


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_short_run_comes_nearer(path, real_data_dir, monkeypatch):
    monkeypatch.setenv("OPTGRAD_DATA_DIR", str(real_data_dir))
    study = tomllib.loads(path.read_text())
    assert study["problem"] == f"../held_out.py:{path.stem}"
    options = {"batch_size": study["batch_size"]}
    problem = user_problems.load(FOLDER / "held_out.py", path.stem, options)
    trainer = engine.Trainer(problem, optgrad.get_method("auto"), eval_every=STEPS)
    history = trainer.train(engine.Runs({}, np.arange(2)), STEPS)
    start, end = history.metrics[problem.score.name].T[[0, -1]]
    assert np.isfinite(end).all()
    sign = problem.score.sign(problem.score.name)
    assert (sign * (end - start) > 0).all()

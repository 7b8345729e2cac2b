"""The whole pipeline on the real images: minutes, hence in CI's slow stage."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from optgrad.experiments import compare, config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_mnist_is_learned_with_one_compilation_per_optimizer(real_data_dir):
    """The committed configuration, shortened: 4 optimizers tuned and replicated."""
    settings = config.load_config(
        "configs/dissecting_adam_mnist.toml",
        {
            "data_dir": real_data_dir,
            "steps": 100,
            "eval_every": 50,
            "seeds": 2,
            "tuning.decades": 1.0,
            "model_options": {"hidden": (100, 50)},
            "target_accuracy": 0.9,
        },
    )
    comparison = compare.run_comparison(settings)
    assert [outcome.compilations for outcome in comparison.outcomes] == [1, 1, 1, 1]
    for record in comparison.summary():
        assert record["test_accuracy_mean"] > 0.9, record
        assert record["diverged"] == 0
        assert record["steps_to_target"] <= 100


@pytest.mark.parametrize(
    ("dataset", "model", "options"),
    [
        ("cifar10", "cifar10_cnn", {"channels": [8, 8, 8], "hidden": [32, 16]}),
        ("cifar100", "all_cnn_c", {"width": 4}),
    ],
)
def test_convolutions_learn_cifar(real_data_dir, dataset, model, options):
    """A narrow network, a host loop over compiled steps: the loss falls below that of chance."""
    settings = config.load_config(
        overrides={
            "dataset": dataset,
            "data_dir": real_data_dir,
            "model": model,
            "model_options": options,
            "optimizers": ["adam"],
            "tuning.protocol": "grid",
            "tuning.rates": [3e-3],
            "steps": 60,
            "eval_every": 60,
            "batch_size": 32,
            "seeds": 2,
            "validation": 0.02,
            "augment": ["crop", "mirror"],
        }
    )
    (outcome,) = compare.run_comparison(settings).outcomes
    loss = outcome.tuned.final.history.metrics["test_loss"]
    chance = np.log({"cifar10": 10, "cifar100": 100}[dataset])
    assert outcome.compilations == 1
    assert np.all(loss[:, -1] < loss[:, 0])
    assert np.all(loss[:, -1] < chance)


# The best configurations have the methods of others.
CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.toml")) if not p.stem.endswith("_best")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_steps_of_every_configuration(path, real_data_dir, tmp_path, run):
    """On images with a narrow network, which compiles sooner."""
    images = "problem" not in tomllib.loads(path.read_text())
    smaller = ["--data-dir", real_data_dir, "--set", "model_options.hidden=[4]"] if images else []
    code, output = run(
        "compare", "--config", path, "--steps", 2, "--eval-every", 1, "--seeds", 1,
        "--tuning", "grid", "--output", tmp_path / "out", *smaller,
    )  # fmt: skip
    assert code == 0, output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["summary"]) == len(summary["config"]["optimizers"])
    assert any(row["best"] is not None for row in summary["summary"])

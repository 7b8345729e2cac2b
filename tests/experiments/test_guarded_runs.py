"""The harness under `guard` and `monitor`: what counts as diverged, what is recorded and drawn."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import plots, problems, results
from optgrad.experiments.compare import run_comparison
from optgrad.experiments.config import ConfigError, load_config
from optgrad.experiments.engine import Runs, Trainer
from optgrad.experiments.features import Features

STEPS, EVERY = 12, 3


@functools.cache
def slope(bad=()):
    """Loss Σθ from θ = 1; the batches of some steps, counted from 0, make it NaN."""

    def batches(data, key, first, num):
        steps = first + jnp.arange(num)
        return jnp.isin(steps, jnp.asarray(bad or (-1,))).astype(jnp.float32)

    def loss(params, is_bad):
        return jnp.sum(params["w"]) * jnp.where(jnp.max(is_bad) > 0, jnp.nan, 1.0)

    return problems.Problem(
        name="slope",
        data=jnp.zeros(()),
        init=lambda key: {"w": jnp.ones(2)},
        batches=batches,
        batch=lambda data, drawn: drawn[None],
        loss=loss,
        example_loss=loss,
        splits={"test": 1},
        evaluate=lambda params, data, split, index: {
            "loss": params["w"][0], "accuracy": 0 * params["w"][0], "count": jnp.ones(()),
        },
    )  # fmt: skip


def trained(bad, features, method="sgd", vectorize="map", scans=True):
    problem = dataclasses.replace(slope(bad), has_convolutions=not scans)
    trainer = Trainer(
        problem, registry.get_method(method), eval_every=EVERY, vectorize=vectorize,
        features=features,
    )  # fmt: skip
    runs = Runs({"learning_rate": np.array([0.1, 0.2])}, np.zeros(2, int))
    return trainer.train(runs, STEPS)


@pytest.mark.parametrize(
    ("vectorize", "scans"), [("map", True), ("vmap", True), ("map", False), ("vmap", False)]
)
def test_a_bad_batch_is_left_out(vectorize, scans):
    """Nine of the twelve steps are made; the mean loss is that of the others' batches."""
    bad = (1, 4, 5)
    history = trained(bad, Features(guard=3), vectorize=vectorize, scans=scans)
    assert (history.diverged_at == 0).all()
    np.testing.assert_allclose(history.metrics["test_loss"][:, -1], [0.1, -0.8], atol=1e-6)
    np.testing.assert_array_equal(history.metrics["rejected_steps"][0], [0, 1, 3, 3, 3])
    losses = history.metrics["train_loss"][0, 1:]
    np.testing.assert_allclose(losses[0], 2 * (1.0 + 0.9) / 2, rtol=1e-6)
    np.testing.assert_allclose(losses[1], 2 * 0.8, rtol=1e-6)


def test_without_a_guard_it_diverges():
    assert (trained((4,), Features()).diverged_at == 5).all()


def test_too_many_in_a_row():
    history = trained((4, 5, 6), Features(guard=3))
    assert (history.diverged_at == 7).all()
    assert np.isnan(history.metrics["test_loss"][:, -1]).all()
    assert (trained((4, 5, 7), Features(guard=3)).diverged_at == 0).all()


def test_the_monitor_records_intervals():
    history = trained((), Features(monitor=EVERY), method="m_svag")
    median = history.metrics["monitor/update/median"]
    assert np.isnan(median[:, 0]).all()
    np.testing.assert_allclose(median[:, 1:], [[0.1] * 4, [0.2] * 4], rtol=1e-6)
    assert (history.metrics["monitor/variance_adaptation/min"][:, 1:] == 1.0).all()
    assert (history.diverged_at == 0).all()


@pytest.mark.slow
def test_all_around_accumulation_and_averages():
    features = Features(guard=2, monitor=2, ema=0.5, accumulate=3, batch_size=1)
    history = trained((1,), features)
    assert (history.metrics["rejected_steps"][:, -1] == 1).all()
    assert (history.diverged_at == 0).all()


@pytest.mark.slow
def test_it_is_configured_and_drawn(tmp_path):
    """A comparison with both has a picture, and its results folder another metric or two."""
    overrides = {
        "steps": 8, "eval_every": 4, "batch_size": 16, "seeds": 1, "tuning.protocol": "none",
        "optimizers": [
            {"method": "m_svag", "hyperparams": {"learning_rate": 0.1}}, "adaptive_sgd",
        ],
        "guard": 3, "monitor": True,
    }  # fmt: skip
    config = load_config(overrides=overrides)
    assert (config.features.guard, config.features.monitor) == (3, 4)
    comparison = run_comparison(config)
    assert "monitor" in plots.names(comparison)
    figure = plots.figures(comparison)["monitor"]
    titles = {axis.get_title() for axis in figure.axes}
    assert titles == {
        "update",
        "relative variance",
        "variance adaptation",
        "step size",
        "curvature",
    }
    folder = tmp_path / "found"
    results.write(comparison, folder)
    assert (folder / "monitor.svg").stat().st_size > 1000
    assert "monitor/update/median" in (folder / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_refused(value):
    with pytest.raises(ConfigError, match="guard"):
        load_config(overrides={"guard": value})

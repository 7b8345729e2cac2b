"""Methods that are evaluated elsewhere than at the parameters that they train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad import registry
from optgrad.experiments import problems
from optgrad.experiments.engine import Runs, Trainer
from optgrad.experiments.features import Features

STEPS, RATES = 6, (0.3, 0.05)
START = np.array([1.0, -2.0], np.float32)
EMA = 0.6


def loss(params, batch):
    return jnp.sum(jnp.array([0.5, 2.0]) * (params["w"] - jnp.mean(batch)) ** 2)


@functools.cache
def two_parameters(has_convolutions=False):
    """A quadratic whose target changes from step to step; the metrics are the parameters."""
    return problems.Problem(
        name="two parameters",
        data=jnp.zeros(()),
        init=lambda key: {"w": jnp.asarray(START)},
        batches=lambda data, key, first, num: jnp.sin(first + jnp.arange(num, dtype=jnp.float32)),
        batch=lambda data, drawn: drawn[None],
        loss=loss,
        example_loss=loss,
        splits={"test": 1},
        evaluate=lambda params, data, split, index: {
            "loss": params["w"][0], "other": params["w"][1], "count": jnp.ones(()),
        },
        has_convolutions=has_convolutions,
    )  # fmt: skip


def by_hand(rate, every=1):
    """What optax evaluates before the first and after every step of ``every`` batches."""
    optimizer = optax.contrib.schedule_free_adamw(rate)
    params = {"w": jnp.asarray(START)}
    state = optimizer.init(params)
    found = [START]
    for first in range(0, STEPS, every):
        batches = np.sin(np.arange(first, first + every, dtype=np.float32))
        gradients = [jax.grad(loss)(params, batch) for batch in batches]
        mean = jax.tree.map(lambda *g: sum(g) / every, *gradients)
        updates, state = optimizer.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(optax.contrib.schedule_free_eval_params(state, params)["w"]))
    assert np.max(np.abs(found[-1] - params["w"])) > 1e-3  # it matters where
    return np.array(found)


def averaged(points):
    """The bias-corrected average of what was evaluated after each step."""
    found = [points[0]]
    for t in range(1, len(points)):
        weights = EMA ** np.arange(t)[::-1]
        found.append(weights @ points[1 : t + 1] / np.sum(weights))
    return np.array(found)


@pytest.mark.parametrize(
    ("features", "vectorize", "has_convolutions"),
    [
        (Features(), "map", False),
        (Features(), "vmap", True),
        (Features(guard=2, monitor=2, accumulate=2, batch_size=1), "vmap", False),
        (Features(ema=EMA, guard=2), "map", False),
    ],
    ids=["map", "vmap and a host loop", "guard, monitor, accumulation", "ema"],
)
def test_schedule_free_is_evaluated_where_optax_says(features, vectorize, has_convolutions):
    trainer = Trainer(
        two_parameters(has_convolutions),
        registry.get_method("schedule_free_adamw"),
        eval_every=features.accumulate,
        vectorize=vectorize,
        features=features,
    )
    runs = Runs({"learning_rate": np.array(RATES)}, np.zeros(len(RATES), int))
    metrics = trainer.train(runs, STEPS).metrics
    for run, rate in enumerate(RATES):
        expected = by_hand(rate, features.accumulate)
        expected = averaged(expected) if features.ema else expected
        found = np.stack([metrics["test_loss"][run], metrics["test_other"][run]], axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def wrapped():
    """schedule_free_adamw in everything that surrounds a state."""
    method = registry.get_method("schedule_free_adamw")
    plain = method.factory(0.3)
    return {
        "plain": plain,
        "guard": optgrad.guard(plain, rollback_after=2),
        "chain": optax.chain(optax.clip(100.0), plain),
        "inject": optgrad.inject("schedule_free_adamw", learning_rate=0.3),
        "low precision": optgrad.low_precision_state(plain, rounding="nearest"),
        "multi steps": optgrad.MultiSteps(plain, 1),
        "masked": optax.masked(plain, {"w": True}),
    }


@pytest.mark.parametrize("name", wrapped())
def test_the_record_finds_the_state_within_any_other(name):
    method, optimizer = registry.get_method("schedule_free_adamw"), wrapped()[name]
    params = {"w": jnp.asarray(START)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradient = jax.grad(loss)(params, jnp.sin(jnp.float32(step)))
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    # The low-precision state rounds the second moment alone.
    tolerance = 2e-2 if name == "low precision" else 1e-5
    found = method.evaluated(state, params)["w"]
    np.testing.assert_allclose(found, by_hand(0.3)[-1], rtol=tolerance, atol=tolerance)


def test_other_methods_are_evaluated_where_they_train():
    params = {"w": jnp.ones(2)}
    for method in registry.methods():
        if method.evaluation_params is None:
            assert method.evaluated((), params) is params


def test_a_state_without_the_methods_own_is_refused():
    state = optgrad.create("adam", learning_rate=0.1).init(jnp.ones(2))
    with pytest.raises(ValueError, match="accepted: a state of schedule_free_adamw"):
        registry.get_method("schedule_free_adamw").evaluated(state, jnp.ones(2))

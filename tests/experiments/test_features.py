"""Schedules, weight decay, averaged weights and accumulation, as they act on a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad import registry
from optgrad.experiments import compare, data, problems, report, studies
from optgrad.experiments.config import ConfigError, load_config
from optgrad.experiments.engine import Runs, Trainer
from optgrad.experiments.features import Features, with_average, with_weight_decay
from optgrad.experiments.schedules import ScheduleConfig

pytestmark = pytest.mark.slow  # together a minute, in CI's slow stage

STEPS = 8


@functools.cache
def slope(gradient=1.0):
    """gradient·Σθ from θ = 1: SGD's parameters, which are evaluated, tell its step sizes."""

    def evaluate(params, data, split, index):
        weight, bias = params["weight"][0, 0], params["bias"][0]
        return {"loss": weight, "bias": bias, "accuracy": 0 * bias, "count": jnp.ones(())}

    def loss(params, batch):
        return gradient * (jnp.sum(params["weight"]) + jnp.sum(params["bias"])) + 0 * jnp.sum(batch)

    return problems.Problem(
        name="slope",
        data=jnp.zeros(()),
        init=lambda key: {"weight": jnp.ones((1, 1)), "bias": jnp.ones(1)},
        batches=lambda data, key, first, num: jnp.zeros((num, 2)),
        batch=lambda data, drawn: drawn,
        loss=loss,
        example_loss=loss,
        splits={"test": 1},
        evaluate=evaluate,
    )


def trajectory(features, rates=(0.1,), problem=None, method="sgd", vectorize="map"):
    """Weight and bias after every step, each [runs, 1 + STEPS]."""
    trainer = Trainer(
        problem or slope(),
        registry.get_method(method),
        eval_every=1,
        vectorize=vectorize,
        features=features,
    )
    runs = Runs({"learning_rate": np.array(rates)}, np.zeros(len(rates), int))
    metrics = trainer.train(runs, STEPS).metrics
    return metrics["test_loss"], metrics["test_bias"]


# Schedules --------------------------------------------------------------------------------------

SCHEDULES = {
    "step": (ScheduleConfig(kind="step", at=[4, 6], factor=0.5), [1] * 4 + [0.5] * 2 + [0.25] * 2),
    "warm-up": (ScheduleConfig(warmup=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    "cosine": (ScheduleConfig(kind="cosine"), (1 + np.cos(np.pi * np.arange(8) / 8)) / 2),
}  # fmt: skip


@pytest.mark.parametrize("vectorize", ["map", "vmap"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_step_sizes_are_the_tuned_rate_times_the_schedule(name, vectorize):
    schedule, factors = SCHEDULES[name]
    rates = [0.1, 0.02]
    features = Features(schedule=schedule.factor_at(STEPS))
    for parameters in trajectory(features, rates, vectorize=vectorize):
        np.testing.assert_allclose(-np.diff(parameters), np.outer(rates, factors), atol=2e-7)


def test_a_fixed_rate_is_scheduled_too():
    schedule, factors = SCHEDULES["step"]
    optimizer = Features(schedule=schedule.factor_at(STEPS)).optimizer(
        registry.get_method("sgd"), {"learning_rate": 0.5}
    )
    state = optimizer.init(jnp.zeros(()))
    for factor in factors:
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        np.testing.assert_allclose(update, -0.5 * factor, rtol=1e-6)


# Weight decay -----------------------------------------------------------------------------------


def test_weights_without_gradient_decay_by_the_scheduled_rate_and_biases_do_not():
    schedule, factors = SCHEDULES["step"]
    features = Features(schedule=schedule.factor_at(STEPS), weight_decay=0.3)
    for method in ("sgd", "adam"):
        weight, bias = trajectory(features, [0.5], slope(0.0), method)
        expected = np.cumprod([1, *(1 - 0.5 * 0.3 * np.array(factors))])
        np.testing.assert_allclose(weight[0], expected, rtol=1e-6)
        np.testing.assert_array_equal(bias[0], 1)


def test_adam_with_weight_decay_is_adamw():
    params = {"weight": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 2.0])}
    mine = with_weight_decay(optgrad.create("adam", learning_rate=0.1), 0.1, 0.2)
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    theirs = optax.adamw(0.1, weight_decay=0.2, mask=mask)
    states, followed = [o.init(params) for o in (mine, theirs)], [params, params]
    for step in range(4):
        gradient = jax.tree.map(lambda p, step=step: jnp.sin(p + step), params)
        for i, optimizer in enumerate((mine, theirs)):
            updates, states[i] = optimizer.update(gradient, states[i], followed[i])
            followed[i] = optax.apply_updates(followed[i], updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *followed)


def test_decay_needs_parameters_and_keeps_types():
    optimizer = with_weight_decay(optgrad.create("sgd", learning_rate=0.1), jnp.float32(0.1), 0.2)
    low = jnp.ones((2, 2), jnp.bfloat16)
    assert optimizer.update(low, optimizer.init(low), low)[0].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(low, optimizer.init(low))


# Averaged weights -------------------------------------------------------------------------------


def test_evaluation_is_of_the_bias_corrected_average():
    weight, bias = trajectory(Features(ema=0.8), [0.5])
    plain, _ = trajectory(Features(), [0.5])
    followed = 1 - 0.5 * np.arange(STEPS + 1)
    np.testing.assert_allclose(plain[0], followed, rtol=1e-6)
    expected = [1.0]  # before training, the parameters themselves
    for t in range(1, STEPS + 1):
        weights = 0.2 * 0.8 ** np.arange(t)[::-1]
        expected.append(np.sum(weights * followed[1 : t + 1]) / (1 - 0.8**t))
    np.testing.assert_allclose(weight[0], expected, rtol=1e-5)
    np.testing.assert_allclose(bias[0], expected, rtol=1e-5)


def test_training_goes_on_from_the_parameters_themselves():
    optimizer = with_average(optgrad.create("sgd", learning_rate=0.1), 0.9)
    low = jnp.ones((2, 2), jnp.bfloat16)
    state = optimizer.init(low)
    assert state.average.dtype == jnp.float32
    updates, state = optimizer.update(low, state, low)
    np.testing.assert_array_equal(updates, optax.sgd(0.1).update(low, optax.sgd(0.1).init(low))[0])
    assert state.average.dtype == jnp.float32
    np.testing.assert_array_equal(state.average, optax.apply_updates(low, updates))


# Accumulation -----------------------------------------------------------------------------------


@functools.cache
def regression(batch_size):
    """128 points in order, so that consecutive micro-batches are one large batch."""
    random = np.random.RandomState(0)
    x, y = random.randn(128, 3).astype(np.float32), random.randn(128, 2).astype(np.float32)

    def batches(data, key, first_step, num_steps):
        steps = first_step + jnp.arange(num_steps)
        return (steps[:, None] * batch_size + jnp.arange(batch_size)) % 128

    def example_loss(params, example):
        x, y = example
        return jnp.sum((x @ params["weight"] + params["bias"] - y) ** 2)

    def loss(params, batch):
        return jnp.mean(jax.vmap(example_loss, in_axes=(None, 0))(params, batch))

    return problems.Problem(
        name="regression",
        data=(jnp.asarray(x), jnp.asarray(y)),
        init=lambda key: {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        batches=batches,
        batch=lambda data, rows: jax.tree.map(lambda a: a[rows], data),
        loss=loss,
        example_loss=example_loss,
        splits={"test": 1},
        evaluate=lambda params, data, split, index: {
            "loss": loss(params, data),
            "count": jnp.ones(()),
        },
    )


EVERYTHING = {
    "schedule": ScheduleConfig(kind="step", at=[2], warmup=2).factor_at(4),
    "weight_decay": 0.5,
    "ema": 0.5,
}


@pytest.mark.parametrize(
    ("method", "surroundings"),
    [
        ("momentum", EVERYTHING),
        ("m_svag_mb", {}),
        pytest.param("csawg", {}, marks=pytest.mark.slow),
    ],
    ids=["momentum with all", "m_svag_mb", "csawg"],
)
def test_micro_batches_equal_one_large_batch(method, surroundings):
    def history(micro_batches):
        trainer = Trainer(
            regression(32 // micro_batches),
            registry.get_method(method),
            eval_every=micro_batches,
            features=Features(
                accumulate=micro_batches, batch_size=32 // micro_batches, **surroundings
            ),
        )
        runs = Runs({"learning_rate": np.array([0.03])}, np.array([1]))
        return trainer.train(runs, 4 * micro_batches).metrics

    large, accumulated = history(1), history(4)
    assert (np.diff(large["test_loss"]) != 0).all()
    for name in large:
        np.testing.assert_allclose(
            accumulated[name], large[name], rtol=2e-4, atol=1e-6, err_msg=name
        )


def test_updates_come_once_in_k_steps_and_schedules_count_them():
    features = Features(
        schedule=ScheduleConfig(kind="step", at=[2], factor=0.5).factor_at(4),
        accumulate=2,
        batch_size=2,
    )
    weight, _ = trajectory(features)
    np.testing.assert_allclose(-np.diff(weight[0]), [0, 0.1, 0, 0.1, 0, 0.05, 0, 0.05], atol=2e-7)


# Nothing by default -----------------------------------------------------------------------------


def test_nothing_surrounds_the_method_by_default():
    method = registry.get_method("m_svag")
    plain, given = Features().optimizer(method, {"learning_rate": 0.1}), optgrad.m_svag(0.1)
    params = {"w": jnp.ones((2, 2))}
    assert str(jax.make_jaxpr(plain.init)(params)) == str(jax.make_jaxpr(given.init)(params))
    arguments = params, given.init(params), params
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(given.init(params))
    assert str(jax.make_jaxpr(plain.update)(*arguments)) == str(
        jax.make_jaxpr(given.update)(*arguments)
    )
    assert load_config().features == Features(batch_size=64)
    assert Features().evaluated(method, params, None) is params


# All methods, and refusals ----------------------------------------------------------------------


def accepted(features):
    """Methods that the features go with and the harness can train."""
    for method in registry.methods():
        try:
            features.check(method)
        except ValueError:
            continue
        yield method.name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(accepted(Features(**EVERYTHING, accumulate=2))))
def test_all_methods_that_are_accepted_can_be_surrounded(name):
    trainer = Trainer(
        regression(8),
        registry.get_method(name),
        eval_every=2,
        features=Features(**EVERYTHING, accumulate=2, batch_size=8),
    )
    trainer.check(["learning_rate"])


def test_what_is_accepted():
    scheduled = set(accepted(Features(schedule=lambda count: 1.0)))
    assert {"sgd", "adam", "adamw", "m_svag", "csawg", "kfac", "newton"} <= scheduled
    assert not scheduled & {"lbfgs", "polyak", "ogr1d", "vsgd", "adaptive_sgd", "damped_newton"}
    decaying = {m.name for m in registry.methods() if "weight_decay" in m.hyperparameters}
    assert {"adamw", "prodigy", "schedule_free_adamw"} <= decaying
    assert set(accepted(Features(weight_decay=0.1))) == scheduled - decaying
    accumulated = set(accepted(Features(accumulate=2)))
    assert {"sgd", "m_svag_mb", "polyak", "l4_adam", "ogr1d", "csawg"} <= accumulated
    assert not accumulated & {"lbfgs", "kfac", "natural_gradient", "hessian_free", "lossgrad"}
    assert len(list(accepted(Features(ema=0.9)))) == len(registry.methods())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"schedule.kind": "cosine", "optimizers": ["polyak"]},
         ["schedule: polyak", "tunes max_learning_rate", "accepted: methods that tune learning_r"]),
        ({"schedule.warmup": 3, "optimizers": ["lbfgs"]}, ["schedule: lbfgs", "tunes nothing"]),
        ({"weight_decay": 0.1, "optimizers": ["ogr1d"]}, ["weight_decay: ogr1d", "(or l2)"]),
        ({"weight_decay": 0.1, "optimizers": ["adamw"]},
         ["weight_decay = 0.1: adamw decays", "hyperparams.weight_decay"]),
        ({"accumulate": 2, "optimizers": ["adam", "lbfgs"]},
         ["accumulate = 2: lbfgs needs value_fn", "accumulate = 1 with a larger batch_size"]),
        ({"accumulate": 2, "optimizers": ["kfac"]}, ["accumulate = 2: kfac needs kfac_stats"]),
        ({"accumulate": 3}, ["steps = 1000 is not a multiple of accumulate = 3"]),
        ({"accumulate": 10, "eval_every": 25},
         ["eval_every = 25 is not a multiple of accumulate = 10"]),
        ({"accumulate": 0}, ["accumulate = 0", "greater than 0"]),
        ({"accumulate": 2.0}, ["accumulate = 2.0", "integer"]),
        ({"ema": 1.0}, ["ema = 1.0", "less than 1"]),
        ({"label_smoothing": 1}, ["label_smoothing = 1", "less than 1"]),
        ({"weight_decay": -1}, ["weight_decay = -1", "greater than or equal to 0"]),
        ({"precision": "float16"}, ["precision = 'float16'", "'float32' or 'bfloat16'"]),
        ({"schedule.knd": "step"}, ["schedule.knd = 'step': no such field; did you mean 'kind'?"]),
        ({"schedule.kind": "step", "schedule.at": [1000]},
         ["schedule.at = [1000]", "the run's 1000 updates"]),
        ({"schedule.kind": "step", "schedule.at": [600], "accumulate": 2},
         ["schedule.at = [600]", "the run's 500 updates"]),
        ({"schedule.kind": "step"}, ["schedule.at = []"]),
        ({"model": "mlp", "model_options.dropout": [0.2, 0.5]},
         ["model_options.dropout = [0.2, 0.5]: no such option"]),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_are_refused_before_any_work(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    for part in expected:
        assert part in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_decay": -0.1}, r"weight_decay = -0.1 is outside its range \[0, inf\)"),
        ({"ema": 1.0}, r"ema = 1.0 is outside its range \[0, 1\)"),
        ({"accumulate": 0}, "accumulate = 0 is not accepted"),
    ],
)
def test_bad_features_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Features(**fields)


# From a configuration to the run ----------------------------------------------------------------


def test_evaluations_fall_between_updates():
    config = load_config(overrides={"steps": 24, "accumulate": 4})
    assert (config.updates, config.eval_every) == (6, 4)


def test_every_field_reaches_problem_and_trainer(monkeypatch):
    given = {}
    monkeypatch.setattr(problems, "image_classification", lambda *a, **kw: given.update(kw))
    monkeypatch.setattr(data, "load", lambda *a: None)
    fields = {
        "label_smoothing": 0.2, "precision": "bfloat16", "augment": ["colour"], "weight_decay": 0.5,
        "ema": 0.9, "accumulate": 4, "batch_size": 16, "schedule.kind": "cosine",
        "validation": 0, "tuning.select_by": "test_loss",
    }  # fmt: skip
    config = load_config(overrides=fields)
    compare.load_problem(config)
    assert (given["label_smoothing"], given["precision"]) == (0.2, "bfloat16")
    assert given["augment"] == ("colour",)
    trainer = studies.Study(config, regression(16), config.optimizers[1]).trainers({})
    features = trainer.features
    assert (features.weight_decay, features.ema) == (0.5, 0.9)
    assert (features.accumulate, features.batch_size) == (4, 16)
    np.testing.assert_allclose([features.schedule(0), features.schedule(250)], [1, 0], atol=1e-6)


def test_the_report_says_what_surrounded_the_methods():
    def said(**overrides):
        comparison = compare.Comparison(load_config(overrides=overrides), "problem", (), 0.9)
        return report.markdown(comparison, {})

    text = said(**{"ema": 0.99, "accumulate": 4, "weight_decay": 0.01, "schedule.warmup": 5})
    for part in (
        "Evaluated is the moving average of the parameters (decay 0.99).",
        "Every update takes the gradients of 4 steps.",
        "weight decay of 0.01",
        "peak of a schedule (constant, 5 updates of linear warm-up)",
    ):
        assert part in text
        assert part not in said()


@pytest.mark.slow
def test_a_comparison_with_all_features_runs():
    base = {
        "steps": 16, "eval_every": 8, "batch_size": 16, "seeds": 1, "tuning.protocol": "grid",
        "optimizers": ["momentum"], "tuning.rates": [0.1, 0.01],
    }  # fmt: skip
    features = {
        "accumulate": 2, "schedule.kind": "cosine", "schedule.warmup": 2, "weight_decay": 0.01,
        "ema": 0.5, "label_smoothing": 0.1, "precision": "bfloat16", "augment": ["crop", "colour"],
    }  # fmt: skip
    plain, surrounded = (
        compare.run_comparison(load_config(overrides=base | more)).outcomes[0]
        for more in ({}, features)
    )
    for name, values in surrounded.tuned.final.history.metrics.items():
        assert np.isfinite(values[:, 1:]).all(), name
        assert (values[:, 1:] != plain.tuned.final.history.metrics[name][:, 1:]).any(), name
    assert surrounded.compilations == 1

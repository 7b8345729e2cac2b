"""The training loop: one compilation, the same numbers in every mode, divergence, independence."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad import registry
from optgrad.core import layer_statistics, oracles
from optgrad.experiments import data, extras, problems
from optgrad.experiments.engine import Runs, Trainer

EVAL_EVERY = 5


# Small problems -------------------------------------------------------------------------------


@functools.cache
def softmax_regression(has_convolutions=False):
    """Three classes in four dimensions: compiles in a fraction of a second, learns for real."""
    random = np.random.RandomState(0)
    centres = 2 * random.randn(3, 4)
    labels = np.arange(90) % 3
    points = (centres[labels] + random.randn(90, 4)).astype(np.float32)
    train, test = slice(0, 60), slice(60, 90)
    test_batch = 8  # the last of four holds 6

    # Functions of the key by plain arithmetic: jax.random takes seconds to compile.
    def init(key):
        phase = (jax.random.key_data(key)[0] % 1000).astype(jnp.float32)
        kernel = 0.1 * jnp.sin(phase + jnp.arange(12.0)).reshape(4, 3)
        return {"out": {"kernel": kernel, "bias": jnp.zeros(3)}}

    def apply(params, x, taps=None):
        layer = params["out"]
        logits = x @ layer["kernel"] + layer["bias"]
        return logits if taps is None else (logits + taps["out"], {"out": x})

    def batches(data, key, first_step, num_steps):
        steps = first_step + jnp.arange(num_steps)
        start = jax.random.key_data(key)[0].astype(jnp.int32) % 60
        return (start + 13 * steps[:, None] ** 2 + 7 * jnp.arange(8)) % 60

    def example_loss(params, example):
        logits = apply(params, example["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    def evaluate(params, data, split, index):
        rows = index * test_batch + jnp.arange(test_batch)
        inside = (rows < 30).astype(jnp.float32)
        x, y = (data[split][k][jnp.minimum(rows, 29)] for k in "xy")
        logits = apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return {
            "loss": jnp.sum(inside * losses),
            "accuracy": jnp.sum(inside * (jnp.argmax(logits, -1) == y)),
            "count": jnp.sum(inside),
        }

    return problems.Problem(
        name="softmax regression",
        data={
            name: {"x": jnp.asarray(points[part]), "y": jnp.asarray(labels[part])}
            for name, part in (("train", train), ("test", test))
        },
        init=init,
        batches=batches,
        batch=lambda data, drawn: jax.tree.map(lambda a: a[drawn], data["train"]),
        loss=lambda params, batch: jnp.mean(
            jax.vmap(example_loss, in_axes=(None, 0))(params, batch)
        ),
        example_loss=example_loss,
        splits={"test": 4},
        evaluate=evaluate,
        has_convolutions=has_convolutions,
        outputs=lambda params, batch: apply(params, batch["x"]),
        out_loss=lambda z, batch: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(z, batch["y"])
        ),
        residuals=lambda params, batch: apply(params, batch["x"]) - jax.nn.one_hot(batch["y"], 3),
        layer_statistics=lambda params, batch, key: layer_statistics.layer_statistics(
            apply,
            params,
            batch["x"],
            batch["y"],
            key,
            labels="model" if key is not None else "data",
        ),
    )


def parabola():
    """½θ² from θ = 1 whatever the seed: gradient descent gives θ_t = (1−α)^t exactly."""
    return problems.Problem(
        name="parabola",
        data={"target": jnp.zeros(())},
        init=lambda key: {"theta": jnp.ones(())},
        batches=lambda data, key, first_step, num_steps: jnp.zeros((num_steps, 2)),
        batch=lambda data, drawn: drawn,
        loss=lambda params, batch: 0.5 * jnp.mean((params["theta"] - batch) ** 2),
        example_loss=lambda params, example: 0.5 * (params["theta"] - example) ** 2,
        splits={"test": 1},
        evaluate=lambda params, data, split, index: {
            "loss": 0.5 * (params["theta"] - data["target"]) ** 2,
            "accuracy": (jnp.abs(params["theta"]) < 0.5).astype(jnp.float32),
            "count": jnp.ones(()),
        },
    )


def synthetic_images(side=9, train=24, test=10):
    random = np.random.RandomState(1)
    images = random.randint(0, 256, (train + test, side, side, 1)).astype(np.uint8)
    labels = (np.arange(train + test) % 3).astype(np.int32)
    images[labels == 1, : side // 2] //= 4
    images[labels == 2, :, : side // 2] //= 4
    return data.Dataset(
        "synthetic", images[:train], labels[:train], images[train:], labels[train:], ("a", "b", "c")
    )


def make_runs(rates, seeds, name="learning_rate"):
    pairs = list(itertools.product(rates, seeds))
    return Runs({name: np.array([r for r, _ in pairs])}, np.array([s for _, s in pairs]))


def make_trainer(name, problem=None, *, vectorize="map", eval_every=EVAL_EVERY, **hyperparams):
    return Trainer(
        problem or softmax_regression(),
        registry.get_method(name),
        hyperparams,
        eval_every=eval_every,
        vectorize=vectorize,
    )


def assert_same(actual, expected, rows=slice(None), rtol=2e-5, atol=2e-6):
    assert actual.steps.tolist() == expected.steps.tolist()
    assert set(actual.metrics) == set(expected.metrics)
    for name, values in actual.metrics.items():
        np.testing.assert_allclose(
            values, expected.metrics[name][rows], rtol=rtol, atol=atol, err_msg=name
        )
    np.testing.assert_array_equal(actual.diverged_at, expected.diverged_at[rows])


# One compilation ------------------------------------------------------------------------------


@contextlib.contextmanager
def compiled_functions():
    """Names of the functions that XLA compiles in this block, from jax's own log."""
    messages = []

    class Collect(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger("jax")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    names = []
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        pattern = re.compile(r"Finished XLA compilation of (?:jit\()?(\w+)")
        names += [found[1] for m in messages if (found := pattern.match(m))]


@pytest.mark.parametrize("vectorize", ["vmap", "map"])
def test_eight_rates_times_three_seeds_cost_one_compilation(vectorize):
    trainer = make_trainer("m_svag", vectorize=vectorize)
    runs = make_runs(np.geomspace(1e-3, 1.0, 8), range(3))
    with compiled_functions() as names:
        history = trainer.train(runs, 4 * EVAL_EVERY)
    assert names.count("interval") == 1, names
    assert "step" not in names
    assert trainer.compilations == 1
    for other in ("init", "draw", "evaluate"):
        assert names.count(other) == 1, (other, names)
    assert {len(v) for v in history.metrics.values()} == {24}

    # Other rates, other seeds, another length, fewer and more runs: nothing is compiled again.
    with compiled_functions() as names:
        trainer.train(make_runs([0.3], [7]), EVAL_EVERY)
        trainer.train(make_runs(np.geomspace(1e-2, 1.0, 13), range(2)), 2 * EVAL_EVERY)
    assert trainer.compilations == 1
    assert not {n for n in names if n.startswith("_")}, names


def test_the_count_of_compilations_can_fail():
    """The two ways of counting do see a compilation where there is one."""
    trainer = make_trainer("sgd", vectorize="vmap")
    trainer.train(make_runs([0.1], [0]), EVAL_EVERY)
    trainer._width = None  # a second, wider program
    with compiled_functions() as names:
        trainer.train(make_runs([0.1, 0.2], [0]), EVAL_EVERY)
    assert names.count("interval") == 1
    assert trainer.compilations == 2


@pytest.mark.parametrize("vectorize", ["vmap", "map"])
def test_host_stepped_runs_cost_one_compilation(vectorize):
    trainer = make_trainer("adam", softmax_regression(True), vectorize=vectorize)
    assert not trainer.executable.scans
    with compiled_functions() as names:
        trainer.train(make_runs([0.1, 0.2], range(2)), 2 * EVAL_EVERY)
    assert names.count("step") == 1
    assert "interval" not in names
    assert trainer.compilations == 1


# vmap and map ---------------------------------------------------------------------------------


def one_per_kind():
    """One method for each set of extras that the harness provides."""
    kinds = {}
    for method in registry.methods():
        # Undamped Newton divides by the zero eigenvalues of a softmax: no two programs agree.
        if method.needs <= extras.PROVIDED and method.name != "newton":
            kinds.setdefault(method.needs, method.name)
    return sorted({*kinds.values(), "adam", "m_svag", "adam_star", "auto", "ogr1d"})


@pytest.mark.parametrize("name", one_per_kind())
def test_vmap_and_map_agree(name):
    method = registry.get_method(name)
    fixed = dict(method.test_hyperparams)
    if method.tunes:
        rate = fixed.pop(method.tunes.hyperparameter)
        runs = make_runs([rate, rate / 3], [0, 5], method.tunes.hyperparameter)
    else:
        runs = Runs({}, np.array([0, 5, 6, 7]))
    # A line search branches on rounding, and a few steps later it shows.
    steps = EVAL_EVERY if "value_fn" in method.needs else 3 * EVAL_EVERY
    histories = {}
    for mode in ("vmap", "map"):
        trainer = make_trainer(name, vectorize=mode, **fixed)
        histories[mode] = trainer.train(runs, steps)
        assert trainer.compilations == 1
    assert_same(histories["vmap"], histories["map"], rtol=1e-4, atol=1e-5)
    losses = histories["map"].metrics["test_loss"]
    assert np.isfinite(losses).all()
    assert (losses[:, -1] < losses[:, 0]).all()
    assert len(np.unique(losses[:, -1])) == 4  # the runs do differ


@pytest.mark.parametrize("name", [m.name for m in registry.methods() if m.needs <= extras.PROVIDED])
def test_an_interval_keeps_the_types_of_the_state(name):
    """Weak types included: any that changes would compile the next interval again."""
    method = registry.get_method(name)
    hyperparams = dict(method.test_hyperparams)
    tuned = {}
    if method.tunes:
        tuned = {method.tunes.hyperparameter: jnp.float32(hyperparams.pop(*method.tunes[:1]))}
    trainer = make_trainer(name, **hyperparams)
    seed, data = jnp.uint32(0), trainer.problem.data
    before = jax.eval_shape(trainer.program.init, tuned, seed)
    drawn = jax.eval_shape(trainer.program.draw, before.step, seed, data)
    after, _ = jax.eval_shape(trainer.program.interval, before, tuned, drawn, data)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype, one.weak_type) == (other.shape, other.dtype, other.weak_type)


def test_every_kind_of_extra_is_exercised():
    needed = set().union(*(registry.get_method(name).needs for name in one_per_kind()))
    assert needed >= extras.PROVIDED


def test_auto_maps_on_cpu():
    assert jax.default_backend() == "cpu"
    assert make_trainer("sgd", vectorize="auto").vectorize == "map"


def test_waves_are_padded_to_the_first_width():
    trainer = make_trainer("momentum", vectorize="vmap")
    runs = make_runs([0.02, 0.05], range(5))  # 10 = 4 + 4 + 2
    trainer.train(make_runs([0.1], range(4)), EVAL_EVERY)
    calls = []
    history = trainer.train(runs, 2 * EVAL_EVERY, lambda run, step, _: calls.append((run, step)))
    assert trainer.compilations == 1
    assert_same(history, make_trainer("momentum").train(runs, 2 * EVAL_EVERY))
    assert sorted(calls) == [(run, step) for run in range(10) for step in (0, 5, 10)]


def test_metrics_come_in_the_order_of_their_evaluation():
    """Which is the order of the columns of metrics.csv."""
    names = [f"metric{i}" for i in range(9)]

    def evaluate(params, data, split, index):
        return {"count": jnp.ones(()), **dict.fromkeys(names, params["theta"])}

    problem = dataclasses.replace(parabola(), evaluate=evaluate, splits={"zest": 1, "best": 1})
    history = make_trainer("sgd", problem, learning_rate=0.1).train(Runs({}, np.array([0])), 5)
    expected = [f"{split}_{name}" for split in ("zest", "best") for name in names]
    assert list(history.metrics) == ["train_loss", *expected]


# Independence ---------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_the_runs_beside():
    together = make_runs([0.02, 0.05, 0.1], range(3))
    alone = Runs({"learning_rate": np.array([0.05])}, np.array([2]))
    row = [5]
    mapped = make_trainer("m_svag")
    beside = mapped.train(together, 2 * EVAL_EVERY)
    # One program, one run at a time: the very same bits.
    assert_same(mapped.train(alone, 2 * EVAL_EVERY), beside, row, rtol=0, atol=0)
    wide = make_trainer("m_svag", vectorize="vmap").train(together, 2 * EVAL_EVERY)
    narrow = make_trainer("m_svag", vectorize="vmap").train(alone, 2 * EVAL_EVERY)
    assert_same(narrow, wide, row)
    assert_same(narrow, beside, row)


def test_numbers_do_not_depend_on_eval_every():
    runs = make_runs([0.05], range(2))
    often, seldom = (make_trainer("m_svag", eval_every=n).train(runs, 12) for n in (2, 6))
    assert often.steps.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert seldom.steps.tolist() == [0, 6, 12]
    for name in ("test_loss", "test_accuracy"):
        np.testing.assert_allclose(
            seldom.metrics[name], often.metrics[name][:, ::3], rtol=2e-5, atol=2e-6
        )
    # The training loss of an interval is the mean of those of its parts.
    parts = often.metrics["train_loss"][:, 1:].reshape(2, 2, 3).mean(axis=2)
    np.testing.assert_allclose(seldom.metrics["train_loss"][:, 1:], parts, rtol=2e-5)


def test_training_twice_gives_the_same_bits():
    runs = make_runs([0.05], range(2))
    trainer = make_trainer("adam")
    assert_same(trainer.train(runs, 10), trainer.train(runs, 10), rtol=0, atol=0)


def test_seeds_differ_in_start_and_batches():
    history = make_trainer("sgd").train(make_runs([0.0, 0.1], [0, 1]), EVAL_EVERY)
    test_loss, train_loss = history.metrics["test_loss"], history.metrics["train_loss"]
    assert test_loss[0, 0] != test_loss[1, 0]
    assert train_loss[0, 1] != train_loss[1, 1]
    np.testing.assert_array_equal(test_loss[0, 0], test_loss[2, 0])  # one seed, one start
    np.testing.assert_allclose(test_loss[0, 1], test_loss[0, 0], rtol=1e-6)  # rate 0: no move


# Convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", ["map", "vmap"])
def test_host_steps_equal_the_scan(vectorize):
    """The two ways through an interval, on a problem that only claims to convolve."""
    runs = make_runs([0.05, 0.1], range(2))
    trainer = make_trainer("m_svag_mb", softmax_regression(True), vectorize=vectorize)
    assert not trainer.executable.scans  # decided by the trainer itself
    stepped = trainer.train(runs, 2 * EVAL_EVERY)
    assert trainer.executable._interval._cache_size() == 0
    trainer.executable.scans = True
    assert_same(trainer.train(runs, 2 * EVAL_EVERY), stepped)
    assert trainer.executable._interval._cache_size() == 1


def test_convolutions_are_stepped_from_the_host_and_equal_the_scan():
    problem = problems.image_classification(
        synthetic_images(), "all_cnn_c", batch_size=8, model_options={"width": 4},
        evaluation_batch=4,
    )  # fmt: skip
    # Nine random initialisations take seven seconds to compile, and are not what is tested.
    shapes = jax.eval_shape(problem.init, jax.random.key(0))

    def init(key):
        del key
        return jax.tree.map(
            lambda p: jnp.sin(1.0 + jnp.arange(p.size)).reshape(p.shape) / 3, shapes
        )

    problem = dataclasses.replace(problem, init=init)
    runs = make_runs([0.05], [3])
    trainer = make_trainer("momentum", problem, eval_every=2)
    assert not trainer.executable.scans  # decided by the trainer itself
    history = trainer.train(runs, 4)
    trainer.executable.scans = True
    assert_same(trainer.train(runs, 4), history, rtol=1e-4, atol=1e-5)
    assert history.metrics["test_loss"][0, -1] != history.metrics["test_loss"][0, 0]


def test_networks_without_convolutions_are_scanned():
    assert make_trainer("sgd").executable.scans


# Divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", ["vmap", "map"])
def test_a_diverging_run_is_reported_and_harms_no_neighbour(vectorize):
    """θ_t = (1−α)^t: with 1−α = −10⁴ the loss overflows float32 (3.4e38) at step 6: θ_5 = −10²⁰."""
    rates = np.array([0.5, 1e4 + 1, 0.1, 1e19])  # 1e19: θ_2 = 10³⁸, so the loss of step 3
    trainer = make_trainer("sgd", parabola(), vectorize=vectorize, eval_every=4)
    history = trainer.train(Runs({"learning_rate": rates}, np.zeros(4, int)), 16)
    assert history.diverged_at.tolist() == [0, 6, 0, 3]
    assert history.steps.tolist() == [0, 4, 8, 12, 16]
    for name, values in history.metrics.items():
        # Step 4 is before the divergence of run 1; everything from step 8 on is NaN.
        first = 1 if name == "train_loss" else 0  # no training loss before the first step
        assert np.isfinite(values[1, first:2]).all(), name
        assert np.isnan(values[1, 2:]).all(), name
        assert np.isnan(values[3, 1:]).all(), name
        assert np.isfinite(values[[0, 2], first:]).all(), name
    for row in (0, 2):
        theta = (1 - rates[row]) ** history.steps
        np.testing.assert_allclose(history.metrics["test_loss"][row], 0.5 * theta**2, rtol=1e-5)
        losses = 0.5 * (1 - rates[row]) ** (2 * np.arange(16.0))
        np.testing.assert_allclose(
            history.metrics["train_loss"][row, 1:], losses.reshape(4, 4).mean(axis=1), rtol=1e-5
        )


@pytest.mark.parametrize("vectorize", ["vmap", "map"])
def test_when_all_have_diverged_the_rest_is_nan(vectorize):
    calls = []
    trainer = make_trainer("sgd", parabola(), vectorize=vectorize, eval_every=4)
    runs = make_runs([1e10, 1e12], [0])
    history = trainer.train(runs, 400, lambda *record: calls.append(record))
    assert (history.diverged_at > 0).all()
    assert all(v.shape == (2, 101) for v in history.metrics.values())
    assert np.isnan(history.metrics["test_loss"][:, 1:]).all()
    assert len(calls) == 4  # two evaluations of each run: there was nothing left to compute
    assert calls[-1][2]["diverged_at"] > 0


def test_infinite_gradients_of_a_finite_loss_count_as_divergence():
    history = make_trainer("sgd", parabola(), eval_every=4).train(make_runs([np.inf], [0]), 8)
    assert history.diverged_at.tolist() == [2]


def test_divergence_in_the_last_step_is_noticed():
    trainer = make_trainer("sgd", parabola(), eval_every=1)
    history = trainer.train(make_runs([1e30], [0]), 1)
    assert not np.isfinite(history.metrics["test_loss"][0, -1])
    assert history.diverged_at[0] > 0


# Curvature ------------------------------------------------------------------------------------


def extras_of(trainer, seed=3, step=0):
    """The extra arguments of one step, functions left out; and its parameters and batch."""
    state = trainer.program.init({}, jnp.uint32(seed))
    drawn, keys = trainer.program.draw(jnp.int32(step), jnp.uint32(seed), trainer.problem.data)
    one = jax.tree.map(lambda x: x[0], drawn)
    batch = trainer.problem.batch(trainer.problem.data, one)
    _, _, extra = trainer.program.extras.build(
        state.params, batch, None if keys is None else keys[0]
    )
    return extra, state.params, batch


def test_the_outputs_of_images_contain_the_regularised_weights(digits):
    """Their loss is the whole loss, and the Gauss-Newton matrix has λ on the weights' diagonal."""
    extra, params, batch = extras_of(make_trainer("hessian_free", digits))
    assert extra.keys() == {"value", "grad", "value_fn", "outputs_fn", "out_loss_fn"}
    other = jax.tree.map(lambda p: p + 0.01, params)
    value = extra["out_loss_fn"](extra["outputs_fn"](other))
    np.testing.assert_allclose(value, digits.loss(other, batch), rtol=1e-6)
    np.testing.assert_allclose(value, objective(other, batch.images, batch.labels), rtol=1e-5)
    product = oracles.gauss_newton_product(extra["outputs_fn"], extra["out_loss_fn"], params)
    alone = oracles.gauss_newton_product(
        lambda p: extra["outputs_fn"](p)[0], lambda z: extra["out_loss_fn"]((z, [])), params
    )
    ones = jax.tree.map(jnp.ones_like, params)
    for x, y in zip(*(jax.tree.leaves(f(ones)) for f in (product, alone)), strict=True):
        np.testing.assert_allclose(x - y, 1e-3 if x.ndim > 1 else 0.0, atol=1e-6)


def test_without_l2_the_outputs_are_logits_alone():
    problem = problems.image_classification(
        data.load("digits"), "mlp_small", batch_size=4, model_options={"hidden": ()}
    )
    extra, params, batch = extras_of(make_trainer("hessian_free", problem))
    logits, weights = extra["outputs_fn"](params)
    assert (logits.shape, weights) == ((4, 10), [])
    np.testing.assert_allclose(
        extra["out_loss_fn"]((logits, weights)), problem.loss(params, batch), rtol=1e-6
    )


def test_layer_statistics_of_images_give_the_gradient(digits):
    """Of the data's labels, for a method that takes either: aᵀs/n and L2 are the gradient."""
    extra, params, batch = extras_of(make_trainer("natural_gradient", digits, learning_rate=0.1))
    assert "per_example_grads" not in extra
    grad = nnx_dict(jax.grad(digits.loss)(params, batch))
    for path, found in extra["kfac_stats"].items():
        kernel = nnx_dict(params)[path]["kernel"]
        actual = found.activations.T @ found.gradients / len(batch.labels) + 1e-3 * kernel
        np.testing.assert_allclose(actual, grad[path]["kernel"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            found.gradients.mean(axis=0), grad[path]["bias"], rtol=1e-4, atol=1e-6
        )


def nnx_dict(params):
    return {f"layers/{i}": {k: v[...] for k, v in layer.items()}
            for i, layer in params["layers"].items()}  # fmt: skip


def test_sampled_labels_are_those_of_seed_and_step(digits):
    trainer = make_trainer("kfac", digits, eval_every=4)
    draws = {
        (every, seed, step): jax.random.key_data(
            make_trainer("kfac", digits, eval_every=every)
            .program.draw(jnp.int32(step), jnp.uint32(seed), digits.data)[1]
        )
        for every, seed, step in ((4, 0, 0), (2, 0, 2), (4, 1, 0))
    }  # fmt: skip
    np.testing.assert_array_equal(draws[4, 0, 0][2:], draws[2, 0, 2])
    every = np.concatenate([draws[4, 0, 0], draws[4, 1, 0]])
    assert len(np.unique(every, axis=0)) == 8
    found = [extras_of(trainer, step=step)[0]["kfac_stats"]["layers/1"] for step in (0, 0, 1)]
    np.testing.assert_array_equal(found[0].gradients, found[1].gradients)
    assert (np.asarray(found[0].gradients) != found[2].gradients).any()
    assert make_trainer("hessian_free", digits).program.draw(
        jnp.int32(0), jnp.uint32(0), digits.data
    )[1] is None  # fmt: skip


def test_options_of_a_method_find_their_functions():
    """What `needs` does not list, because the default does without."""
    trainer = make_trainer("truncated_newton", curvature="ggn")
    trainer.check(())
    assert set(extras_of(make_trainer("lbfgs"))[0]) == {"value", "grad", "value_fn"}


@pytest.mark.parametrize("name", ["kfac", "hessian_free"])
def test_curvature_learns_digits(digits, name):
    rate = {"learning_rate": 0.03} if name == "kfac" else {}
    history = make_trainer(name, digits, eval_every=20, **rate).train(Runs({}, np.array([0])), 20)
    accuracy = history.metrics["test_accuracy"][0]
    assert accuracy[0] < 0.4
    assert accuracy[-1] > 0.8


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -5, 7])
def test_steps_must_be_a_multiple_of_eval_every(steps):
    trainer = make_trainer("sgd")
    with pytest.raises(ValueError, match=rf"steps = {steps} .*multiple of eval_every = 5"):
        trainer.train(make_runs([0.1], [0]), steps)
    assert trainer.compilations == 0


def test_methods_that_need_more_are_refused_before_any_work():
    method = registry.Method(
        name="needs_features",
        factory=optgrad.m_svag,
        scale_by=None,
        family="test",
        title="",
        reference="",
        equation="",
        needs=frozenset({"params", "features"}),
    )
    untouchable = object()  # any look at the problem would raise AttributeError
    with pytest.raises(ValueError, match=r"needs_features needs features, .*accepted.*value"):
        Trainer(untouchable, method, eval_every=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hessian_free", r"hessian_free needs out_loss_fn, outputs_fn, .*'parabola' does not have"),
        ("kfac", r"kfac needs kfac_stats, .*accepted: a Problem with layer_statistics"),
        ("levenberg_marquardt", r"levenberg_marquardt needs residual_fn, .*'parabola' does not"),
    ],
)
def test_what_a_problem_does_not_have_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(name, parabola())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectorize": "pmap"}, r"vectorize = 'pmap' .*did you mean 'map' or 'vmap'"),
        ({"eval_every": 0}, r"eval_every = 0 .*\[1, inf\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("sgd", **arguments)


# Against loops written by hand ----------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return problems.image_classification(
        data.load("digits").split_validation(0.1),
        "mlp_small",
        batch_size=32,
        l2=1e-3,
        model_options={"hidden": (16,)},
    )


def network(params, images):
    """The network again, without Flax."""
    first, second = (params["layers"][i] for i in range(2))
    signal = images.reshape(len(images), -1)
    signal = jnp.maximum(signal @ first["kernel"][...] + first["bias"][...], 0)
    return signal @ second["kernel"][...] + second["bias"][...]


def objective(params, images, labels):
    logits = network(params, images)
    cross_entropy = jnp.mean(
        jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels]
    )
    weights = sum(jnp.sum(params["layers"][i]["kernel"][...] ** 2) for i in range(2))
    return cross_entropy + 0.5 * 1e-3 * weights


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("m_svag", optgrad.m_svag(0.3)), ("adam", optax.adam(0.003))],
    ids=["m_svag", "adam"],
)
def test_a_loop_by_hand_gives_the_same_numbers(digits, name, optimizer):
    seed, steps, eval_every = 4, 20, 10
    rate = {"m_svag": 0.3, "adam": 0.003}[name]
    trainer = make_trainer(name, digits, eval_every=eval_every, learning_rate=rate)
    history = trainer.train(Runs({}, np.array([seed])), steps)

    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = digits.init(init_key)
    state = optimizer.init(params)
    value_and_grad = jax.jit(jax.value_and_grad(objective))
    update = jax.jit(optimizer.update)
    drawn = digits.batches(digits.data, batch_key, 0, steps)  # all at once, not by interval
    losses = []
    for step in range(steps):
        indices, keys = drawn
        images, labels = digits.batch(digits.data, (indices[step], keys[step]))
        value, gradient = value_and_grad(params, images, labels)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    np.testing.assert_allclose(
        history.metrics["train_loss"][0, 1:],
        np.array(losses).reshape(2, eval_every).mean(axis=1),
        rtol=2e-5,
    )
    pixels, labels = (np.asarray(array) for array in digits.data["test"])
    train = np.asarray(digits.data["train"][0], np.float64)
    logits = network(params, jnp.asarray((pixels - train.mean()) / train.std(), jnp.float32))
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    np.testing.assert_allclose(
        history.metrics["test_loss"][0, -1], -log_likelihood[rows, labels].mean(), rtol=1e-4
    )
    np.testing.assert_allclose(
        history.metrics["test_accuracy"][0, -1], np.mean(logits.argmax(axis=1) == labels), atol=1e-6
    )


def test_training_learns(digits):
    """And reports both splits, which are evaluated apart."""
    history = make_trainer("adam", digits, eval_every=100).train(make_runs([0.01], [0, 1]), 300)
    assert set(history.metrics) == {
        "train_loss",
        *(f"{split}_{m}" for split in ("validation", "test") for m in ("loss", "accuracy")),
    }
    for split in ("validation", "test"):
        accuracy = history.metrics[f"{split}_accuracy"]
        assert (accuracy[:, 0] < 0.4).all()
        assert (accuracy[:, -1] > 0.9).all()
    assert np.isnan(history.metrics["train_loss"][:, 0]).all()
    # The loss of the first batch has the L2 term, and is noisy.
    l2 = history.first_loss - history.metrics["validation_loss"][:, 0]
    assert ((l2 > -0.3) & (l2 < 0.5)).all()
    assert (np.diff(history.metrics["train_loss"][:, 1:]) < 0).all()
    assert history.seconds > 0

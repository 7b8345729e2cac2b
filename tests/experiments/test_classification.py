"""Label smoothing, mixed precision and dropout: what they do to the training loss."""

import functools

import jax
import jax.extend
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad import registry
from optgrad.core import oracles
from optgrad.experiments import data, models, problems
from optgrad.experiments.classification import Batch, DropoutBatch
from optgrad.experiments.engine import Runs, Trainer

pytestmark = pytest.mark.slow  # together a minute, in CI's slow stage

CLASSES = 4


@functools.cache
def dataset(side=3, channels=2, train=24, test=10):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (train + test, side, side, channels)).astype(np.uint8)
    labels = (np.arange(train + test) % CLASSES).astype(np.int32)
    parts = images[:train], labels[:train], images[train:], labels[train:]
    return data.Dataset("synthetic", *parts, classes=tuple("abcd"))


@functools.cache
def small(**options):
    return problems.image_classification(
        dataset(), "mlp", batch_size=6, model_options={"hidden": (5,)}, **options
    )


@functools.cache
def all_cnn(dropout=(0.0, 0.0), **options):
    return problems.image_classification(
        dataset(9, 1), "all_cnn_c", batch_size=6,
        model_options={"width": 2, "dropout": dropout}, **options,
    )  # fmt: skip


@functools.cache
def compiled(function):
    return jax.jit(function)


def batch_of(problem, number=0):
    drawn = 6 * number + jnp.arange(6), jax.random.key(number)
    return compiled(problem.batch)(problem.data, drawn)


def evaluation_of(problem, params):
    return jax.jit(problem.evaluate, static_argnums=2)(params, problem.data, "test", 0)


def parameters(problem):
    return compiled(problem.init)(jax.random.key(1))


# Label smoothing --------------------------------------------------------------------------------


def test_label_smoothing_mixes_the_labels_with_the_uniform_distribution():
    l2 = 0.3
    smoothed, plain = small(label_smoothing=0.2, l2=l2), small(l2=l2)
    params, batch = parameters(plain), batch_of(plain)
    logits = np.asarray(plain.outputs(params, batch)[0], np.float64)
    log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [
        -sum((0.8 * (c == y) + 0.2 / CLASSES) * row[c] for c in range(CLASSES))
        for row, y in zip(log_likelihood, np.asarray(batch.labels), strict=True)
    ]
    penalty = 0.5 * l2 * sum(np.sum(np.square(w)) for w in jax.tree.leaves(params) if w.ndim > 1)
    np.testing.assert_allclose(smoothed.loss(params, batch), np.mean(expected) + penalty, rtol=1e-5)
    first = smoothed.example_loss(params, jax.tree.map(lambda x: x[0], batch))
    np.testing.assert_allclose(first, expected[0] + penalty, rtol=1e-5)
    assert abs(float(smoothed.loss(params, batch) - plain.loss(params, batch))) > 1e-3


def test_evaluation_is_without_label_smoothing():
    params = parameters(small())
    assert evaluation_of(small(), params) == evaluation_of(small(label_smoothing=0.2), params)


def test_layer_statistics_are_of_the_smoothed_labels():
    problem = small(label_smoothing=0.2)
    params, batch = parameters(problem), batch_of(problem)
    found = jax.jit(lambda p, b: problem.layer_statistics(p, b, None))(params, batch)
    gradients = jax.jit(jax.vmap(jax.grad(problem.example_loss), in_axes=(None, 0)))(params, batch)
    for i in range(2):
        one = found[f"layers/{i}"]
        np.testing.assert_allclose(one.gradients, gradients["layers"][i]["bias"][...], atol=1e-6)


# Mixed precision --------------------------------------------------------------------------------


def operand_types(function, *arguments):
    """Types of the operands of all products and convolutions in the traced function."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in {"dot_general", "conv_general_dilated"}:
                found.extend(str(v.aval.dtype) for v in equation.invars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize("build", [small, all_cnn], ids=["mlp", "all_cnn_c"])
def test_products_of_both_passes_are_in_bfloat16(build):
    problem, plain = build(precision="bfloat16"), build()
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    batch = batch_of(problem)
    of_gradient = operand_types(jax.value_and_grad(problem.loss), shapes, batch)
    assert len(of_gradient) >= 10
    assert set(of_gradient) == {"bfloat16"}
    assert set(operand_types(jax.grad(plain.loss), shapes, batch)) == {"float32"}
    evaluation = functools.partial(problem.evaluate, split="test", index=0)
    assert set(operand_types(evaluation, shapes, problem.data)) == {"float32"}


def test_parameters_gradients_and_loss_stay_float32():
    problem = small(precision="bfloat16", l2=0.3)
    params, batch = parameters(problem), batch_of(problem)
    of_loss = jax.eval_shape(jax.value_and_grad(problem.loss), params, batch)
    statistics = jax.eval_shape(problem.layer_statistics, params, batch, jax.random.key(0))
    for leaf in jax.tree.leaves((params, of_loss, statistics)):
        assert leaf.dtype == jnp.float32


def test_bfloat16_is_near_float32_but_not_the_same():
    low, plain = small(precision="bfloat16"), small()
    params, batch = parameters(plain), batch_of(plain)
    (value, gradient), (exact_value, exact) = (
        jax.jit(jax.value_and_grad(p.loss))(params, batch) for p in (low, plain)
    )
    assert 0 < abs(float(value - exact_value)) < 0.03 * float(exact_value)
    a, b = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (gradient, exact))
    assert 0 < float(jnp.linalg.norm(a - b)) < 0.03 * float(jnp.linalg.norm(b))


def test_master_parameters_keep_steps_that_bfloat16_would_round_away():
    trainer = Trainer(small(precision="bfloat16"), registry.get_method("sgd"), eval_every=1)
    rate, seed = {"learning_rate": jnp.float32(1e-6)}, jnp.uint32(0)
    state = trainer.executable.init(rate, seed)
    before = np.asarray(jax.flatten_util.ravel_pytree(state.params)[0])
    after = np.asarray(
        jax.flatten_util.ravel_pytree(trainer.executable.advance(state, rate, seed)[0].params)[0]
    )
    assert after.dtype == np.float32
    assert (after != before).mean() > 0.5
    low, rounded = (x.astype(jnp.bfloat16) for x in (before, after))
    assert (low != rounded).mean() < 0.1


# Dropout ----------------------------------------------------------------------------------------


def test_dropout_keeps_units_at_its_rate_and_the_expectation():
    rate = 0.2
    keys = jax.random.split(jax.random.key(0), 200)
    signal = jnp.broadcast_to(1 + jnp.arange(50.0), (200, 50))
    dropped = np.asarray(models._dropped_out(signal, keys, rate, 0))
    zero = dropped == 0
    np.testing.assert_allclose(dropped[~zero], (np.asarray(signal) / (1 - rate))[~zero], rtol=1e-6)
    np.testing.assert_allclose(zero.mean(), rate, atol=4 * np.sqrt(rate * (1 - rate) / zero.size))
    np.testing.assert_allclose((dropped / np.asarray(signal)).mean(), 1, atol=0.05)
    assert len({row.tobytes() for row in zero}) == 200  # every example has a mask of its own
    other = np.asarray(models._dropped_out(signal, keys, rate, 3)) == 0
    assert (other != zero).any(axis=1).all()  # and every place


def test_dropout_is_on_the_input_and_after_both_strides(monkeypatch):
    seen = []

    def record(signal, keys, rate, place):
        seen.append((signal.shape[1:], rate, place))
        return signal

    monkeypatch.setattr(models, "_dropped_out", record)
    problem = all_cnn((0.2, 0.5))
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    jax.eval_shape(functools.partial(problem.loss), shapes, batch_of(problem))  # traced anew
    assert seen == [((9, 9, 1), 0.2, 0), ((5, 5, 2), 0.5, 3), ((3, 3, 4), 0.5, 6)]


def test_without_dropout_nothing_is_carried_and_nothing_is_drawn():
    assert isinstance(batch_of(all_cnn()), Batch)
    assert isinstance(batch_of(all_cnn((0.2, 0.5))), DropoutBatch)


def test_keys_are_new_for_every_step_and_example():
    keys = [jax.random.key_data(batch_of(all_cnn((0.2, 0.5)), number).keys) for number in (0, 1)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 12


@pytest.fixture(scope="module")
def dropped():
    """The problem with dropout, parameters, two batches, and the compiled loss."""
    problem = all_cnn((0.2, 0.5))
    return (
        problem,
        parameters(problem),
        [batch_of(problem, step) for step in (0, 1)],
        jax.jit(problem.loss),
        jax.jit(jax.vmap(problem.example_loss, in_axes=(None, 0))),
    )


@pytest.mark.slow
def test_the_loss_on_a_batch_is_one_function_of_the_parameters(dropped):
    problem, params, (batch, _), loss, each = dropped
    assert loss(params, batch) == loss(params, batch)
    # Single examples have the masks that they have in the batch.
    np.testing.assert_allclose(each(params, batch).mean(), loss(params, batch), rtol=1e-5)
    other = batch._replace(keys=jax.random.split(jax.random.key(9), 6))
    assert loss(params, other) != loss(params, batch)
    # The statistics of layers, too: of the last biases they sum up to the gradient.
    found = jax.jit(lambda p, b: problem.layer_statistics(p, b, None))(params, batch)
    gradient = jax.jit(jax.grad(problem.loss))(params, batch)["layers"][8]["bias"][...]
    np.testing.assert_allclose(
        found["layers/8"].gradients.sum(axis=(1, 2)).mean(axis=0), gradient, atol=1e-6
    )


@pytest.mark.slow
def test_masks_are_new_at_every_step(dropped):
    _, params, batches, loss, _ = dropped
    first, second = batches
    assert loss(params, first) != loss(params, first._replace(keys=second.keys))


@pytest.mark.slow
def test_evaluation_drops_nothing(dropped):
    problem, params = dropped[:2]
    plain = all_cnn()
    assert evaluation_of(problem, params) == evaluation_of(plain, params)


def test_examples_keep_their_keys_in_microbatches():
    batch = batch_of(all_cnn((0.2, 0.5)))

    def example_loss(params, example):  # convolutions take seconds to compile
        images = models._dropped_out(example.images[None], example.keys[None], 0.5, 0)
        return jnp.sum(params * images) ** 2

    params = jnp.float32(0.3)
    value, gradient, variance = jax.jit(
        lambda *a: oracles.value_grad_and_variance(example_loss, *a, microbatch_size=4)
    )(params, batch)
    each = jax.vmap(jax.value_and_grad(example_loss), in_axes=(None, 0))
    values, gradients = jax.jit(each)(params, batch)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, gradients.mean(), rtol=1e-5)
    np.testing.assert_allclose(variance, gradients.var(ddof=1) / 6, rtol=1e-4)


@pytest.mark.slow
def test_runs_with_dropout_are_reproducible():
    problem = all_cnn((0.2, 0.5))
    trainer = Trainer(problem, registry.get_method("sgd"), eval_every=2)
    runs = Runs({"learning_rate": np.array([0.05])}, np.array([3]))
    first, second = (trainer.train(runs, 4) for _ in range(2))
    for name in first.metrics:
        np.testing.assert_array_equal(first.metrics[name], second.metrics[name])
    assert np.isfinite(first.metrics["train_loss"][0, 1:]).all()


@pytest.mark.parametrize("rates", [(0.2,), 0.2, (0.2, 1.0), (-0.1, 0.5), ("a", "b"), (0.5, None)])
def test_bad_dropout_is_refused(rates):
    with pytest.raises(ValueError, match=r"dropout = .*accepted: two rates in \[0, 1\)"):
        problems.image_classification(
            dataset(9, 1), "all_cnn_c", batch_size=6, model_options={"dropout": rates}
        )

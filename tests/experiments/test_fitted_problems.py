"""Problems that are fitted to data other than images: logistic regression, and models of text."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optgrad.experiments import create_problem, text_problems

KEY = jax.random.key(0)
SMALL = {
    "sparse_logistic": {"dimension": 20, "examples": 400},
    "embedding": {"width": 8},
    "attention": {"width": 8, "context": 12, "layers": 2},
}


def first_batch(problem, step=0):
    drawn = jax.tree.map(lambda x: x[0], problem.batches(problem.data, KEY, step, 1))
    return problem.batch(problem.data, drawn)


def loss_on_test(problem, params):
    splits = range(problem.splits["test"])
    found = [problem.evaluate(params, problem.data, "test", i) for i in splits]
    return sum(f["loss"] for f in found) / sum(f["count"] for f in found)


@pytest.mark.parametrize("name", SMALL)
def test_loss_is_the_mean_over_examples_and_its_composition(name):
    problem = create_problem(name, batch_size=6, **SMALL[name])
    params = problem.init(KEY)
    batch = first_batch(problem)
    losses = jax.vmap(problem.example_loss, in_axes=(None, 0))(params, batch)
    np.testing.assert_allclose(problem.loss(params, batch), losses.mean(), rtol=1e-5)
    composed = problem.out_loss(problem.outputs(params, batch), batch)
    np.testing.assert_allclose(problem.loss(params, batch), composed, rtol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_batches_depend_on_key_and_step_alone(name):
    problem = create_problem(name, batch_size=6, **SMALL[name])
    together = problem.batches(problem.data, KEY, 3, 4)
    alone = problem.batches(problem.data, KEY, 5, 1)
    third, same = (problem.batch(problem.data, x) for x in (together[2], alone[0]))
    jax.tree.map(np.testing.assert_array_equal, third, same)
    assert not np.array_equal(first_batch(problem, 0)[0], first_batch(problem, 1)[0])


@pytest.mark.parametrize("name", ["embedding", "attention"])
def test_text_is_divided_and_covered(name):
    problem = create_problem(name, batch_size=6, **SMALL[name])
    text = text_problems._words() if name == "embedding" else text_problems._characters()
    train, windows = problem.data["train"], problem.data["test"]
    np.testing.assert_array_equal(train, text.symbols[: len(train)])  # the rest is held out
    assert len(train) == round(0.8 * len(text.symbols))
    assert 0 <= text.symbols.min() < text.symbols.max() == text.size - 1
    assert windows.shape[1] == SMALL[name].get("context", 4) + 1
    counted = sum(
        problem.evaluate(problem.init(KEY), problem.data, "test", i)["count"]
        for i in range(problem.splits["test"])
    )
    assert counted == len(windows)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["embedding", pytest.param("attention", marks=pytest.mark.slow)])
def test_training_beats_the_frequencies_of_symbols(name):
    problem = create_problem(name, batch_size=64)
    text = text_problems._words() if name == "embedding" else text_problems._characters()
    shares = np.bincount(text.symbols, minlength=text.size) / len(text.symbols)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)))
    params = problem.init(KEY)
    assert loss_on_test(problem, params) == pytest.approx(np.log(text.size), rel=0.15)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(params):
        def step(carry, drawn):
            params, state = carry
            grad = jax.grad(problem.loss)(params, problem.batch(problem.data, drawn))
            updates, state = optimizer.update(grad, state)
            return (optax.apply_updates(params, updates), state), None

        drawn = problem.batches(problem.data, KEY, 0, 300)
        return jax.lax.scan(step, (params, optimizer.init(params)), drawn)[0][0]

    assert loss_on_test(problem, run(params)) < entropy - 0.3


def test_attention_does_not_see_what_it_predicts():
    problem = create_problem("attention", **SMALL["attention"])
    params, window = problem.init(KEY), first_batch(problem)
    before = problem.outputs(params, window)
    changed = problem.outputs(params, window.at[0, 7].set((window[0, 7] + 1) % 5))
    np.testing.assert_array_equal(before[0, :7], changed[0, :7])
    assert np.abs(before[0, 7:] - changed[0, 7:]).max() > 1e-4


def test_embeddings_of_words_that_a_batch_lacks_have_no_gradient():
    problem = create_problem("embedding", batch_size=6, **SMALL["embedding"])
    batch = first_batch(problem)
    grad = jax.grad(problem.loss)(problem.init(KEY), batch)
    rows = np.abs(np.asarray(grad["words"]["embedding"][...])).max(axis=1)
    seen = np.unique(batch[:, :-1])
    assert set(np.flatnonzero(rows)) == set(seen.tolist())


def test_logistic_loss_is_the_textbooks():
    problem = create_problem("sparse_logistic", batch_size=16, l2=0.01, **SMALL["sparse_logistic"])
    x, y = (np.asarray(part, float) for part in first_batch(problem))
    generator = np.random.default_rng(0)
    w, b = generator.standard_normal(20), 0.3
    expected = np.mean(np.log1p(np.exp(-y * (x @ w + b)))) + 0.005 * w @ w
    params = {"w": jnp.asarray(w), "b": jnp.asarray(b)}
    np.testing.assert_allclose(problem.loss(params, (x, y)), expected, rtol=1e-5)
    assert set(np.unique(y)) == {-1.0, 1.0}


def test_features_are_as_rare_as_zipf_says():
    problem = create_problem("sparse_logistic", dimension=50, examples=20_000)
    shares = np.asarray(problem.data["train"][0]).mean(axis=0)
    expected = 0.5 / np.arange(1, 51)
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / 20_000))
    assert 0.3 < np.mean(np.asarray(problem.data["train"][1]) > 0) < 0.7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"width": 5, "heads": 2}, r"width = 5, heads = 2; accepted"),
        ("attention", {"layers": 0}, "layers = 0"),
        ("embedding", {"context": 0}, "context = 0"),
        ("sparse_logistic", {"l2": -1.0}, "l2 = -1.0"),
        ("sparse_logistic", {"examples": 10, "batch_size": 11}, "batch_size = 11 is outside"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_problem(name, **options)

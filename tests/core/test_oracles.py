"""Per-example gradients and variances against explicit loops over examples, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad.core import oracles

SIZE = 7


def loss_fn(params, example):
    """(Σⱼ tanh(x·wⱼ + bⱼ) − y)² of one example."""
    hidden = jnp.tanh(example["x"] @ params["layer"][0] + params["layer"][1])
    return (jnp.sum(hidden) * params["gain"] - example["y"]) ** 2


def explicit(params, batch):
    """Values and gradients, one example after the other, by the chain rule on paper."""
    w, b = (np.asarray(x, np.float64) for x in params["layer"])
    gain = np.float64(params["gain"])
    values, grads = [], []
    for x, y in zip(*(np.asarray(batch[k], np.float64) for k in "xy"), strict=True):
        hidden = np.tanh(x @ w + b)
        residual = hidden.sum() * gain - y
        outer = 2 * residual * gain * (1 - hidden**2)
        grads.append({"layer": (np.outer(x, outer), outer), "gain": 2 * residual * hidden.sum()})
        values.append(residual**2)
    return np.array(values), jax.tree.map(lambda *g: np.stack(g), *grads)


def explicit_variance(grads):
    """Var of the minibatch mean, two passes."""

    def of(g):
        total = sum((gk - g.mean(0)) ** 2 for gk in g)
        return total / (len(g) - 1) / len(g)

    return jax.tree.map(of, grads)


def problem(dtype=jnp.float64, size=SIZE):
    rng = np.random.default_rng(0)
    layer = (rng.normal(size=(3, 2)), rng.normal(size=2))
    params = {"layer": layer, "gain": np.array(0.7)}
    batch = {"x": rng.normal(size=(size, 3)), "y": rng.normal(size=size), "nothing": None}
    return tuple(jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (params, batch))


def assert_trees_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, **tolerance)


# --- values ----------------------------------------------------------------------------------


@functools.cache
def compiled(loss, microbatch):
    """(params, batch) -> (per-example gradients, (value, gradient, variance))."""

    @jax.jit
    def both(params, batch):
        options = {"microbatch_size": microbatch}
        grads = optgrad.per_example_grads(loss, params, batch, **options)
        return grads, optgrad.value_grad_and_variance(loss, params, batch, **options)

    return both


def all_of(loss, params, batch, microbatch):
    return compiled(loss, microbatch)(params, batch)


def check_against_loops(dtype, microbatch, tolerance):
    params, batch = problem(dtype)
    values, grads = explicit(params, batch)
    found, (value, grad, variance) = all_of(loss_fn, params, batch, microbatch)
    assert_trees_close(found, grads, **tolerance)
    np.testing.assert_allclose(value, values.mean(), **tolerance)
    assert_trees_close(grad, jax.tree.map(lambda g: g.mean(0), grads), **tolerance)
    assert_trees_close(variance, explicit_variance(grads), **tolerance)
    alone = optgrad.gradient_variance(jax.tree.map(lambda g: jnp.asarray(g, dtype), grads))
    assert_trees_close(alone, explicit_variance(grads), **tolerance)


@pytest.mark.parametrize("microbatch", [None, 1, 2, 3, 6, 7, 100])
def test_against_loops(x64, microbatch):
    check_against_loops(jnp.float64, microbatch, {"rtol": 1e-12, "atol": 1e-14})


@pytest.mark.parametrize("microbatch", [None, 1, 3])
def test_against_loops_in_32_bits(microbatch):
    check_against_loops(jnp.float32, microbatch, {"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("size", [2, 3, 9, 64])
@pytest.mark.parametrize("microbatch", [1, 8, 63])
def test_any_batch_and_microbatch(x64, size, microbatch):
    """One chunk, two, many; remainders of one example and of all but one."""
    batch = np.random.default_rng(size).normal(size=(size, 2)) * [1.0, 1e3] + [1e4, 0.0]
    _, (value, grad, variance) = all_of(jnp.dot, jnp.zeros(2), jnp.asarray(batch), microbatch)
    assert value == 0
    np.testing.assert_allclose(grad, batch.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, batch.var(0, ddof=1) / size, rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("microbatch", [None, 1, 7])
def test_no_cancellation_of_a_large_mean(microbatch, offset):
    """Gradients of spread 1 around 1e5 in float32: E[g²] − E[g]² has no correct digit left."""
    batch = (np.random.default_rng(0).normal(size=(100, 4)) + offset).astype(np.float32)
    exact = batch.astype(np.float64).var(0, ddof=1) / 100
    _, (*_, variance) = all_of(jnp.dot, jnp.zeros(4), jnp.asarray(batch), microbatch)
    np.testing.assert_allclose(variance, exact, rtol=3e-5 + offset * 6e-8)
    np.testing.assert_allclose(
        optgrad.gradient_variance(jnp.asarray(batch)), exact, rtol=3e-5 + offset * 6e-8
    )
    if offset == 1e5:
        naive = (np.mean(batch**2, 0) - np.mean(batch, 0) ** 2) / 99
        assert np.max(np.abs(naive / exact - 1)) > 1


def test_equal_gradients_have_no_variance():
    batch = jnp.full((9, 2), 0.1)
    for microbatch in (None, 2):
        _, (_, grad, variance) = all_of(jnp.dot, jnp.zeros(2), batch, microbatch)
        np.testing.assert_allclose(grad, 0.1, rtol=1e-6)
        assert np.all((variance >= 0) & (variance < 1e-15))


def test_integers_keys_and_empty_leaves_in_the_batch():
    """Labels, random keys and leaves without elements are batches like others."""
    batch = {
        "label": jnp.arange(6),
        "key": jax.random.split(jax.random.key(0), 6),
        "empty": jnp.zeros((6, 0)),
    }

    def loss(w, example):
        noise = jax.random.normal(example["key"], (2,))
        return w @ (noise + example["label"]) + jnp.sum(example["empty"])

    keys = jax.random.split(jax.random.key(0), 6)
    grads = np.stack([jax.random.normal(k, (2,)) + i for i, k in enumerate(keys)])
    for microbatch in (None, 4, 1):
        found, (value, grad, variance) = all_of(loss, jnp.ones(2), batch, microbatch)
        np.testing.assert_allclose(found, grads, rtol=1e-6)
        np.testing.assert_allclose(value, grads.sum(1).mean(), rtol=1e-5)
        np.testing.assert_allclose(grad, grads.mean(0), rtol=1e-5)
        np.testing.assert_allclose(variance, grads.var(0, ddof=1) / 6, rtol=1e-5)


def test_batch_of_a_whole_data_set():
    """B(B − 1) = 3.6e9 is no int32."""
    batch = np.random.default_rng(0).normal(size=(60_000, 2)).astype(np.float32)
    exact = batch.astype(np.float64).var(0, ddof=1) / len(batch)
    np.testing.assert_allclose(optgrad.gradient_variance(jnp.asarray(batch)), exact, rtol=1e-4)
    *_, variance = optgrad.value_grad_and_variance(
        jnp.dot, jnp.zeros(2), jnp.asarray(batch), microbatch_size=10_000
    )
    np.testing.assert_allclose(variance, exact, rtol=1e-4)


# --- types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [None, 1, 3])
def test_bfloat16_parameters(microbatch):
    """Gradients like the parameters; means and variances of them accumulated in float32."""
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(200, 4)) + np.array([0, 1, 30, -300]), jnp.bfloat16)
    exact = np.asarray(batch, np.float64)  # the gradients of a linear loss
    params = jnp.zeros(4, jnp.bfloat16)
    grads, (_, grad, variance) = all_of(jnp.dot, params, batch, microbatch)
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(grads, np.float64), exact)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad, jnp.asarray(exact.mean(0), jnp.bfloat16))
    for found in (variance, optgrad.gradient_variance(grads)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact.var(0, ddof=1) / 200, rtol=1e-4)


@pytest.mark.parametrize("microbatch", [None, 64, 1])
def test_low_precision_loss_is_averaged_in_32_bits(microbatch):
    """A running mean in bfloat16 would stall: its steps fall below half a digit."""
    xs = np.random.default_rng(0).uniform(1, 3, size=512).astype(np.float32)
    value, *_ = optgrad.value_grad_and_variance(
        lambda w, x: (x + 0 * w).astype(jnp.bfloat16),
        jnp.float32(0),
        jnp.asarray(xs),
        microbatch_size=microbatch,
    )
    exact = np.asarray(jnp.asarray(xs, jnp.bfloat16), np.float64).mean()
    np.testing.assert_allclose(np.float64(value), exact, rtol=2.0**-8)


def test_mixed_types(x64):
    """Every leaf in its own type, the variance at least in float32."""
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(2)}
    batch = jnp.arange(8.0).reshape(4, 2)

    def loss(p, x):
        return sum(jnp.sum(leaf.astype(jnp.float64) * x) for leaf in p.values())

    for microbatch in (None, 3):
        _, (_, grad, variance) = all_of(loss, params, batch, microbatch)
        assert [x.dtype for x in grad.values()] == [jnp.bfloat16, jnp.float32, jnp.float64]
        assert [x.dtype for x in variance.values()] == [jnp.float32, jnp.float32, jnp.float64]
        for leaf in variance.values():
            np.testing.assert_allclose(leaf, np.var(batch, 0, ddof=1) / 4, rtol=1e-6)


# --- refusals --------------------------------------------------------------------------------


BOTH = [oracles.per_example_grads, oracles.value_grad_and_variance]


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("size", "kind"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError)],
)
def test_bad_microbatch_size(function, size, kind):
    params, batch = problem(jnp.float32)
    with pytest.raises(kind, match=f"microbatch_size = {size!r}"):
        function(loss_fn, params, batch, microbatch_size=size)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"x": np.zeros((0, 3)), "y": np.zeros(0)},
        {"x": np.zeros((4, 3)), "y": np.zeros(5)},
        {"x": np.zeros((4, 3)), "y": np.zeros(())},
    ],
    ids=["no leaves", "no examples", "two sizes", "a scalar"],
)
def test_bad_batch(function, batch):
    params, _ = problem(jnp.float32)
    with pytest.raises(ValueError, match=r"batch has leaves of shapes .*one common leading batch"):
        function(loss_fn, params, batch)


def test_one_example_has_no_variance():
    params, batch = problem(jnp.float32, size=1)
    with pytest.raises(ValueError, match=r"batch holds B = 1 .*B ≥ 2"):
        optgrad.value_grad_and_variance(loss_fn, params, batch)
    grads = optgrad.per_example_grads(loss_fn, params, batch)
    assert grads["gain"].shape == (1,)
    with pytest.raises(ValueError, match=r"per_example_grads holds B = 1 .*B ≥ 2"):
        optgrad.gradient_variance(grads)


def test_batch_size():
    assert oracles.batch_size({"a": np.zeros((3, 2)), "b": (np.zeros(3), None)}) == 3
    with pytest.raises(ValueError, match=r"examples has leaves of shapes \[\(2,\), \(3,\)\]"):
        oracles.batch_size([np.zeros(2), np.zeros(3)], "examples")


# --- under transformations -------------------------------------------------------------------


def test_under_jit_vmap_and_scan(x64):
    """A batch per member, a batch per step: the same numbers as one call each."""
    params, batch = problem()
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1] * 0.5, x + 1]), batch)
    one = functools.partial(optgrad.value_grad_and_variance, loss_fn, microbatch_size=3)
    single = jax.jit(one)
    alone = [single(params, jax.tree.map(lambda x: x[i], batches)) for i in range(3)]  # noqa: B023
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    together = jax.jit(jax.vmap(one, in_axes=(None, 0)))(params, batches)
    _, in_turn = jax.jit(
        lambda batches: jax.lax.scan(lambda c, b: (c, one(params, b)), 0, batches)
    )(batches)
    many = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    ensemble = jax.jit(jax.vmap(one, in_axes=(0, None)))(many, batch)
    for found in (together, in_turn):
        assert_trees_close(found, expected, rtol=1e-10)
    assert_trees_close(jax.tree.map(lambda x: x[1], ensemble), alone[0], rtol=1e-10)


def test_derivative_of_the_variance(x64):
    """Through the loop over micro-batches, against central differences."""
    params, batch = problem()

    def noise(scale, microbatch):
        moved = jax.tree.map(lambda p: p * scale, params)
        *_, variance = optgrad.value_grad_and_variance(
            loss_fn, moved, batch, microbatch_size=microbatch
        )
        return sum(jnp.sum(s) for s in jax.tree.leaves(variance))

    step = 1e-5
    for microbatch in (None, 2):
        noise_of = jax.jit(functools.partial(noise, microbatch=microbatch))
        expected = (noise_of(1 + step) - noise_of(1 - step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(noise_of))(1.0), expected, rtol=1e-6)


# --- memory ----------------------------------------------------------------------------------

WIDTH, BATCH = 64, 64  # D = WIDTH² parameters; examples are small beside a gradient
GRADIENT_BYTES = 4 * WIDTH * WIDTH


@functools.cache
def gradients_held(microbatch):
    """Temporary memory of the compiled function, in gradients of one example."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(w @ x) ** 2)

    def run(w, x):
        return optgrad.value_grad_and_variance(loss, w, x, microbatch_size=microbatch)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((WIDTH, WIDTH), (BATCH, WIDTH))]
    memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes / GRADIENT_BYTES


@pytest.mark.parametrize("microbatch", [1, 2, 4, 8, 16, 32])
def test_memory_is_that_of_a_microbatch(microbatch):
    """Mean and squares of one and of all so far, and the batch once more, beside its gradients."""
    assert gradients_held(microbatch) <= microbatch + 6


def test_memory_grows_with_the_microbatch():
    held = [gradients_held(m) for m in (1, 4, 16, None)]
    assert held == sorted(held)
    assert held[0] < BATCH / 10
    assert held[-1] >= BATCH


@pytest.mark.parametrize("microbatch", [5, 7, 24])
def test_memory_with_a_remainder(microbatch):
    """XLA may hold the remainder's gradients beside those of a micro-batch, never those of all."""
    assert gradients_held(microbatch) <= microbatch + BATCH % microbatch + 6

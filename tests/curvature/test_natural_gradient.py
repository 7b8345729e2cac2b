"""Natural gradient against dense formulas: dual, primal, and from the statistics of layers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.core.layer_statistics import LayerStatistics, layer_statistics
from optgrad.curvature import example_gradients

SIZE = 6


def tree(x):
    return {"a": x[..., 0], "b": x[..., 1:4], "c": x[..., 4:].reshape(*x.shape[:-1], 2, 1)}


def flat(found):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(found)])


def dense(grads, u, lam):
    fisher = grads.T @ grads / len(grads)
    return np.linalg.solve(fisher + lam * np.eye(SIZE), u)


@functools.cache
def compiled(solver, learning_rate=None):
    """A first step, with the damping as an argument."""

    @jax.jit
    def step(damping, updates, grads):
        if learning_rate is None:
            transformation = optgrad.scale_by_natural_gradient(damping, solver=solver)
        else:
            transformation = optgrad.natural_gradient(learning_rate, damping, solver=solver)
        return transformation.update(updates, transformation.init(updates), per_example_grads=grads)

    return step


def direction(damping, grads, u, dtype=None, **options):
    grads, u = (jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(x)) for x in (grads, u))
    found, state = compiled(options.pop("solver", "dual"), **options)(damping, u, grads)
    return flat(found), state


def samples(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=SIZE) + rng.normal(size=(n, SIZE)) * np.logspace(-1, 0.5, SIZE)


UPDATES = {
    "mean": lambda grads: grads.mean(0),
    "clipped": lambda grads: 0.01 * grads.mean(0),
    "with_decay": lambda grads: grads.mean(0) + 0.1 * np.arange(SIZE),
    "another": lambda _: np.linspace(-1, 1, SIZE),
    "zero": lambda _: np.zeros(SIZE),
}


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("updates", list(UPDATES))
@pytest.mark.parametrize("n", [1, 4, 6, 17])
def test_equals_the_dense_formula(x64, n, updates, solver):
    grads = samples(n)
    u = UPDATES[updates](grads)
    for lam in (1e-3, 0.1, 10.0):
        found, state = direction(lam, grads, u, solver=solver)
        np.testing.assert_allclose(found, dense(grads, u, lam), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(state.trace, np.mean(np.sum(grads**2, axis=1)))
        np.testing.assert_allclose(state.damping, lam)
        assert not state.rejected


def test_primal_averages_with_bias_correction(x64):
    """And forgets at the given rate; a schedule of the damping counts steps."""
    transformation = optgrad.scale_by_natural_gradient(
        lambda count: 0.1 * (1 + count), solver="primal", decay=0.7
    )
    state = transformation.init(tree(jnp.zeros(SIZE)))
    average, weight = np.zeros((SIZE, SIZE)), 0.0
    for t in range(12):
        grads = samples(3, seed=t)
        average = 0.7 * average + 0.3 * grads.T @ grads / 3
        weight = 0.7 * weight + 0.3
        fisher = average / weight + 0.1 * (1 + t) * np.eye(SIZE)
        found, state = transformation.update(
            tree(jnp.asarray(grads.mean(0))), state, per_example_grads=tree(jnp.asarray(grads))
        )
        np.testing.assert_allclose(flat(found), np.linalg.solve(fisher, grads.mean(0)), rtol=1e-10)


def test_optimizer_is_the_scaled_direction():
    grads = samples(4)
    found, _ = direction(0.1, grads, grads.mean(0))
    step, _ = direction(0.1, grads, grads.mean(0), learning_rate=0.25)
    np.testing.assert_allclose(step, -0.25 * found, rtol=1e-6)


@pytest.mark.parametrize("lam", [1e-6, 1e-4])
def test_push_through_keeps_digits(lam):
    """In float32 and for small λ; a multiple of the mean, rounded otherwise, counts as one."""
    grads = np.float32(samples(4))  # rank 4 of 6
    for factor in (1.0, 1e-3):
        u = np.float32(factor) * np.float32(grads[::-1].mean(0))
        found, _ = direction(lam, grads, u, jnp.float32)
        expected = dense(np.float64(grads), factor * np.float64(grads).mean(0), lam)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.max(np.abs(expected)))
    woodbury = (
        u
        - grads.T
        @ np.linalg.solve(
            grads @ grads.T / 4 + np.float32(lam) * np.eye(4, dtype=np.float32), grads @ u / 4
        )
    ) / np.float32(lam)
    lost = np.max(np.abs(woodbury - expected)) / np.max(np.abs(expected))
    assert lost > (1e-2 if lam == 1e-6 else 1e-4)  # what the other form does to them


def test_singular_fisher_matrices():
    """One example many times, and no gradient at all, with λ at the rounding of K or below."""
    grads = np.repeat(samples(1), 40, axis=0)
    for solver in ("dual", "primal"):
        for lam in (1e-3, 1e-12):
            found, state = direction(lam, grads, grads.mean(0), jnp.float32, solver=solver)
            assert not state.rejected
            assert np.all(np.isfinite(found))
            used = float(state.damping)
            assert used >= lam
            if solver == "dual" or lam == 1e-3:  # otherwise nothing is left of float32's digits
                np.testing.assert_allclose(found, dense(grads, grads[0], used), rtol=2e-2)
            assert np.linalg.norm(found) <= 1.01 * np.linalg.norm(grads[0]) / used
        found, state = direction(1e-12, 0 * grads, np.zeros(SIZE), solver=solver)
        assert not np.any(found)
        assert not state.rejected


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("where", ["grads", "updates"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_bad_numbers_are_no_steps(solver, where, number):
    transformation = optgrad.scale_by_natural_gradient(0.1, solver=solver)
    grads, u = samples(4), samples(4).mean(0)
    _, before = direction(0.1, grads, u, solver=solver)
    (grads if where == "grads" else u)[..., 2] = number
    updates, after = transformation.update(
        tree(jnp.asarray(u)), before, per_example_grads=tree(jnp.asarray(grads))
    )
    assert not np.any(flat(updates))
    assert (after.rejected, after.count) == (1, 2)
    kept = before._replace(rejected=after.rejected, count=after.count, cost=after.cost)
    jax.tree.map(np.testing.assert_array_equal, after, kept)


def test_huge_and_tiny_gradients():
    grads = samples(4)
    mean = grads.mean(0)
    for solver in ("dual", "primal"):
        for tiny in (1e-30, 1e-20):
            found, _ = direction(0.1, tiny * grads, tiny * mean, jnp.float32, solver=solver)
            np.testing.assert_allclose(found, 10 * tiny * mean, rtol=1e-5)
        found, state = direction(0.1, 1e15 * grads, 1e15 * mean, jnp.float32, solver=solver)
        assert np.all(np.isfinite(found))
        assert not state.rejected


def test_low_precision():
    """The mean in bfloat16 is the mean; the direction has the parameters' type."""
    grads = tree(jnp.asarray(samples(8), jnp.bfloat16))
    u = jax.tree.map(lambda x: x.astype(jnp.float32).mean(0).astype(jnp.bfloat16), grads)
    transformation = optgrad.scale_by_natural_gradient(0.01)
    found, _ = transformation.update(u, transformation.init(u), per_example_grads=grads)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    wide = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], grads)) for i in range(8)])
    expected = dense(wide, wide.mean(0), 0.01)
    np.testing.assert_allclose(flat(found), expected, atol=0.03 * np.max(np.abs(expected)))


# --- from what layers saw ------------------------------------------------------------------------


def network(positions=(), widths=(3, 4, 2), bias=True):
    """Parameters, a loss of one example, and the statistics of a batch of six.

    Layers act on the last axis of inputs of shape (*positions, width).
    """
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(a, b)))}
        | ({"bias": jnp.asarray(rng.normal(size=b))} if bias else {})
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }
    inputs = jnp.asarray(rng.normal(size=(6, *positions, widths[0])))

    def forward(params, taps, x):
        seen = {}
        for name in sorted(params):
            seen[name] = x
            x = x @ params[name]["kernel"] + params[name].get("bias", 0.0) + taps[name]
            x = jnp.tanh(x)
        return 0.5 * jnp.sum((x - 1.0) ** 2), seen

    zeros = {f"layer_{i}": jnp.zeros((*positions, b)) for i, b in enumerate(widths[1:])}

    def stats(x):
        grads, seen = jax.grad(forward, argnums=1, has_aux=True)(params, zeros, x)
        return {name: LayerStatistics(seen[name], grads[name]) for name in grads}

    return params, lambda p, x: forward(p, zeros, x)[0], inputs, jax.vmap(stats)(inputs)


SHAPES = {
    "dense": {},
    "no_bias": {"bias": False},
    "few_positions": {"positions": (2,), "widths": (9, 8, 7)},  # pairs are fewer than weights
    "many_positions": {"positions": (3, 4)},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_layers_equal_stored_gradients(x64, shape):
    params, loss, inputs, stats = network(**SHAPES[shape])
    grads = optgrad.per_example_grads(loss, params, inputs)
    stored = example_gradients.examples(params, grads, None)
    layered = example_gradients.examples(params, None, stats)
    assert stored.size == layered.size == 6
    weights = jnp.linspace(-1, 1, 6)
    for one, other in (
        (stored.gram(), layered.gram()),
        (stored.project(params), layered.project(params)),
        (stored.combine(weights), layered.combine(weights)),
        (stored.stored(), layered.stored()),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), one, other
        )


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_steps_of_layers(x64, solver):
    """Both arguments give the same steps, by keys joined or not."""
    params, loss, inputs, stats = network()
    grads = optgrad.per_example_grads(loss, params, inputs)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    transformation = optgrad.scale_by_natural_gradient(0.01, solver=solver)
    state = transformation.init(params)
    expected, after = transformation.update(mean, state, per_example_grads=grads)
    for found in (stats, {(name,): tuple(x) for name, x in stats.items()}):
        actual, other = transformation.update(mean, state, kfac_stats=found)
        np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-9)
        assert other.cost < after.cost
    both, _ = transformation.update(mean, state, per_example_grads=grads, kfac_stats={})
    np.testing.assert_array_equal(flat(both), flat(expected))


def test_convolutions(x64):
    """Patches, from `layer_statistics` of a Flax model."""
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(2, (2, 2)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(3)])
    x = jax.random.normal(jax.random.PRNGKey(0), (5, 4, 4, 2))
    labels = jnp.array([0, 2, 1, 1, 0])
    params = model.init(jax.random.PRNGKey(1), x)["params"]

    def loss(params, example):
        logits = model.apply({"params": params}, example[0][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1])

    grads = optgrad.per_example_grads(loss, params, (x, labels))
    stats = layer_statistics(model, params, x, labels, labels="data")
    stored, layered = (
        example_gradients.examples(params, *pair) for pair in ((grads, None), (None, stats))
    )
    np.testing.assert_allclose(layered.gram(), stored.gram(), rtol=1e-5, atol=1e-6)
    weights = jnp.arange(5.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        layered.combine(weights),
        stored.combine(weights),
    )


def test_the_stall_of_small_damping(x64):
    """The empirical Fisher matrix overshoots where residuals vanish: the step grows like 1/g."""
    a = jnp.array([[1.0], [1.0]])
    loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)  # noqa: E731
    steps = {}
    for lam in (1e-6, 10.0):
        optimizer = optgrad.natural_gradient(1.0, lam)
        w = jnp.array([1.01])
        grads = optgrad.per_example_grads(loss, w, a)
        updates, _ = optimizer.update(grads.mean(0), optimizer.init(w), per_example_grads=grads)
        steps[lam] = float(updates[0])
    np.testing.assert_allclose(steps[1e-6], -0.01 / (0.01**2 + 1e-6))  # 99 where −0.01 is right
    np.testing.assert_allclose(steps[10.0], -0.01 / (0.01**2 + 10.0))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "per_example_grads or kfac_stats, got none"),
        ({"per_example_grads": {"a": jnp.zeros(3)}}, "per_example_grads has leaves of shapes"),
        ({"kfac_stats": {}}, "0 of the 3 leaves.*Pass per_example_grads instead"),
    ],
)
def test_wrong_extras(extra, message):
    transformation = optgrad.natural_gradient(1.0)
    updates = tree(jnp.zeros(SIZE))
    with pytest.raises(ValueError, match=message):
        transformation.update(updates, transformation.init(updates), **extra)


def test_statistics_that_do_not_fit():
    params, _, _, stats = network()
    wrong = stats | {"layer_0": stats["layer_1"]}
    with pytest.raises(ValueError, match=r"kfac_stats\['layer_0'\].*kernel of shape \(3, 4\)"):
        example_gradients.examples(params, None, wrong)
    with pytest.raises(ValueError, match=r"the layers \['elsewhere'\], which are 0"):
        example_gradients.examples(params, None, {"elsewhere": stats["layer_0"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping = 0.0"),
        ({"solver": "dula"}, "did you mean 'dual'"),
        ({"decay": 1.0}, "decay = 1.0"),
        ({"max_size": 0}, "max_size = 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.natural_gradient(**{"learning_rate": 1.0, **arguments})


def test_too_many_parameters_for_primal():
    with pytest.raises(ValueError, match=r"params has 6 entries.*max_size = 5"):
        optgrad.natural_gradient(1.0, solver="primal", max_size=5).init(jnp.zeros(6))


def test_diagnostics():
    grads = samples(4)
    _, state = direction(0.1, grads, grads.mean(0))
    found = {key: float(x) for key, x in optgrad.diagnostics(state).items()}
    np.testing.assert_allclose(found["fisher_trace"], np.mean(np.sum(grads**2, axis=1)), rtol=1e-6)
    assert (found["gradient_equivalents"], found["rejected_steps"]) == (3.0, 0.0)
    np.testing.assert_allclose(found["damping"], 0.1, rtol=1e-6)

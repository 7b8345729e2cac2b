"""The diagonal of the Gauss–Newton matrix: unbiased, averaged, and divided by."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.curvature import output_curvature

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(5, 3))
LABELS = np.array([0, 2, 1, 1, 0])
PARAMS = {"w": RNG.normal(size=(3, 3)), "b": RNG.normal(size=3)}


def model(params, x):
    return jnp.tanh(x @ params["w"]) * 2.0 + params["b"]


def cross_entropy(z, label):
    return optax.softmax_cross_entropy_with_integer_labels(z, label)


def half_squares(z, label):
    return 0.5 * jnp.sum((z - label) ** 2)


LOSSES = {
    "softmax": ("softmax", cross_entropy),
    "squared": ("squared", half_squares),
    "general_softmax": ("general", cross_entropy),
    "general_squared": ("general", half_squares),
}


def extras(loss):
    return {
        "outputs_fn": lambda p: model(p, INPUTS),
        "out_loss_fn": lambda z: jnp.mean(jax.vmap(loss)(z, LABELS)),
    }


@pytest.mark.parametrize("name", list(LOSSES))
def test_unbiased(x64, name):
    """The mean of 4000 first samples is the exact diagonal, within 4.5 standard errors."""
    kind, loss = LOSSES[name]
    params = jax.tree.map(jnp.asarray, PARAMS)
    transformation = optgrad.scale_by_diagonal_gauss_newton(loss=kind)
    start = transformation.init(params)

    @jax.jit
    @jax.vmap
    def sample(key):
        state = start._replace(key=key)
        return transformation.update(params, state, params, **extras(loss))[1].curvature

    found = sample(jax.random.split(jax.random.PRNGKey(3), 4000))
    exact = optgrad.gauss_newton_diagonal(model, loss, params, INPUTS, LABELS)

    def close(x, h):
        errors = np.std(x, axis=0) / np.sqrt(len(x))
        assert np.all(errors > 0)
        assert np.all(np.abs(np.mean(x, axis=0) - h) < 4.5 * errors)
        assert np.all(errors < 0.05 * h)  # a bias of a quarter would be seen

    jax.tree.map(close, found, exact)


def second_moment(of_signs, shape):
    """The mean of rrᵀ over all signs, exactly."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=int(np.prod(shape)))))
    rows = np.stack([np.ravel(of_signs(jnp.asarray(s.reshape(shape)))) for s in signs])
    return rows.T @ rows / len(rows)


def block_diagonal(seed, rows=2, size=3, negative=False):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(rows, size, size))
    blocks = roots @ np.swapaxes(roots, 1, 2)
    if negative:
        blocks -= 2.0 * np.eye(size)
    matrix = np.zeros((rows, size, rows, size))
    matrix[np.arange(rows), :, np.arange(rows), :] = blocks
    return matrix.reshape(rows * size, rows * size)


@pytest.mark.parametrize("negative", [False, True])
def test_factor_of_blocks(x64, negative):
    """E[rrᵀ] is the matrix itself; without its negative eigenvalues if there are any."""
    matrix = block_diagonal(0, negative=negative)

    def root(signs):
        def product(v):
            return (matrix @ v.ravel()).reshape(2, 3)

        return output_curvature._general(product, signs, jax.random.PRNGKey(5))

    values, vectors = np.linalg.eigh(matrix)
    assert (values[0] < -0.1) == negative
    expected = (vectors * np.maximum(values, 0.0)) @ vectors.T
    np.testing.assert_allclose(second_moment(root, (2, 3)), expected, atol=1e-10)


def test_factor_of_softmax(x64):
    logits = jnp.array([[0.3, -1.0, 2.0], [0.0, 0.1, 0.2]])
    found = second_moment(lambda s: output_curvature._softmax(logits, s), (2, 3))
    loss = lambda z: -jnp.mean(jax.nn.log_softmax(z.reshape(2, 3))[:, 0])  # noqa: E731
    np.testing.assert_allclose(found, jax.hessian(loss)(logits.ravel()), atol=1e-12)


def test_losses_that_couple_examples(x64):
    """The blocks' diagonal is estimated without bias, over the probes' signs."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(4, 4))
    matrix = matrix @ matrix.T + 8.0 * np.eye(4)  # no estimate of a variance is negative

    def one(key):
        return output_curvature._general(lambda v: matrix @ v, jnp.ones(4), key) ** 2

    found = jax.vmap(one)(jax.random.split(jax.random.PRNGKey(0), 3000))
    errors = np.std(found, axis=0) / np.sqrt(3000)
    assert np.all(np.abs(np.mean(found, axis=0) - np.diag(matrix)) < 4.5 * errors)


def test_follows_the_formula(x64):
    """A linear model, of which J is the matrix of inputs; the same random signs."""
    transformation = optgrad.scale_by_diagonal_gauss_newton(
        lambda count: 0.1 + 0.01 * count, 0.9, loss="squared", seed=4
    )
    params = jnp.asarray(RNG.normal(size=3))
    state = transformation.init(params)
    key, h, weight = jax.random.PRNGKey(4), np.zeros(3), 0.0
    for t in range(30):
        g = np.random.default_rng(t).normal(size=3)
        found, state = transformation.update(
            jnp.asarray(g), state, params, outputs_fn=lambda w: INPUTS @ w
        )
        key, used = jax.random.split(key)
        u = np.asarray(jax.random.rademacher(jax.random.split(used, 3)[1], (5,), jnp.float64))
        h = 0.9 * h + 0.1 * (INPUTS.T @ u) ** 2 / 5
        weight = 0.9 * weight + 0.1
        np.testing.assert_allclose(found, g / (h / weight + 0.1 + 0.01 * t), rtol=1e-10)
    assert (state.count, state.cost) == (30, 60)


def test_general_equals_squared(x64):
    """For outputs along one axis, whose blocks are numbers: the same samples."""
    params, g = jnp.asarray(RNG.normal(size=3)), jnp.ones(3)
    functions = {
        "outputs_fn": lambda w: jnp.tanh(INPUTS @ w),
        "out_loss_fn": lambda z: 0.5 * jnp.mean((z - LABELS) ** 2),
    }

    def step(kind):
        transformation = optgrad.scale_by_diagonal_gauss_newton(loss=kind)
        return transformation.update(g, transformation.init(params), params, **functions)[0]

    np.testing.assert_allclose(step("general"), step("squared"), rtol=1e-10)


def test_outputs_that_contain_the_parameters(x64):
    """L2 as a second output: its curvature is added, exactly; any tree, scalars among it."""
    params = jax.tree.map(jnp.asarray, PARAMS) | {"s": jnp.asarray(1.0)}
    functions = {
        "outputs_fn": lambda p: (0.0 * model(p, INPUTS), p),
        "out_loss_fn": lambda z: (
            jnp.mean(z[0] ** 2) + 0.5 * 0.3 * sum(jnp.sum(x**2) for x in jax.tree.leaves(z[1]))
        ),
    }
    transformation = optgrad.scale_by_diagonal_gauss_newton()
    _, state = transformation.update(params, transformation.init(params), params, **functions)
    for h in jax.tree.leaves(state.curvature):
        np.testing.assert_allclose(h, 0.3, rtol=1e-10)


def test_zero_curvature_and_zero_gradients():
    params = {"used": jnp.ones(2), "idle": jnp.ones(3)}
    transformation = optgrad.scale_by_diagonal_gauss_newton(0.5)
    functions = {"outputs_fn": lambda p: p["used"], "out_loss_fn": lambda z: 0.5 * jnp.sum(z**2)}
    g = {"used": jnp.array([0.0, 3.0]), "idle": jnp.ones(3)}
    found, state = transformation.update(g, transformation.init(params), params, **functions)
    np.testing.assert_allclose(found["used"], [0.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found["idle"], 2.0, rtol=1e-6)
    summary = {key: float(x) for key, x in optgrad.diagnostics(state).items()}
    expected = dict.fromkeys(("curvature_geomean", "curvature_min", "curvature_max"), 1.0)
    assert summary == pytest.approx({**expected, "gradient_equivalents": 2.0})


def test_bad_numbers_stay_in_their_coordinate():
    params = jnp.array([1.0, 2.0, 3.0])
    transformation = optgrad.scale_by_diagonal_gauss_newton(0.5, 0.5)
    functions = {"outputs_fn": lambda p: p, "out_loss_fn": lambda z: 0.5 * jnp.sum(z**2)}
    _, before = transformation.update(params, transformation.init(params), params, **functions)
    found, _ = transformation.update(params.at[1].set(jnp.nan), before, params, **functions)
    np.testing.assert_allclose(found, [1 / 1.5, 0.0, 2.0], rtol=1e-6)
    functions["outputs_fn"] = lambda p: p * jnp.array([1.0, jnp.nan, jnp.inf])
    found, after = transformation.update(params, before, params, **functions)
    np.testing.assert_allclose(found, params / 1.5, rtol=1e-6)
    np.testing.assert_allclose(after.curvature, before.curvature)


def test_a_loss_without_numbers():
    """Blocks that are not finite leave the curvature as it was."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    transformation = optgrad.scale_by_diagonal_gauss_newton()
    functions = extras(cross_entropy)
    _, before = transformation.update(params, transformation.init(params), params, **functions)
    functions["out_loss_fn"] = lambda z: jnp.nan * jnp.sum(z**2)
    found, after = transformation.update(params, before, params, **functions)
    jax.tree.map(np.testing.assert_array_equal, after.curvature, before.curvature)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_low_precision():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    inputs = jnp.asarray(INPUTS, jnp.bfloat16)
    for kind in ("general", "softmax"):
        optimizer = optgrad.diagonal_gauss_newton(0.1, loss=kind)
        functions = extras(cross_entropy) | {"outputs_fn": lambda p: model(p, inputs)}
        updates, state = optimizer.update(params, optimizer.init(params), params, **functions)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in jax.tree.leaves(state[0].curvature)} == {jnp.dtype("float32")}


def test_seeds_differ_and_vmap():
    params = jnp.ones(3)
    functions = {"outputs_fn": lambda w: INPUTS @ w}

    def curvature(seed):
        t = optgrad.scale_by_diagonal_gauss_newton(loss="squared")
        state = t.init(params)._replace(key=jax.random.PRNGKey(seed))
        return t.update(params, state, params, **functions)[1].curvature

    one = optgrad.scale_by_diagonal_gauss_newton(loss="squared", seed=2)
    alone = one.update(params, one.init(params), params, **functions)[1].curvature
    together = jax.vmap(curvature)(jnp.arange(3))
    np.testing.assert_allclose(together[2], alone, rtol=1e-6)
    assert not np.allclose(together[0], together[1])


def test_donated_step_copies_nothing():
    """Of many parameters and few outputs; what the signs of n·C outputs take is not counted."""
    size, leaves = 20_000, 20
    params = {f"leaf_{i}": jnp.linspace(-1.0, 1.0, size) for i in range(leaves)}
    optimizer = optgrad.diagonal_gauss_newton(0.1)

    def step(params, state, grad):
        functions = {
            "outputs_fn": lambda p: sum(x.reshape(8, 4, -1).mean(-1) for x in p.values()),
            "out_loss_fn": lambda z: 0.5 * jnp.mean(jnp.sum(z**2, axis=-1)),
        }
        updates, state = optimizer.update(grad, state, params, **functions)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, optimizer.init(params), params).compile()
    copied = re.findall(rf"= \w+\[(?:{size}|8,4,{size // 32})\]\S* copy\(", compiled.as_text())
    assert not copied
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * leaves * size * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping = 0.0"),
        ({"decay": 1.0}, "decay = 1.0"),
        ({"loss": "sotfmax"}, "did you mean 'softmax'"),
        ({"state_dtype": "int8"}, "state_dtype = 'int8'"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.diagonal_gauss_newton(**{"learning_rate": 1.0, **arguments})


def test_missing_extras():
    params = jnp.ones(2)
    general = optgrad.diagonal_gauss_newton(1.0)
    state = general.init(params)
    with pytest.raises(ValueError, match=r"outputs_fn = None.*curvature_args\(loss_fn, outputs"):
        general.update(params, state, params, out_loss_fn=jnp.sum)
    with pytest.raises(ValueError, match="out_loss_fn = None"):
        general.update(params, state, params, outputs_fn=lambda p: p)
    with pytest.raises(ValueError, match="params = None"):
        general.update(params, state, outputs_fn=lambda p: p, out_loss_fn=jnp.sum)
    squared = optgrad.diagonal_gauss_newton(1.0, loss="squared")
    squared.update(params, state, params, outputs_fn=lambda p: p)  # needs no loss
    softmax = optgrad.diagonal_gauss_newton(1.0, loss="softmax")
    with pytest.raises(ValueError, match="outputs are a scalar"):
        softmax.update(params, state, params, outputs_fn=jnp.sum)

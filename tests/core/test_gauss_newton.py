"""The diagonal of the Gauss–Newton matrix against the dense product JᵀHJ."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

SIZE, INPUTS, CLASSES = 7, 4, 3


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="microbatch_size")
def diagonal(*args, microbatch_size=None):
    return optgrad.gauss_newton_diagonal(*args, microbatch_size=microbatch_size)


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def squared(outputs, target):
    return 0.5 * jnp.sum((outputs - target) ** 2)


def softmax_hessian(logits):
    """diag(p) − ppᵀ, on paper."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


LOSSES = {
    "cross_entropy": (cross_entropy, softmax_hessian),
    "squared": (squared, lambda outputs: np.eye(outputs.size)),
}


def data(loss, seed=0):
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(SIZE, INPUTS)))
    if loss == "cross_entropy":
        return inputs, jnp.asarray(rng.integers(0, CLASSES, SIZE))
    return inputs, jnp.asarray(rng.normal(size=(SIZE, CLASSES)))


def linen_model():
    """Two layers of flax.linen, for one example."""
    linen = pytest.importorskip("flax.linen")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(CLASSES, param_dtype=jnp.float64)(
                jnp.tanh(linen.Dense(5, param_dtype=jnp.float64)(x))
            )

    module = Network()
    params = module.init(jax.random.key(0), jnp.ones(INPUTS))
    return module.apply, params


def nnx_model():
    """Two layers of flax.nnx that want a batch."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(INPUTS, 5, rngs=rngs, param_dtype=jnp.float64)
            self.second = nnx.Linear(5, CLASSES, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            assert x.ndim == 2
            return self.second(jnp.tanh(self.first(x)))

    graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    return lambda p, x: nnx.merge(graph, p)(x[None])[0], params


MODELS = {"linen": linen_model, "nnx": nnx_model}


def dense(model, params, inputs, hessian):
    """The diagonal of the mean of JᵀHJ, with dense Jacobians, one example after the other."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    total = np.zeros(flat.size)
    for x in inputs:
        jacobian = np.asarray(jax.jacobian(lambda p, x=x: model(unravel(p), x))(flat))
        curvature = hessian(np.asarray(model(params, x)))
        total += np.diag(jacobian.T @ curvature @ jacobian)
    return total / len(inputs)


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("model", list(MODELS))
def test_flax_models(x64, model, loss, microbatch_size):
    """Micro-batches that divide the batch, that do not, and none."""
    model_fn, params = MODELS[model]()
    loss_fn, hessian = LOSSES[loss]
    inputs, targets = data(loss)
    arguments = (model_fn, loss_fn, params, inputs, targets)
    found = diagonal(*arguments, microbatch_size=microbatch_size)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    flat, _ = jax.flatten_util.ravel_pytree(found)
    expected = dense(model_fn, params, inputs, hessian)
    np.testing.assert_allclose(flat, expected, rtol=1e-10, atol=1e-14)
    assert np.all(flat >= 0)
    assert np.any(flat > 0.01)


def test_linear_model_is_exact(x64):
    """There the Gauss–Newton matrix is the Hessian, and the features' squares its diagonal."""
    rng = np.random.default_rng(1)
    inputs, targets, w = (jnp.asarray(rng.normal(size=s)) for s in ((SIZE, 4), (SIZE,), (4,)))
    found = diagonal(jnp.dot, squared, w, inputs, targets)
    whole = diagonal(jnp.dot, squared, w, inputs, targets, microbatch_size=100)
    np.testing.assert_array_equal(whole, found)

    def loss(w):
        return 0.5 * jnp.mean((inputs @ w - targets) ** 2)

    np.testing.assert_allclose(found, np.diag(jax.hessian(loss)(w)), rtol=1e-12)
    np.testing.assert_allclose(found, np.mean(inputs**2, axis=0), rtol=1e-12)


def test_trees_of_outputs_inputs_and_parameters(x64):
    """Any pytree in all places, with None leaves, a scalar and an empty array."""
    rng = np.random.default_rng(2)
    params = {"a": jnp.asarray(rng.normal(size=3)), "b": (jnp.array(0.5), None), "c": jnp.ones(0)}
    inputs = {"x": jnp.asarray(rng.normal(size=(SIZE, 3))), "none": None}
    targets = (jnp.asarray(rng.normal(size=SIZE)), jnp.asarray(rng.normal(size=(SIZE, 3))))

    def model(p, x):
        return {"sum": jnp.sum(p["a"] * x["x"]), "scaled": p["b"][0] * x["x"]}

    def loss(outputs, target):
        error = jnp.sum((outputs["scaled"] - target[1]) ** 2)
        return 2 * (outputs["sum"] - target[0]) ** 2 + 0.5 * error

    found = diagonal(model, loss, params, inputs, targets)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    x = np.asarray(inputs["x"])
    np.testing.assert_allclose(found["a"], 4 * np.mean(x**2, axis=0))
    np.testing.assert_allclose(found["b"][0], np.mean(np.sum(x**2, axis=1)))
    assert diagonal(lambda _, x: x["x"], lambda o, _: o @ o, {}, inputs, targets) == {}


def test_negative_eigenvalues_count_as_none(x64):
    """A loss that is concave in one output."""

    def loss(outputs, target):
        return outputs[0] ** 2 - outputs[1] ** 2 + 0 * target

    found = diagonal(jnp.multiply, loss, jnp.ones(2), jnp.ones((3, 2)), jnp.ones(3))
    np.testing.assert_allclose(found, [2.0, 0.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    """The result is at least float32, near that of float32."""
    params = jnp.asarray(np.random.default_rng(3).normal(size=(INPUTS, CLASSES)), dtype)
    inputs, targets = data("cross_entropy")

    def model(p, x):
        return x @ p

    def found(params, inputs):
        return diagonal(model, cross_entropy, params, inputs, targets, microbatch_size=2)

    narrow = found(params, inputs.astype(dtype))
    wide = found(params.astype(jnp.float32), inputs.astype(jnp.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=0.1, atol=1e-3)


def test_memory_is_that_of_a_micro_batch():
    """Of 64 examples × 4 outputs × D numbers only a part is there at a time."""
    size, outputs, examples = 20_000, 4, 64

    def model(p, x):
        return jnp.sum((p * x).reshape(outputs, -1), axis=1)

    shapes = ((size,), (examples, 1), (examples, outputs))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = diagonal.lower(model, squared, *arguments, microbatch_size=2).compile()
    gradients = 2 * outputs * size * 4  # bytes of a micro-batch
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * gradients


def test_wrong_arguments():
    """Refused by name, as the other oracles do."""
    one = jnp.ones(2)

    def call(inputs, targets, **options):
        return optgrad.gauss_newton_diagonal(jnp.dot, squared, one, inputs, targets, **options)

    with pytest.raises(ValueError, match=r"\(inputs, targets\) has leaves of shapes"):
        call(jnp.ones((3, 2)), jnp.ones(4))
    with pytest.raises(ValueError, match="microbatch_size = 0"):
        call(jnp.ones((3, 2)), jnp.ones(3), microbatch_size=0)
    with pytest.raises(TypeError, match="microbatch_size"):
        call(jnp.ones((3, 2)), jnp.ones(3), microbatch_size=1.5)


def test_it_drives_the_methods(x64):
    """`idbd` and `vsgd` on a Flax network, with the diagonal of each batch."""
    model_fn, params = linen_model()
    inputs, targets = data("cross_entropy")

    def loss(p):
        logits = jax.vmap(model_fn, in_axes=(None, 0))(p, inputs)
        return jnp.mean(cross_entropy(logits, targets))

    for optimizer in (optgrad.idbd(0.1), optgrad.vsgd(warmup_steps=2)):

        @jax.jit
        def run(p, optimizer=optimizer):
            def body(carry, _):
                p, state = carry
                diagonal = optgrad.gauss_newton_diagonal(
                    model_fn, cross_entropy, p, inputs, targets, microbatch_size=4
                )
                updates, state = optimizer.update(
                    jax.grad(loss)(p), state, p, curvature_diagonal=diagonal
                )
                return (optax.apply_updates(p, updates), state), None

            return jax.lax.scan(body, (p, optimizer.init(p)), None, 30)[0][0]

        assert loss(run(params)) < 0.8 * loss(params)

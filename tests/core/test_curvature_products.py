"""Products with Hessian, Gauss–Newton and Fisher matrices, against matrices written out."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.core import oracles

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

MODES = ("exact", "jvp", "fd", "fdc")
# Relative errors of products by the specification, with a factor 10 for another network.
ERRORS = {
    "float32": {"exact": 1e-6, "jvp": 1e-6, "fd": 7e-3, "fdc": 3.5e-4},
    "float64": {"exact": 1e-14, "jvp": 1e-14, "fd": 2.8e-7, "fdc": 4e-10},
}


def network(seed=0, dtype=None):
    """Parameters of a small tanh network, and its outputs on a batch."""
    generator = np.random.default_rng(seed)
    shapes = {"w1": (5, 7), "b1": (7,), "w2": (7, 3), "b2": (3,)}
    params = {
        key: jnp.asarray(generator.standard_normal(shape) / np.sqrt(shape[0]), dtype)
        for key, shape in shapes.items()
    }
    inputs = generator.standard_normal((20, 5))
    labels = generator.integers(0, 3, 20)

    def outputs_fn(p):
        x = jnp.asarray(inputs, p["w1"].dtype)
        precise = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return precise(jnp.tanh(precise(x, p["w1"]) + p["b1"]), p["w2"]) + p["b2"]

    return params, outputs_fn, labels


def cross_entropy(labels):
    def out_loss(z):
        logits = jax.nn.log_softmax(z)
        return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=1))

    return out_loss


def squared_error(labels):
    targets = jax.nn.one_hot(labels, 3)
    return lambda z: 0.5 * jnp.mean(jnp.sum((z - targets.astype(z.dtype)) ** 2, axis=1))


OUT_LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error}


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)


def direction_like(params, seed=3):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape), x.dtype), params)


@functools.cache
def hessian():
    """Of the cross-entropy of the network, in float64."""
    params, outputs_fn, labels = network()
    _, unravel = jax.flatten_util.ravel_pytree(params)
    loss = lambda x: cross_entropy(labels)(outputs_fn(unravel(x)))  # noqa: E731
    return np.asarray(jax.hessian(loss)(jax.flatten_util.ravel_pytree(params)[0]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", MODES)
def test_hessian_product(x64, mode, dtype):
    """Relative errors as specified; differences are worse, but not useless."""
    params, outputs_fn, labels = network(dtype=dtype)
    value_fn = lambda p: cross_entropy(labels)(outputs_fn(p))  # noqa: E731
    product = oracles.hessian_product(value_fn, params, mode)
    for size in (1.0, 1e-3, 1e3):  # the steps of the differences do not depend on it
        v = jax.tree.map(lambda x, s=size: s * x, direction_like(params))
        image = product(v)
        assert {x.dtype for x in jax.tree.leaves(image)} == {jnp.dtype(dtype)}
        expected = hessian() @ flat(v)
        error = np.linalg.norm(flat(image) - expected) / np.linalg.norm(expected)
        assert error < ERRORS[dtype][mode]
        if mode in {"fd", "fdc"}:
            assert error > ERRORS[dtype][mode] * 1e-4  # it is a difference


@pytest.mark.parametrize("mode", MODES)
def test_hessian_product_of_nothing(mode):
    params, outputs_fn, labels = network()
    value_fn = lambda p: cross_entropy(labels)(outputs_fn(p))  # noqa: E731
    zero = jax.tree.map(jnp.zeros_like, params)
    assert not np.any(flat(oracles.hessian_product(value_fn, params, mode)(zero)))


@pytest.mark.parametrize("mode", MODES)
def test_hessian_product_in_bfloat16(mode):
    """Images in float32, as exact as passes in 16 bits allow."""
    params, outputs_fn, labels = network(dtype=jnp.bfloat16)
    value_fn = lambda p: cross_entropy(labels)(outputs_fn(p).astype(jnp.float32))  # noqa: E731
    v = direction_like(params)
    image = oracles.hessian_product(value_fn, params, mode)(v)
    assert {x.dtype for x in jax.tree.leaves(image)} == {jnp.dtype(jnp.float32)}
    wide, wide_fn, _ = network(dtype=jnp.float32)
    expected = oracles.hessian_product(lambda p: cross_entropy(labels)(wide_fn(p)), wide)(
        jax.tree.map(lambda x: x.astype(jnp.float32), v)
    )
    error = np.linalg.norm(flat(image) - flat(expected)) / np.linalg.norm(flat(expected))
    assert error < {"exact": 0.05, "jvp": 0.05, "fd": 0.5, "fdc": 0.3}[mode]


def test_mixed_types(x64):
    """Each leaf is differentiated in its own type; images are float32 at least."""
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float64)}
    loss = lambda p: jnp.sum(p["a"].astype(jnp.float64) ** 2 * p["b"] ** 3)  # noqa: E731
    v = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    image = oracles.hessian_product(loss, params)(v)
    assert (image["a"].dtype, image["b"].dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(image["a"], [8.0, 8.0])
    np.testing.assert_allclose(image["b"], [12.0, 12.0])


def test_products_cross_loops(x64):
    """One linearisation serves every product of a compiled loop."""
    params, outputs_fn, labels = network(dtype="float64")
    value_fn = lambda p: cross_entropy(labels)(outputs_fn(p))  # noqa: E731

    @jax.jit
    def power(params, v):
        product = oracles.hessian_product(value_fn, params)
        return jax.lax.fori_loop(0, 3, lambda i, x: product(x), v)

    v = direction_like(params)
    expected = np.linalg.matrix_power(hessian(), 3) @ flat(v)
    np.testing.assert_allclose(flat(power(params, v)), expected, rtol=1e-9, atol=1e-12)


def test_unknown_mode():
    with pytest.raises(ValueError, match="hvp = 'exat' is not accepted; did you mean 'exact'"):
        oracles.hessian_product(jnp.sum, jnp.ones(2), "exat")


# --- Gauss–Newton and Fisher --------------------------------------------------------------------


def jacobian_of_outputs(params, outputs_fn):
    """Shape (examples, outputs, D)."""
    x, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jacobian(lambda x: outputs_fn(unravel(x)))(x))


def written_out(loss, params, outputs_fn, labels):
    """JᵀLJ with the loss's Hessian L in the outputs of each example by hand."""
    jacobian = jacobian_of_outputs(params, outputs_fn)
    p = np.asarray(jax.nn.softmax(outputs_fn(params)))
    if loss == "cross_entropy":
        inner = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
    else:
        inner = np.broadcast_to(np.eye(3), (len(labels), 3, 3))
    return np.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian) / len(labels)


@pytest.mark.parametrize("loss", list(OUT_LOSSES))
def test_gauss_newton_product(x64, loss):
    params, outputs_fn, labels = network()
    product = oracles.gauss_newton_product(outputs_fn, OUT_LOSSES[loss](labels), params)
    expected = written_out(loss, params, outputs_fn, labels)
    matrix = oracles.dense_matrix(product, params)
    np.testing.assert_allclose(matrix, expected, rtol=1e-10, atol=1e-13)
    assert np.linalg.eigvalsh(matrix)[0] > -1e-14


@pytest.mark.parametrize("loss", list(OUT_LOSSES))
def test_gauss_newton_is_the_fisher_matrix(x64, loss):
    """The expectation of gg^T over labels of the model: all three classes, or a Gaussian's."""
    params, outputs_fn, labels = network()
    product = oracles.gauss_newton_product(outputs_fn, OUT_LOSSES[loss](labels), params)
    jacobian = jacobian_of_outputs(params, outputs_fn)
    fisher = np.zeros((jacobian.shape[2],) * 2)
    if loss == "cross_entropy":
        p = np.asarray(jax.nn.softmax(outputs_fn(params)))
        for label in range(3):
            scores = np.einsum("nc,nci->ni", p - np.eye(3)[label], jacobian)
            fisher += np.einsum("n,ni,nj->ij", p[:, label], scores, scores) / len(labels)
    else:  # the score is Jᵀε with ε standard normal: ±√3 and 0 have its first four moments
        for output in range(3):
            for epsilon, weight in ((np.sqrt(3), 1 / 6), (-np.sqrt(3), 1 / 6)):
                scores = epsilon * jacobian[:, output]
                fisher += weight * scores.T @ scores / len(labels)
    np.testing.assert_allclose(
        oracles.dense_matrix(product, params), fisher, rtol=1e-10, atol=1e-13
    )


def test_gauss_newton_is_the_hessian_of_linear_outputs(x64):
    matrix = np.random.default_rng(0).standard_normal((6, 4))
    outputs_fn = lambda w: jnp.asarray(matrix) @ w  # noqa: E731
    out_loss = lambda z: jnp.sum(jnp.cosh(z))  # noqa: E731
    params = jnp.array([0.1, -0.2, 0.3, 0.0])
    product = oracles.gauss_newton_product(outputs_fn, out_loss, params)
    expected = jax.hessian(lambda w: out_loss(outputs_fn(w)))(params)
    np.testing.assert_allclose(oracles.dense_matrix(product, params), expected, rtol=1e-12)


def test_parameters_among_the_outputs(x64):
    """Then the curvature of terms outside of the network is contained."""
    params, outputs_fn, labels = network()
    inner = cross_entropy(labels)

    def out_loss(z):
        outputs, p = z
        return inner(outputs) + 0.05 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    product = oracles.gauss_newton_product(lambda p: (outputs_fn(p), p), out_loss, params)
    expected = written_out("cross_entropy", params, outputs_fn, labels)
    expected = expected + 0.1 * np.eye(len(expected))
    np.testing.assert_allclose(
        oracles.dense_matrix(product, params), expected, rtol=1e-10, atol=1e-13
    )


def test_gauss_newton_product_in_bfloat16():
    params, outputs_fn, labels = network(dtype=jnp.bfloat16)
    v = direction_like(params)
    wide_params, wide_fn, _ = network(dtype=jnp.float32)
    loss = lambda z: cross_entropy(labels)(z.astype(jnp.float32))  # noqa: E731
    image = oracles.gauss_newton_product(outputs_fn, loss, params)(v)
    wide_v = jax.tree.map(lambda x: x.astype(jnp.float32), v)
    expected = oracles.gauss_newton_product(wide_fn, loss, wide_params)(wide_v)
    assert {x.dtype for x in jax.tree.leaves(image)} == {jnp.dtype(jnp.float32)}
    error = np.linalg.norm(flat(image) - flat(expected)) / np.linalg.norm(flat(expected))
    assert error < 0.05


def test_fisher_product(x64):
    """Of gradients, (1/n)GᵀG; of the labels at hand it is not the Gauss–Newton matrix."""
    params, outputs_fn, labels = network()
    jacobian = jacobian_of_outputs(params, outputs_fn)
    p = np.asarray(jax.nn.softmax(outputs_fn(params)))
    scores = np.einsum("nc,nci->ni", p - np.eye(3)[labels], jacobian)
    _, unravel = jax.flatten_util.ravel_pytree(params)
    grads = jax.vmap(unravel)(jnp.asarray(scores))
    v = direction_like(params)
    image = oracles.fisher_product(grads)(v)
    np.testing.assert_allclose(flat(image), scores.T @ (scores @ flat(v)) / 20, rtol=1e-10)
    gauss_newton = written_out("cross_entropy", params, outputs_fn, labels)
    matrix = oracles.dense_matrix(oracles.fisher_product(grads), params)
    assert np.linalg.norm(matrix - gauss_newton) > 0.1 * np.linalg.norm(gauss_newton)


def test_fisher_product_refuses_different_batches():
    with pytest.raises(ValueError, match="per_example_grads has leaves of shapes"):
        oracles.fisher_product({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})


# --- matrices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_dense_matrix(x64, at_once):
    """Rows in the order of the leaves; rounding is symmetrised."""
    params = {"b": jnp.ones(2), "a": jnp.ones((2, 2), jnp.float32), "c": None}
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((6, 6))

    def product(v):
        image = jnp.asarray(matrix) @ jnp.concatenate([v["a"].ravel(), v["b"]])
        return {"a": image[:4].reshape(2, 2), "b": image[4:], "c": None}

    found = oracles.dense_matrix(product, params, at_once=at_once)
    np.testing.assert_allclose(found, (matrix + matrix.T) / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found, found.T)


def test_dense_hessian(x64):
    params, outputs_fn, labels = network()
    product = oracles.hessian_product(lambda p: cross_entropy(labels)(outputs_fn(p)), params)
    np.testing.assert_allclose(
        oracles.dense_matrix(product, params), hessian(), rtol=1e-9, atol=1e-13
    )


# --- functions that are missing -----------------------------------------------------------------


def test_require_function():
    assert oracles.require_function("value_fn", jnp.sum) is jnp.sum
    with pytest.raises(
        ValueError,
        match=r"^value_fn = None; accepted: a function of the parameters, closed over the batch, "
        r"as optgrad\.curvature_args\(loss_fn\) builds it inside the jitted step",
    ):
        oracles.require_function("value_fn", None)
    with pytest.raises(ValueError, match=r"outputs_fn = None.*as optgrad\.other\(\) builds it"):
        oracles.require_function("outputs_fn", None, "optgrad.other()")
    for wrong in (3.0, jnp.ones(2), "value_fn"):
        with pytest.raises(TypeError, match=r"value_fn = .*accepted: a function"):
            oracles.require_function("value_fn", wrong)

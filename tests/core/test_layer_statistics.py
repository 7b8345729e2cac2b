"""Activations and pre-activation gradients against gradients of every example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import optgrad
from optgrad.core import taps
from optgrad.experiments import models

pytestmark = pytest.mark.slow  # many programs to compile

SIZE = 3


def rows(array):
    """[n, positions, …] of [n, *positions, …]."""
    return np.asarray(array).reshape(len(array), -1, array.shape[-1])


def at(tree, path):
    """The mapping at a path of keys, which are integers where they look like it."""
    for key in filter(None, path.split("/")):
        tree = tree[int(key) if key.isdigit() else key]
    return tree


def assert_gradients(statistics, grads, layers):
    """The gradient of example i is Σₜ ãₜsₜᵀ, in every layer; and there are these layers."""
    assert set(statistics) == set(layers)
    for path, found in statistics.items():
        a, s = (rows(x) for x in found)
        assert found.activations.shape[:-1] == found.gradients.shape[:-1]
        block = at(grads, path)
        kernel = np.asarray(block["kernel"])
        products = np.einsum("nti,nto->nio", a, s)
        np.testing.assert_allclose(products.reshape(kernel.shape), kernel, rtol=1e-9, atol=1e-12)
        if "bias" in block:
            np.testing.assert_allclose(s.sum(1), block["bias"], rtol=1e-9, atol=1e-12)
        assert np.abs(kernel).max() > 1e-4


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def half_squares(outputs, target):
    return 0.5 * jnp.sum((outputs - target) ** 2)


def per_example(apply, params, x, y, loss=cross_entropy):
    """Gradients one example at a time, each through the model as a batch of one."""

    def of(params, x, y):
        return loss(apply(params, x[None])[0], y)

    return jax.jit(jax.vmap(jax.grad(of), in_axes=(None, 0, 0)))(params, x, y)


def statistics(model, params, x, y, **options):
    """With the labels of the data, compiled."""

    def compute(params, x, y):
        return optgrad.layer_statistics(model, params, x, y, labels="data", **options)

    return jax.jit(compute)(params, x, y)


def images(shape=(6, 5, 2), seed=0):
    generator = np.random.default_rng(seed)
    x = jnp.asarray(generator.standard_normal((SIZE, *shape)))
    return x, jnp.asarray(generator.integers(0, 4, SIZE))


# --- convolutions ----------------------------------------------------------------------------

GEOMETRIES = {
    "same": {"kernel_size": (3, 2)},
    "valid": {"kernel_size": (2, 3), "padding": "VALID"},
    "strides": {"kernel_size": (3, 3), "strides": (2, 1)},
    "one_stride": {"kernel_size": (3, 2), "strides": 2, "padding": "VALID"},
    "explicit": {"kernel_size": (2, 2), "padding": [(2, 0), (0, 1)]},
    "one_padding": {"kernel_size": (2, 3), "padding": 1},
    "two_paddings": {"kernel_size": (2, 3), "padding": [1, (0, 2)]},
    "dilation": {"kernel_size": (2, 3), "kernel_dilation": (3, 2)},
    "input_dilation": {"kernel_size": (2, 3), "input_dilation": (1, 2), "padding": [(1, 0), 2]},
    "circular": {"kernel_size": (3, 2), "padding": "CIRCULAR", "strides": (1, 2)},
    "reflect": {"kernel_size": (3, 3), "padding": "REFLECT", "kernel_dilation": (1, 2)},
    "without_bias": {"kernel_size": (3, 3), "use_bias": False},
    "one_pixel": {"kernel_size": (1, 1)},
}


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_patches(x64, geometry):
    """A convolution is the product of its patches and the kernel as a matrix, in both of Flax'
    libraries; so the kernel's gradient is that of a dense layer on them."""
    options = GEOMETRIES[geometry]
    x, _ = images()
    layer = nnx.Conv(2, 3, **options, param_dtype=float, rngs=nnx.Rngs(0))
    kernel = layer.kernel[...]
    outputs = layer(x) - (0.0 if layer.bias is None else layer.bias[...])
    products = taps.patches(layer, x) @ kernel.reshape(-1, 3)
    np.testing.assert_allclose(products, outputs, rtol=1e-12, atol=1e-12)
    linen = nn.Conv(3, **{**options, "use_bias": False}, param_dtype=float)
    np.testing.assert_array_equal(taps.patches(linen, x), taps.patches(layer, x))
    outputs = linen.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(products, outputs, rtol=1e-12, atol=1e-12)


class LinenConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("strides", "dilation", "without_bias"):
            x = jnp.tanh(nn.Conv(3, **GEOMETRIES[name], param_dtype=float)(x))
        return nn.Dense(4, param_dtype=float)(x.reshape(len(x), -1))


class NNXConvolutions(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(2, 3, **GEOMETRIES["explicit"], param_dtype=float, rngs=rngs)
        self.then = nnx.Conv(3, 2, **GEOMETRIES["circular"], param_dtype=float, rngs=rngs)
        self.dense = nnx.Linear(7 * 3 * 2, 4, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.then(jnp.tanh(self.first(x))))
        return self.dense(x.reshape(len(x), -1))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_convolutions(x64, api):
    """Strides, padding and dilation, in a network."""
    x, y = images()
    if api == "linen":
        model, layers = LinenConvolutions(), ["Conv_0", "Conv_1", "Conv_2", "Dense_0"]
        params = jax.jit(model.init)(jax.random.key(1), x)["params"]

        def apply(params, x):
            return model.apply({"params": params}, x)
    else:
        model, layers = NNXConvolutions(), ["first", "then", "dense"]
        graph, params = nnx.split(model, nnx.Param)

        def apply(params, x):
            return nnx.merge(graph, params)(x)

    found = statistics(model, params, x, y)
    grads = per_example(apply, params, x, y)
    assert_gradients(found, nnx.to_pure_dict(grads) if api == "nnx" else grads, layers)


# --- whole models ----------------------------------------------------------------------------


class Network(nn.Module):
    """Nested modules, a layer that is used twice, layers on sequences."""

    def setup(self):
        self.shared = nn.Dense(4, param_dtype=float)
        self.blocks = [Block(), Block()]

    def __call__(self, x):
        x = jnp.tanh(self.shared(jnp.sin(self.shared(x))))
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(param_dtype=float)(x)
        return x + nn.Dense(4, param_dtype=float, use_bias=False)(jnp.tanh(x))


def sequences():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((SIZE, 5, 4)))
    return x, jnp.asarray(generator.integers(0, 4, SIZE))


def test_nested_and_shared_layers(x64):
    """Both uses of one layer are its positions; sequences have positions."""
    x, y = sequences()
    model = Network()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    found = statistics(model, params, x, y)
    grads = per_example(lambda p, x: model.apply({"params": p}, x), params, x, y)
    assert_gradients(found, grads, ["shared", "blocks_0/Dense_0", "blocks_1/Dense_0"])
    assert found["shared"].activations.shape == (SIZE, 10, 4)
    assert found["blocks_0/Dense_0"].gradients.shape == (SIZE, 5, 4)


def test_all_variables_of_a_linen_module(x64):
    """Their paths begin with the collection, as in the variables."""
    x, y = sequences()
    model = Network()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = statistics(model, variables, x, y)
    expected = statistics(model, variables["params"], x, y)
    assert {f"params/{path}" for path in expected} == set(found)
    for path, alone in expected.items():
        jax.tree.map(np.testing.assert_array_equal, found[f"params/{path}"], alone)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("mlp_small", (4, 4, 1), {}),
        pytest.param(
            "cifar10_cnn",
            (9, 9, 2),
            {"channels": (4, 4, 4), "hidden": (8, 8)},
            marks=pytest.mark.slow,
        ),
        pytest.param("all_cnn_c", (9, 9, 2), {"width": 2}, marks=pytest.mark.slow),
    ],
)
def test_networks_of_the_experiments(x64, name, shape, options):
    """NNX models with lists of layers, from the module or from its graph definition."""
    model = models.create_model(name, shape, 4, nnx.Rngs(0), **options)
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda p: p.astype(float), params)
    x, y = images(shape)
    found = statistics(model, params, x, y)
    grads = per_example(lambda p, x: nnx.merge(graph, p)(x), params, x, y)
    pure = nnx.to_pure_dict(grads)
    layers = {
        "/".join(str(getattr(k, "key", "")) for k in path[:-1])
        for path, _ in jax.tree_util.tree_leaves_with_path(pure)
    }
    assert_gradients(found, pure, layers)
    if name == "mlp_small":
        again = statistics(graph, params, x, y)
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=1e-12), found, again)
    first = model.layers[0] if name != "cifar10_cnn" else model.conv1
    assert type(first) in (nnx.Linear, nnx.Conv)  # the user's model is as it was


def test_stateful_models(x64):
    """Batch normalisation with stored averages, by functions of one's own."""

    class WithAverages(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(3, param_dtype=float)(x)
            x = nn.BatchNorm(use_running_average=not train, param_dtype=float)(x)
            return nn.Dense(4, param_dtype=float)(x)

    x, y = images((5,))
    model = WithAverages()
    params, rest = (
        model.init(jax.random.key(0), x, train=False)[key] for key in ("params", "batch_stats")
    )

    def apply(params, x):
        return model.apply({"params": params, "batch_stats": rest}, x, train=False)

    tapped = taps.tapped_linen(apply)
    found = statistics(tapped, params, x, y)
    assert_gradients(found, per_example(apply, params, x, y), ["Dense_0", "Dense_1"])

    module = nnx.Sequential(
        nnx.Linear(5, 3, param_dtype=float, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(3, param_dtype=float, use_running_average=True, rngs=nnx.Rngs(0)),
        nnx.Linear(3, 4, param_dtype=float, rngs=nnx.Rngs(1)),
    )
    graph, params, averages = nnx.split(module, nnx.Param, ...)
    found = statistics(module, params, x, y)
    grads = per_example(lambda p, x: nnx.merge(graph, p, averages)(x), params, x, y)
    assert_gradients(found, nnx.to_pure_dict(grads), ["layers/0", "layers/2"])


def test_unsupported_layers_are_left_out(x64):
    """Grouped, masked and transposed convolutions, other ranks, no batch axis in front."""

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2), feature_group_count=2, param_dtype=float)(x)
            x = nn.Conv(2, (1, 1), mask=jnp.ones((1, 1, 4, 2)), param_dtype=float)(x)
            x = nn.ConvTranspose(2, (2, 2), param_dtype=float)(x)
            x = nn.Conv(2, (2,), param_dtype=float)(x)  # along the last axis of pixels only
            x = nn.DenseGeneral((2, 2), param_dtype=float)(x)
            flat = nn.Dense(3, param_dtype=float)(x.reshape(-1, 4))
            return nn.Dense(4, param_dtype=float)(flat.reshape(SIZE, -1))

    x, y = images()
    model = Odd()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    found = statistics(model, params, x, y)
    grads = per_example_of_batch(lambda p: model.apply({"params": p}, x), params, y)
    assert_gradients(found, grads, ["Dense_1"])


def per_example_of_batch(outputs, params, y):
    """For models that cannot take one example alone."""
    losses = [lambda p, i=i: cross_entropy(outputs(p)[i], y[i]) for i in range(SIZE)]
    grads = jax.jit(lambda p: [jax.grad(loss)(p) for loss in losses])(params)
    return jax.tree.map(lambda *g: jnp.stack(g), *grads)


# --- the explicit contract ---------------------------------------------------------------------


def own_apply(params, x, taps):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"] + taps["first"])
    outputs = taps["last"] + hidden @ params["last"]["kernel"]
    return outputs, {"first": x, "last": hidden}


def own_problem(dtype=float):
    generator = np.random.default_rng(1)
    shapes = {"first": {"kernel": (5, 3), "bias": (3,)}, "last": {"kernel": (3, 4)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(generator.standard_normal(s), dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    return params, *images((5,))


def test_explicit_contract(x64):
    """Hard labels, probabilities, and half squares."""
    params, x, y = own_problem()
    zeros = {"first": 0.0, "last": 0.0}

    def apply(params, x):
        return own_apply(params, x, zeros)[0]

    grads = per_example(apply, params, x, y)
    assert_gradients(statistics(own_apply, params, x, y), grads, ["first", "last"])
    assert_gradients(
        statistics(own_apply, params, x, jax.nn.one_hot(y, 4)), grads, ["first", "last"]
    )
    targets = jnp.asarray(np.random.default_rng(2).standard_normal((SIZE, 4)))
    grads = per_example(apply, params, x, targets, half_squares)
    found = statistics(own_apply, params, x, targets, likelihood="squared")
    assert_gradients(found, grads, ["first", "last"])


def test_labels_of_the_model(x64):
    """Gradients at the outputs average to zero, their second moments to the Fisher matrix."""
    params, x, _ = own_problem()
    outputs = own_apply(params, x, {"first": 0.0, "last": 0.0})[0]
    for likelihood in ("softmax", "squared"):

        @jax.jit
        @jax.vmap
        def gradients(key, likelihood=likelihood):
            found = optgrad.layer_statistics(own_apply, params, x, key=key, likelihood=likelihood)
            return found["last"].gradients

        samples = np.asarray(gradients(jax.random.split(jax.random.key(0), 5_000)))
        fisher = np.eye(4)
        for i in range(SIZE):
            if likelihood == "softmax":
                p = np.asarray(jax.nn.softmax(outputs[i]))
                fisher = np.diag(p) - np.outer(p, p)
            second = samples[:, i].T @ samples[:, i] / len(samples)
            np.testing.assert_allclose(samples[:, i].mean(0), 0, atol=0.06)
            np.testing.assert_allclose(second, fisher, atol=0.1)


def test_keys_decide(x64):
    params, x, _ = own_problem()
    first, same, other = (
        optgrad.layer_statistics(own_apply, params, x, key=jax.random.key(k))["first"].gradients
        for k in (0, 0, 3)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("labels", ["model", "data"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_microbatches(x64, labels, size):
    """Any size gives the same numbers, the sampled labels included."""
    params, x, y = own_problem()
    compute = functools.partial(
        optgrad.layer_statistics, own_apply, params, x, y, jax.random.key(0), labels=labels
    )
    whole, parts = jax.jit(lambda: (compute(), compute(microbatch_size=size)))()
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=1e-12), parts, whole)


def test_narrow_types():
    """Statistics have the layers' types; the loss is computed in float32."""
    params, x, y = own_problem(jnp.bfloat16)
    found = optgrad.layer_statistics(own_apply, params, x.astype(jnp.bfloat16), y, labels="data")
    for statistics in found.values():
        assert {leaf.dtype for leaf in statistics} == {jnp.dtype(jnp.bfloat16)}
        assert np.all(np.isfinite(np.asarray(statistics.gradients, np.float32)))


def test_under_vmap_and_jit():
    """Several models at once, their keys raw or typed."""
    params, x, _ = own_problem(jnp.float32)
    x = x.astype(jnp.float32)
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    together = jax.jit(jax.vmap(lambda k: optgrad.layer_statistics(own_apply, params, x, key=k)))(
        keys
    )
    for i, key in enumerate(keys):
        alone = optgrad.layer_statistics(own_apply, params, x, key=key)
        jax.tree.map(
            lambda u, v, i=i: np.testing.assert_allclose(u[i], v, atol=1e-6), together, alone
        )


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "softmx"}, "likelihood = 'softmx'.*did you mean 'softmax'"),
        ({"labels": "true"}, "labels = 'true' is not accepted"),
        ({"labels": "model"}, "key = None; accepted: a PRNG key"),
        ({"labels": "data"}, "targets = None; accepted"),
        ({"labels": "data", "targets": np.zeros(SIZE + 1, int)}, r"\(inputs, targets\) has leaves"),
        ({"labels": "data", "targets": np.zeros((SIZE, 3))}, "targets have the shape"),
        (
            {"labels": "data", "targets": np.zeros((SIZE, 3)), "likelihood": "squared"},
            "targets have the shape",
        ),
        ({"key": jax.random.PRNGKey(0), "microbatch_size": 0}, "microbatch_size = 0"),
    ],
)
def test_errors(arguments, message):
    params, x, _ = own_problem(jnp.float32)
    with pytest.raises(ValueError, match=message):
        optgrad.layer_statistics(own_apply, params, x, **arguments)


def test_wrong_functions():
    params, x, y = own_problem(jnp.float32)

    def forgets_a_tap(params, x, taps):
        outputs, activations = own_apply(params, x, taps)
        return outputs, {**activations, "more": x}

    def wrong_shape(params, x, taps):
        outputs, activations = own_apply(params, x, taps)
        return outputs, {**activations, "first": x[:, None]}

    for apply, message in ((forgets_a_tap, "'more'.*the same layers"), (wrong_shape, "'first'")):
        with pytest.raises(ValueError, match=message):
            optgrad.layer_statistics(apply, params, x, y, labels="data")
    with pytest.raises(TypeError, match="model = 3; accepted: a Flax module"):
        optgrad.layer_statistics(3, params, x, y, labels="data")

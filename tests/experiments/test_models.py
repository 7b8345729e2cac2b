"""The networks: sizes by hand, what they compute by NumPy, initialisation under jit and vmap."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optgrad.experiments import models

MNIST, CIFAR, DIGITS = (28, 28, 1), (32, 32, 3), (8, 8, 1)

# One (weights, outputs) pair per layer, by hand; every layer has as many biases as outputs.
MLP_LAYERS = [(784 * 1000, 1000), (1000 * 500, 500), (500 * 100, 100), (100 * 10, 10)]
SMALL_LAYERS = [(64 * 100, 100), (100 * 50, 50), (50 * 10, 10)]
CONV3_LAYERS = [
    (5 * 5 * 3 * 64, 64),
    (3 * 3 * 64 * 96, 96),
    (3 * 3 * 96 * 128, 128),
    (3 * 3 * 128 * 512, 512),  # the last map is 3x3
    (512 * 256, 256),
    (256 * 10, 10),
]
ALL_CNN_LAYERS = [
    (9 * 3 * 96, 96),
    *[(9 * 96 * 96, 96)] * 2,
    (9 * 96 * 192, 192),
    *[(9 * 192 * 192, 192)] * 3,
    (192 * 192, 192),
    (192 * 100, 100),
]


def build(name, image_shape, num_classes, seed=0, **options):
    return models.create_model(name, image_shape, num_classes, nnx.Rngs(seed), **options)


def abstract(name, image_shape, num_classes, **options):
    """Shapes alone: drawing weights is what takes the time in these tests."""
    return nnx.eval_shape(lambda: build(name, image_shape, num_classes, **options))


def leaves(module):
    return jax.tree.leaves(nnx.state(module, nnx.Param))


def logits_shape(module, images):
    return jax.eval_shape(lambda module, images: module(images), module, images)


def images(shape, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "layers", "total"),
    [
        ("mlp", MNIST, 10, MLP_LAYERS, 1_336_610),
        ("mlp_small", DIGITS, 10, SMALL_LAYERS, 12_060),
        ("cifar10_cnn", CIFAR, 10, CONV3_LAYERS, 895_210),
        ("all_cnn_c", CIFAR, 100, ALL_CNN_LAYERS, 1_387_108),
    ],
)
def test_parameters(name, image_shape, num_classes, layers, total):
    module = abstract(name, image_shape, num_classes)
    assert models.count_parameters(module) == total
    assert total == sum(weights + outputs for weights, outputs in layers)
    # Weights, which L2 regularisation applies to, are the leaves of two dimensions and more.
    sizes = [(leaf.ndim >= 2, leaf.size) for leaf in leaves(module)]
    assert sorted(size for is_weight, size in sizes if is_weight) == sorted(w for w, _ in layers)
    assert sorted(size for is_weight, size in sizes if not is_weight) == sorted(
        o for _, o in layers
    )
    assert all(leaf.dtype == jnp.float32 for leaf in leaves(module))
    logits = logits_shape(module, images(image_shape))
    assert (logits.shape, logits.dtype) == ((2, num_classes), jnp.float32)


@pytest.mark.parametrize(
    ("name", "image_shape", "options"),
    [
        ("mlp", (5, 3, 2), {"hidden": ()}),
        ("mlp_small", (5, 3, 2), {}),
        ("cifar10_cnn", (28, 28, 1), {"channels": (2, 3, 4), "hidden": (5,)}),
        *[("cifar10_cnn", (side, 21 - side, 3), {}) for side in (9, 10, 11, 12)],
        *[("all_cnn_c", (side, 21 - side, 3), {}) for side in (9, 10, 11, 12)],
        ("all_cnn_c", (28, 28, 1), {"width": 2, "output_relu": True}),
    ],
)
def test_other_sizes(name, image_shape, options):
    module = abstract(name, image_shape, 4, **options)
    assert logits_shape(module, images(image_shape)).shape == (2, 4)


# What the networks compute, written out in NumPy ---------------------------------------------


def padded(x, size, stride, value):
    """SAME: as many outputs as ceil(inputs / stride), the odd pixel at the end."""
    pads = []
    for side in x.shape[1:3]:
        total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value)


def windows(x, size, stride):
    """[B, H', W', size, size, C]."""
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return view[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def conv(x, layer, stride=1, same=True):
    kernel = np.asarray(layer.kernel[...], np.float64)
    size = kernel.shape[0]
    x = padded(x, size, stride, 0) if same else x
    return np.tensordot(windows(x, size, stride), kernel, 3) + np.asarray(layer.bias[...])


def relu(x):
    return np.maximum(x, 0)


def pool(x):
    return windows(padded(x, 3, 2, -np.inf), 3, 2).max((3, 4))


def dense(x, layers):
    x = x.reshape(len(x), -1)
    for i, layer in enumerate(layers):
        x = (relu(x) if i else x) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    return x


def assert_follows(compute, name, image_shape, **options):
    """Compares a network's logits with ``compute(module, images)``, all parameters random."""
    module = abstract(name, image_shape, 5, **options)
    rng = np.random.default_rng(1)

    def draw(leaf):  # biases too: zeros would hide one that is left out
        return jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(leaf.size**0.5), jnp.float32)

    nnx.update(module, jax.tree.map(draw, nnx.state(module, nnx.Param)))
    x = images(image_shape)
    actual = jax.jit(lambda module, x: module(x))(module, x)
    expected = compute(module, x.astype(np.float64))
    assert np.std(expected) > 1e-2  # the test could tell
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


def test_mlp_follows_numpy():
    assert_follows(lambda module, x: dense(x, module.layers), "mlp", (4, 3, 2), hidden=(6, 7))


def test_conv3_follows_numpy():
    def compute(module, x):
        signal = pool(relu(conv(x, module.conv1, same=False)))
        signal = pool(relu(conv(signal, module.conv2, same=False)))
        signal = pool(relu(conv(signal, module.conv3)))
        return dense(signal, module.dense.layers)

    assert_follows(compute, "cifar10_cnn", (17, 14, 3), channels=(4, 5, 6), hidden=(7, 8))


@pytest.mark.parametrize("output_relu", [False, True])
def test_all_cnn_c_follows_numpy(output_relu):
    def compute(module, x):
        signal = x
        for i, layer in enumerate(module.layers, start=1):
            signal = conv(signal, layer, stride=2 if i in (3, 6) else 1, same=i != 7)
            signal = relu(signal) if i < 9 or output_relu else signal
        return signal.mean((1, 2))

    assert_follows(compute, "all_cnn_c", (16, 13, 3), width=4, output_relu=output_relu)


# Initialisation -------------------------------------------------------------------------------

NARROW = {
    "mlp": (DIGITS, {"hidden": (50, 50)}),
    "mlp_small": (DIGITS, {}),
    "cifar10_cnn": ((12, 12, 3), {"channels": (8, 8, 8), "hidden": (16,)}),
    "all_cnn_c": ((12, 12, 8), {"width": 8}),  # few different shapes, as each is compiled
}


def parameters(name, key):
    image_shape, options = NARROW[name]
    module = models.create_model(name, image_shape, 10, nnx.Rngs(key), **options)
    return nnx.state(module, nnx.Param)


# The random bits unroll to long programs: optimising them takes ten times as long as the rest.
jit_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The bits are the same; the normal's inverse may be rounded otherwise when it is fused.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow  # convolutions compile for long under vmap
@pytest.mark.parametrize("name", NARROW)
def test_construction_under_jit_and_vmap(name):
    keys = jax.random.split(jax.random.key(5), 3)
    outside = [parameters(name, key) for key in keys]
    stacked = jit_quickly(jax.vmap(lambda key: parameters(name, key)))(keys)
    for i, expected in enumerate(outside):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), expected)
    first, second = (jax.tree.leaves(state)[-1] for state in outside[:2])
    assert not np.array_equal(first, second)


def test_construction_under_jit_alone():
    key = jax.random.key(6)
    inside = jit_quickly(lambda key: parameters("mlp", key))(key)
    assert_close(inside, parameters("mlp", key))


def test_registry_covers_every_test():
    assert set(NARROW) == set(models.models())


def test_weights_have_the_stated_variance_and_biases_are_zero():
    module = build("mlp", (32, 16, 1), 512, hidden=(512,))
    hidden, output = module.layers
    np.testing.assert_allclose(np.var(hidden.kernel[...]), 2 / 512, rtol=0.02)
    np.testing.assert_allclose(np.var(output.kernel[...]), 1 / 512, rtol=0.02)
    assert not hidden.bias[...].any()
    assert not output.bias[...].any()


@pytest.mark.parametrize("name", ["mlp_small", "cifar10_cnn", "all_cnn_c"])
def test_networks_learn(name):
    image_shape, options = NARROW[name]
    graph, state = nnx.split(build(name, image_shape, 10, **options))
    labels = np.random.default_rng(0).integers(0, 10, 32)
    brightness = (labels / 3 - 1.5).astype(np.float32)
    x = images(image_shape, batch=32) + brightness[:, None, None, None]
    optimizer = optax.adam(3e-3)

    def loss(state):
        logits = nnx.merge(graph, state)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(state, memory):
        value, grads = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(grads, memory, state)
        return optax.apply_updates(state, updates), memory, value, grads

    memory, values = optimizer.init(state), []
    for i in range(60):
        state, memory, value, grads = step(state, memory)
        values.append(float(value))
        if i == 0:  # the signal goes through all layers at its scale, and so does the gradient
            weights = [leaf for leaf in jax.tree.leaves(grads) if leaf.ndim >= 2]
            assert all(1e-2 < jnp.linalg.norm(leaf) < 1e2 for leaf in weights)
    assert values[0] < 2 * math.log(10)
    assert values[-1] < 0.6 * values[0]


# The registry and its refusals ----------------------------------------------------------------


def test_has_convolutions():
    flags = {name: model.has_convolutions for name, model in models.models().items()}
    assert flags == {"mlp": False, "mlp_small": False, "cifar10_cnn": True, "all_cnn_c": True}
    for name, flag in flags.items():
        image_shape, options = NARROW[name]
        module = abstract(name, image_shape, 10, **options)
        assert flag == any(leaf.ndim == 4 for leaf in leaves(module))


def test_unknown_model_gets_suggestions():
    with pytest.raises(ValueError, match=r"name = 'allcnnc' .*did you mean 'all_cnn_c'"):
        build("allcnnc", CIFAR, 10)


def test_unknown_option_gets_suggestions():
    with pytest.raises(TypeError, match=r"widht is not an option of 'all_cnn_c'; .* 'width'"):
        build("all_cnn_c", CIFAR, 10, widht=3)


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "options", "message"),
    [
        ("mlp", (28, 28), 10, {}, r"image_shape = \(28, 28\); accepted: \(H, W, C\)"),
        ("mlp", (28, 28, 0), 10, {}, r"image_shape = \(28, 28, 0\) is too small"),
        ("mlp", (28.0, 28, 1), 10, {}, "image_shape = "),
        ("mlp", None, 10, {}, "image_shape = None"),
        ("mlp", MNIST, 0, {}, r"num_classes = \(0,\); accepted"),
        ("mlp", MNIST, 10, {"hidden": (10, 0)}, r"hidden = \(10, 0\); accepted: integers of 1"),
        ("mlp", MNIST, 10, {"hidden": 10}, "hidden = 10; accepted"),
        ("cifar10_cnn", (8, 8, 3), 10, {}, "too small; .* at least 9"),
        ("cifar10_cnn", CIFAR, 10, {"channels": (1, 2)}, r"channels = \(1, 2\); accepted: 3 int"),
        ("all_cnn_c", (32, 8, 3), 10, {}, "too small; .* at least 9"),
        ("all_cnn_c", CIFAR, 10, {"width": 0}, "width = "),
    ],
)
def test_sizes_are_refused(name, image_shape, num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        abstract(name, image_shape, num_classes, **options)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 64), (2, 9, 12, 3)])
def test_images_of_another_shape_are_refused(name, shape):
    image_shape, options = NARROW[name]
    with pytest.raises(ValueError, match="images has shape"):
        abstract(name, image_shape, 10, **options)(jnp.zeros(shape))


def test_bytes_are_refused():
    with pytest.raises(TypeError, match=r"images is uint8; accepted: floats, normalised"):
        abstract("mlp_small", DIGITS, 10)(jnp.zeros((2, *DIGITS), jnp.uint8))

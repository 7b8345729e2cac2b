"""The networks of the papers' experiments, as Flax NNX modules.

Every network maps float images [B, H, W, C], normalised by the caller, to logits [B, classes].
Weights are drawn He-normal where a ReLU follows (variance 2/fan-in keeps the scale of the signal
through it, so that even the nine convolutions of All-CNN-C train without batch normalisation) and
LeCun-normal in a linear output layer; biases start at zero. The papers do not say how theirs were
drawn. A network is a function of its PRNG key alone and may be built under ``jit`` and ``vmap``:

>>> import jax
>>> from flax import nnx
>>> def parameters(key):
...     return nnx.state(create_model("mlp_small", (8, 8, 1), 10, nnx.Rngs(key)), nnx.Param)
>>> stacked = jax.jit(jax.vmap(parameters))(jax.random.split(jax.random.key(0), 3))
>>> stacked["layers"][0]["kernel"][...].shape
(3, 64, 100)

``models()`` lists them, ``create_model(name, ...)`` builds one.
"""

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from optgrad.core.checks import check_one_of, did_you_mean

ImageShape = tuple[int, int, int]  # (H, W, C)

_BEFORE_RELU = nnx.initializers.he_normal()
_BEFORE_LOGITS = nnx.initializers.lecun_normal()


class MLP(nnx.Module):
    """Fully connected network with ReLU between its layers; images are flattened.

    With 28x28 images, ten classes and the default sizes it is the MNIST network of Balles & Hennig
    (2018), appendix A.1, of 1,336,610 parameters.

    Args:
      image_shape: (H, W, C) of the images.
      num_classes: number of logits.
      rngs: its ``params`` stream draws the weights.
      hidden: units of each hidden layer; none for logistic regression.

    References:
      L. Balles and P. Hennig, Dissecting Adam: The Sign, Magnitude and Variance of Stochastic
      Gradients, ICML 2018, appendix A.1.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (1000, 500, 100),
    ) -> None:
        self.image_shape = _checked_image_shape(image_shape)
        hidden = _checked_sizes("hidden", hidden)
        (num_classes,) = _checked_sizes("num_classes", (num_classes,))
        sizes = (math.prod(self.image_shape), *hidden, num_classes)
        inits = [_BEFORE_RELU] * len(hidden) + [_BEFORE_LOGITS]
        self.layers = nnx.List(
            nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)
            for inputs, outputs, init in zip(sizes[:-1], sizes[1:], inits, strict=True)
        )

    def __call__(self, images: chex.Array) -> chex.Array:
        """Logits [B, classes] of float images [B, H, W, C]."""
        _check_images(images, self.image_shape)
        signal = images.reshape(images.shape[0], -1)
        *hidden, output = self.layers
        for layer in hidden:
            signal = jax.nn.relu(layer(signal))
        return output(signal)


class Conv3(nnx.Module):
    """Three convolutions, each with ReLU and 3x3 max-pooling of stride 2, then three dense layers.

    The CIFAR-10 network of Balles & Hennig (2018), appendix A.1. They do not state the padding;
    it is the one of the authors' later benchmark DeepOBS, where the network is called 3c3d: none
    (VALID) in the first two convolutions, SAME in the third and in the pooling. A 32x32 image
    shrinks to 28, 14, 12, 6, 6 and 3 pixels a side, and with ten classes there are 895,210
    parameters.

    Args:
      image_shape: (H, W, C) of the images; H and W of 9 or more.
      num_classes: number of logits.
      rngs: its ``params`` stream draws the weights.
      channels: filters of the 5x5 and the two 3x3 convolutions.
      hidden: units of each dense layer before the logits.

    References:
      L. Balles and P. Hennig, Dissecting Adam, ICML 2018, appendix A.1.
      F. Schneider, L. Balles and P. Hennig, DeepOBS: A Deep Learning Optimizer Benchmark Suite,
      ICLR 2019 (cifar10_3c3d).
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        channels: Sequence[int] = (64, 96, 128),
        hidden: Sequence[int] = (512, 256),
    ) -> None:
        self.image_shape = _checked_image_shape(image_shape, at_least=9)
        channels = _checked_sizes("channels", channels, length=3)
        height, width, colours = self.image_shape
        conv = functools.partial(nnx.Conv, kernel_init=_BEFORE_RELU, rngs=rngs)
        self.conv1 = conv(colours, channels[0], (5, 5), padding="VALID")
        self.conv2 = conv(channels[0], channels[1], (3, 3), padding="VALID")
        self.conv3 = conv(channels[1], channels[2], (3, 3), padding="SAME")
        pooled = (_conv3_side(height), _conv3_side(width), channels[2])
        self.dense = MLP(pooled, num_classes, rngs=rngs, hidden=hidden)

    def __call__(self, images: chex.Array) -> chex.Array:
        """Logits [B, classes] of float images [B, H, W, C]."""
        _check_images(images, self.image_shape)
        signal = images
        for conv in (self.conv1, self.conv2, self.conv3):
            signal = jax.nn.relu(conv(signal))
            signal = _max_pool(signal)
        return self.dense(signal)


def _max_pool(signal: chex.Array) -> chex.Array:
    """The largest of 3x3 pixels around every second one, [B, H, W, C] to half of H and W."""
    return jax.lax.reduce_window(
        signal, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding="SAME"
    )


def _conv3_side(side: int) -> int:
    """Pixels a side after the last pooling."""
    for lost in (4, 2, 0):  # by the convolutions without padding
        side = math.ceil((side - lost) / 2)
    return side


class AllCNNC(nnx.Module):
    """All-CNN-C: nine convolutions and global average pooling, no other pooling, no dense layer.

    The CIFAR-100 network of Balles & Hennig (2018), appendix A.1:
    96@3x3, 96@3x3, 96@3x3 stride 2, 192@3x3, 192@3x3, 192@3x3 stride 2, 192@3x3, 192@1x1,
    classes@1x1. The seventh has no padding (VALID), as the 6x6 map that the paper averages
    requires; the others have SAME. 1,387,108 parameters with 100 classes, 1,369,738 with ten.

    Springenberg et al. use dropout, 20 % on the input and 50 % after both strides: that is
    ``dropout=(0.2, 0.5)``. It is none by default, as Balles & Hennig do not mention it.

    Deviation. Both papers put ReLU after the last convolution too; that is ``output_relu=True``,
    and not the default, because a class whose map is zero everywhere gets no gradient any more: of
    three short runs of SGD with momentum on CIFAR-10 (``width=24``, step size 0.05, 150 steps of 64
    images) one lost all ten classes, one three and one one, and none did without that ReLU.

    Args:
      image_shape: (H, W, C) of the images; H and W of 9 or more.
      num_classes: number of logits.
      rngs: its ``params`` stream draws the weights.
      width: filters of the first three convolutions; the next five have twice as many. 96 in
        the paper; a small one makes a network for tests.
      output_relu: whether ReLU follows the last convolution too.
      dropout: the rates in [0, 1) at which pixels of the input, and units after the two strides,
        are zeroed in training.

    References:
      J. T. Springenberg, A. Dosovitskiy, T. Brox and M. Riedmiller, Striving for Simplicity: The
      All Convolutional Net, arXiv:1412.6806, 2014, table 1 (All-CNN-C in section 3).
      L. Balles and P. Hennig, Dissecting Adam, ICML 2018, appendix A.1.
    """

    _LAYERS: ClassVar = (  # kernel, stride, padding
        *[((3, 3), 1, "SAME"), ((3, 3), 1, "SAME"), ((3, 3), 2, "SAME")],
        *[((3, 3), 1, "SAME"), ((3, 3), 1, "SAME"), ((3, 3), 2, "SAME")],
        *[((3, 3), 1, "VALID"), ((1, 1), 1, "SAME"), ((1, 1), 1, "SAME")],
    )
    _STRIDES: ClassVar = (3, 6)  # the layers of stride 2, counted from 1

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        width: int = 96,
        output_relu: bool = False,
        dropout: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.image_shape = _checked_image_shape(image_shape, at_least=9)
        (width,) = _checked_sizes("width", (width,))
        (num_classes,) = _checked_sizes("num_classes", (num_classes,))
        self.output_relu = output_relu
        self.dropout = _checked_dropout(dropout)
        outputs = [width] * 3 + [2 * width] * 5 + [num_classes]
        inputs = [self.image_shape[-1], *outputs[:-1]]
        inits = [_BEFORE_RELU] * 8 + [_BEFORE_RELU if output_relu else _BEFORE_LOGITS]
        self.layers = nnx.List(
            nnx.Conv(n_in, n_out, kernel, stride, padding=padding, kernel_init=init, rngs=rngs)
            for n_in, n_out, init, (kernel, stride, padding) in zip(
                inputs, outputs, inits, self._LAYERS, strict=True
            )
        )

    def __call__(self, images: chex.Array, keys: chex.PRNGKey | None = None) -> chex.Array:
        """Logits [B, classes] of float images [B, H, W, C].

        Args:
          images: normalised.
          keys: PRNG keys [B] of the images' dropout; without them nothing is dropped.
        """
        _check_images(images, self.image_shape)
        on_input, after_stride = self.dropout
        signal = _dropped_out(images, keys, on_input, place=0)
        *hidden, output = self.layers
        for place, layer in enumerate(hidden, start=1):
            signal = jax.nn.relu(layer(signal))
            if place in self._STRIDES:
                signal = _dropped_out(signal, keys, after_stride, place)
        signal = output(signal)
        if self.output_relu:
            signal = jax.nn.relu(signal)
        return jnp.mean(signal, axis=(1, 2))


def _dropped_out(
    signal: chex.Array, keys: chex.PRNGKey | None, rate: float, place: int
) -> chex.Array:
    """The signal [B, ...] with units zeroed at a rate and the others scaled to the same mean.

    Each example has a key of its own, so that its mask is the same alone and within a batch.
    """
    if keys is None or not rate:
        return signal

    def kept(key: chex.PRNGKey) -> chex.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, signal.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), signal / (1 - rate), 0.0).astype(signal.dtype)


# The checks -----------------------------------------------------------------------------------


def _checked_image_shape(image_shape: Any, at_least: int = 1) -> ImageShape:
    """The shape as a tuple of three Python integers, H and W of ``at_least`` pixels."""
    accepted = f"accepted: (H, W, C), integers with H and W of at least {at_least} and C of 1"
    try:
        height, width, channels = map(operator.index, image_shape)
    except (TypeError, ValueError):
        raise ValueError(f"image_shape = {image_shape!r}; {accepted}") from None
    if min(height, width) < at_least or channels < 1:
        raise ValueError(f"image_shape = {image_shape!r} is too small; {accepted}")
    return height, width, channels


def _checked_sizes(name: str, sizes: Any, length: int | None = None) -> tuple[int, ...]:
    """The sizes as Python integers of at least 1, ``length`` of them."""
    try:
        checked = tuple(map(operator.index, sizes))
    except TypeError:
        checked = (0,)
    if any(size < 1 for size in checked) or length not in (None, len(checked)):
        many = "integers" if length is None else f"{length} integers"
        raise ValueError(f"{name} = {sizes!r}; accepted: {many} of 1 or more")
    return checked


def _checked_dropout(dropout: Any) -> tuple[float, float]:
    """Two rates in [0, 1)."""
    try:
        on_input, after_stride = (float(rate) for rate in dropout)
    except (TypeError, ValueError):
        on_input = math.nan
    if not (0 <= on_input < 1 and 0 <= after_stride < 1):
        raise ValueError(
            f"dropout = {dropout!r}; accepted: two rates in [0, 1), on the input and after the "
            "strides, such as (0.2, 0.5)"
        )
    return on_input, after_stride


def _check_images(images: chex.Array, image_shape: ImageShape) -> None:
    if images.shape[1:] != image_shape or images.ndim != 4:
        raise ValueError(
            f"images has shape {images.shape}; accepted: "
            f"[B, {', '.join(map(str, image_shape))}] (one image: images[None])"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images is {images.dtype}; accepted: floats, normalised with the data set's mean, std"
        )


# The registry ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network of the registry.

    Attributes:
      name: what ``create_model`` calls it.
      factory: the module's class, called with (image_shape, num_classes, rngs=..., **options).
      title: one line for tables and menus.
      has_convolutions: whether it convolves. XLA's CPU backend runs convolutions inside a compiled
        loop (``scan``, ``while_loop``) 25 to 35 times slower than outside of one.
      options: keyword arguments in place of the factory's defaults.
    """

    name: str
    factory: type[Any]
    title: str
    has_convolutions: bool
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def accepted_options(self) -> tuple[str, ...]:
        """Names of the keyword arguments that ``create_model`` passes on."""
        # Of __init__, because the signature of a module's class is that of nnx's metaclass.
        parameters = inspect.signature(self.factory.__init__).parameters
        return tuple(name for name in parameters if name not in _COMMON_ARGUMENTS)


_COMMON_ARGUMENTS = ("self", "image_shape", "num_classes", "rngs")
_MODELS = {
    architecture.name: architecture
    for architecture in (
        Architecture("mlp", MLP, "784-1000-500-100 ReLU network for MNIST", False),
        Architecture(
            "mlp_small",
            MLP,
            "100-50 ReLU network for 8x8 digits",
            False,
            {"hidden": (100, 50)},
        ),
        Architecture("cifar10_cnn", Conv3, "three convolutions, three dense layers", True),
        Architecture("all_cnn_c", AllCNNC, "All-CNN-C, nine convolutions", True),
    )
}


def models() -> dict[str, Architecture]:
    """All networks by name.

    Examples:
      >>> [name for name, model in models().items() if not model.has_convolutions]
      ['mlp', 'mlp_small']
    """
    return dict(_MODELS)


def create_model(
    name: str, image_shape: ImageShape, num_classes: int, rngs: nnx.Rngs, **options: Any
) -> nnx.Module:
    """Builds a network, with float32 parameters.

    Args:
      name: one of ``models()``.
      image_shape: (H, W, C) of the images.
      num_classes: number of logits.
      rngs: draws the weights; ``nnx.Rngs(key)``, where the key may be traced.
      **options: further arguments of the network's class, such as ``hidden=(32,)`` or ``width=8``.

    Returns:
      A module that maps float images [B, H, W, C] to logits [B, num_classes].

    Raises:
      ValueError: for an unknown name (the message suggests the nearest) or a size that is none.
      TypeError: for an unknown option.

    Examples:
      >>> count_parameters(create_model("mlp", (28, 28, 1), 10, nnx.Rngs(0)))
      1336610
    """
    check_one_of("name", name, _MODELS)
    architecture = _MODELS[name]
    for option in options:
        if option not in architecture.accepted_options:
            hint = did_you_mean(option, architecture.accepted_options)
            raise TypeError(f"{option} is not an option of {name!r}; {hint}")
    options = {**architecture.options, **options}
    module: nnx.Module = architecture.factory(image_shape, num_classes, rngs=rngs, **options)
    return module


def count_parameters(module: nnx.Module) -> int:
    """Number of trainable scalars, weights and biases.

    Examples:
      >>> count_parameters(MLP((2, 2, 1), 3, rngs=nnx.Rngs(0), hidden=()))  # 4·3 + 3
      15
    """
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

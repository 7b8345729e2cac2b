"""Zeros added to the outputs of a model's layers, so that gradients by these can be taken.

The contract is ``apply(params, inputs, taps) -> (outputs, activations)``: it adds ``taps[path]`` to
the pre-activations of each layer that it knows and returns these layers' inputs by path,
[n, *positions, in]. Flax is looked up among the modules that are
imported already: a model of it cannot exist otherwise.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

_USE = " @"  # separates a layer's path from the number of its use
TappedApply = Callable[[Any, Any, Mapping[str, Any]], tuple[Any, dict[str, chex.Array]]]


def zeros(apply: TappedApply, params: Any, inputs: Any) -> dict[str, chex.Array]:
    """A zero for every layer that ``apply`` taps, found by running it on shapes alone."""
    shapes = _Shapes()

    def abstract(params: Any, inputs: Any) -> dict[str, chex.Array]:
        return apply(params, inputs, shapes)[1]

    activations = jax.eval_shape(abstract, params, inputs)
    if activations.keys() != shapes.keys():
        raise ValueError(
            f"apply returned activations of {sorted(activations)} and added taps to the outputs of "
            f"{sorted(shapes)} (outputs + taps[path]); accepted: the same layers"
        )
    for path, shape in shapes.items():
        if activations[path].shape[:-1] != shape.shape[:-1]:
            raise ValueError(
                f"activations[{path!r}] have the shape {activations[path].shape} and the outputs "
                f"{shape.shape}; accepted: the same axes but for the last, the batch first"
            )
    return {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.items()}


class _Shapes(dict[str, Any]):
    """Taps that only notice what they are added to."""

    def __missing__(self, path: str) -> "_Shape":
        return _Shape(self, path)


class _Shape:
    """One of them: adding it to an array changes nothing."""

    __array_ufunc__ = None  # NumPy arrays leave the addition to it

    def __init__(self, shapes: _Shapes, path: str) -> None:
        self._shapes, self._path = shapes, path

    def __add__(self, outputs: Any) -> chex.Array:
        array: chex.Array = jnp.asarray(outputs)
        self._shapes[self._path] = jax.eval_shape(lambda: array)
        return array

    __radd__ = __add__


# --- models of Flax -----------------------------------------------------------------------------


def tapped(model: Any) -> TappedApply:
    """The tapped function of a Linen module, an NNX module or graph definition, or as it is.

    Raises:
      TypeError: for what is neither of them and cannot be called.
    """
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    if linen is not None and isinstance(model, linen.Module):
        return tapped_linen(lambda params, inputs: model.apply(_variables(params), inputs))
    if nnx is not None and isinstance(model, nnx.GraphDef):
        return tapped_nnx(lambda params: nnx.merge(model, params))
    if nnx is not None and isinstance(model, nnx.Module):
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        return tapped_nnx(lambda params: nnx.merge(graph, params, rest))
    if not callable(model):
        raise TypeError(
            f"model = {model!r}; accepted: a Flax module, or a function "
            "(params, inputs, taps) -> (outputs, activations)"
        )
    function: TappedApply = model
    return function


def _variables(params: Any) -> Any:
    """What `apply` of a Linen module takes: all variables, or the parameters alone."""
    is_whole = isinstance(params, Mapping) and "params" in params
    return params if is_whole else {"params": params}


def tapped_linen(apply: Callable[[Any, Any], Any]) -> TappedApply:
    """The tapped function of a Linen model, for models that take more than parameters and inputs.

    Layers inside of lifted transformations (``nn.scan``, ``nn.remat``) cannot be tapped.

    Args:
      apply: (params, inputs) -> outputs, such as
        ``lambda params, x: module.apply({"params": params, "batch_stats": averages}, x)``.
    """
    import flax.linen as nn  # noqa: PLC0415  only where a Linen model exists

    def tapped_apply(
        params: Any, inputs: Any, taps: Mapping[str, Any]
    ) -> tuple[Any, dict[str, chex.Array]]:
        uses = _Uses(inputs, taps)
        prefix = ("params",) if _variables(params) is params else ()

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            outputs = call(*args, **kwargs)
            layer = context.module
            if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.Conv):
                return outputs
            seen = args[0] if args else kwargs["inputs"]
            return uses.tap((*prefix, *layer.path), layer, seen, outputs)

        with nn.intercept_methods(intercept):
            outputs = apply(params, inputs)
        return outputs, uses.activations

    return tapped_apply


def tapped_nnx(
    build: Callable[[Any], Any], call: Callable[[Any, Any], Any] = lambda model, x: model(x)
) -> TappedApply:
    """The tapped function of an NNX model, for models that are built or called in another way.

    Layers inside of lifted transformations (``nnx.scan``, ``nnx.remat``) cannot be tapped.

    Args:
      build: params -> a new model that holds them, such as
        ``lambda params: nnx.merge(graph, params, rest)``.
      call: (model, inputs) -> outputs.
    """
    from flax import nnx  # noqa: PLC0415  only where an NNX model exists

    def tapped_apply(
        params: Any, inputs: Any, taps: Mapping[str, Any]
    ) -> tuple[Any, dict[str, chex.Array]]:
        uses = _Uses(inputs, taps)
        model = build(params)
        layers = [
            (path, layer)
            for path, layer in nnx.iter_graph(model)
            if isinstance(layer, nnx.Linear | nnx.Conv)
        ]
        with contextlib.ExitStack() as stack:
            for path, layer in layers:
                stack.enter_context(_tapped_layer(path, layer, uses))
            outputs = call(model, inputs)
        return outputs, uses.activations

    return tapped_apply


@contextlib.contextmanager
def _tapped_layer(path: Any, layer: Any, uses: "_Uses") -> Iterator[None]:
    """Within it, calls of this one object pass through ``uses``.

    Python looks special methods up on the class: the object gets a subclass of its own.
    """
    original = type(layer)

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return uses.tap(path, self, inputs, original.__call__(self, inputs, *args, **kwargs))

    metaclass: Any = type(original)
    subclass = metaclass(original.__name__, (original,), {"__call__": call})
    object.__setattr__(layer, "__class__", subclass)
    try:
        yield
    finally:
        object.__setattr__(layer, "__class__", original)


class _Uses:
    """The layers' inputs and taps during one forward pass."""

    def __init__(self, inputs: Any, taps: Mapping[str, Any]) -> None:
        self._size = jax.tree.leaves(inputs)[0].shape[0]
        self._taps = taps
        self.activations: dict[str, chex.Array] = {}  # by path; of later uses by `layer_of`

    def tap(self, path: tuple[Any, ...], layer: Any, inputs: Any, outputs: Any) -> Any:
        """The outputs of a layer, with its tap added."""
        if not _is_supported(layer, inputs, self._size):
            return outputs
        seen = patches(layer, inputs) if hasattr(layer, "kernel_size") else jnp.asarray(inputs)
        name = "/".join(map(str, path))
        use = sum(name == layer_of(other) for other in self.activations)
        name += f"{_USE}{use + 1}" if use else ""
        self.activations[name] = seen
        return outputs + self._taps[name]


def layer_of(name: str) -> str:
    """The path of the layer of a tap: a layer that is called again has several."""
    return name.partition(_USE)[0]


def _is_supported(layer: Any, inputs: Any, size: int) -> bool:
    """Whether its parameters' gradient is a sum of outer products over positions."""
    shape = jnp.shape(inputs)
    if len(shape) < 2 or shape[0] != size:
        return False
    if not hasattr(layer, "kernel_size"):
        return True
    kernel: Any = layer.kernel_size  # an integer is a 1-d kernel
    is_image = not isinstance(kernel, int) and len(kernel) == 2 and len(shape) == 4
    return is_image and layer.feature_group_count == 1 and layer.mask is None


def patches(layer: Any, images: chex.Array) -> chex.Array:
    """What the kernel of a 2-d convolution is applied to, [n, h', w', kh·kw·cin].

    Linen and NNX name a convolution's geometry alike.

    Args:
      layer: an ``nn.Conv`` or ``nnx.Conv``.
      images: [n, h, w, cin].
    """
    sizes = _sizes(layer.kernel_size)
    dilation = _sizes(layer.kernel_dilation)
    padding = layer.padding
    if padding in ("CIRCULAR", "REFLECT"):
        spans = [(k - 1) * d + 1 for k, d in zip(sizes, dilation, strict=True)]
        around = [(0, 0), *(((s - 1) // 2, s // 2) for s in spans), (0, 0)]
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        images, padding = jnp.pad(images, around, mode=mode), "VALID"
    elif not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in _sizes(padding)]
    # Copies, by a convolution with unit kernels: its products must not be rounded.
    found = jax.lax.conv_general_dilated_patches(
        images,
        sizes,
        _sizes(layer.strides),
        padding,
        lhs_dilation=_sizes(layer.input_dilation),
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    channels_last = found.reshape(*found.shape[:-1], images.shape[-1], math.prod(sizes))
    return jnp.swapaxes(channels_last, -1, -2).reshape(found.shape)


def _sizes(value: Any) -> tuple[Any, ...]:
    """One for each of the two axes; None is 1."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * 2
    return tuple(value)

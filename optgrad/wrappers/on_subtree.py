"""A method that needs functions of the parameters, on a part of them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import transforms

Mask = Any  # a tree of bools, a prefix of the parameters', or params -> such a tree

FUNCTIONS = ("value_fn", "outputs_fn", "residual_fn", "curvature_fn", "inner_fn")
TREES = ("grad", "per_example_grads", "gradient_variance", "curvature_diagonal", "features")


class OnSubtreeState(NamedTuple):
    """The states of the two parts' transformations."""

    inner: Any  # of the method, on the part
    rest: Any  # of the transformation of all other parameters, () without one


def on_subtree(
    tx: optax.GradientTransformation,
    mask: Mask,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a method to a part of the parameters, as if they were all there are.

    .. math::
      \theta = (\theta_1, \theta_2), \qquad
      f_1(\vartheta) = f(\vartheta, \theta_2), \qquad
      \theta_1 \leftarrow \theta_1 + \text{tx}(\nabla f_1, f_1)

    with all other parameters θ₂ held at their current values within the step, and left as they are
    or handed to ``rest``. `optax.masked` and `optax.partition` do this for methods that need
    gradients alone. They hand the functions on as they are, so that a ``value_fn`` of all
    parameters is called with a tree that lacks some, which fails. Here

    - the functions of the parameters (``value_fn``, ``outputs_fn``, ``residual_fn``,
      ``curvature_fn``, ``inner_fn``) become functions of the part,
    - trees like the parameters (``grad``, ``per_example_grads``, ``gradient_variance``,
      ``curvature_diagonal``, ``features``, and any other extra argument of the parameters' own
      structure, unless that is a single leaf) are cut,
    - ``kfac_stats`` keep the layers whose kernel is in the part,
    - every other argument is handed on as it is.

    Args:
      tx: the method. Where the mask is False it finds `optax.MaskedNode`, which has no leaves.
      mask: a tree of bools that is a prefix of the parameters' tree, or a function of the
        parameters that returns one. The function is called with tracers, under ``jit``: it may
        look at paths, shapes and types.
      rest: the transformation of all parameters where the mask is False, with the same extra
        arguments cut to these; None leaves them as they are. Both see the same point: a method
        that tries its step compares losses with θ₂ held, and the sum of two steps may increase the
        loss that neither increases.

    Returns:
      A `GradientTransformationExtraArgs`. Functions need the parameters: ``update`` refuses them
      without ``params``.

    Raises:
      ValueError: if the mask does not fit the parameters.
      TypeError: if it holds something else than bools.

    Examples:
      The weights by L-BFGS, the bias held:

      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda p: jnp.sum((p["weights"] - p["bias"]) ** 2)
      >>> params = {"weights": jnp.array([3.0, -1.0]), "bias": jnp.array(2.0)}
      >>> optimizer = optgrad.on_subtree(
      ...     optgrad.create("lbfgs"), {"weights": True, "bias": False})
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     value, grad = jax.value_and_grad(loss)(params)
      ...     updates, state = optimizer.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["weights"].round(3), params["bias"])
      [2. 2.] 2.0
    """
    if not callable(mask):
        _check_bools(mask)
    tx = optax.with_extra_args_support(tx)
    other = None if rest is None else optax.with_extra_args_support(rest)

    def init(params: optax.Params) -> OnSubtreeState:
        chosen = _full_mask(mask, params)
        return OnSubtreeState(
            tx.init(_cut(chosen, params)),
            () if other is None else other.init(_cut(_inverse(chosen), params)),
        )

    def update(
        updates: optax.Updates,
        state: OnSubtreeState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OnSubtreeState]:
        chosen = _full_mask(mask, updates if params is None else params)
        given = _Given(updates, params, extra)
        inner, inner_state = given.update_of_part(tx, chosen, state.inner)
        left, left_state = jax.tree.map(jnp.zeros_like, updates), state.rest
        if other is not None:
            left, left_state = given.update_of_part(other, _inverse(chosen), state.rest)
        return _merge(chosen, inner, left), OnSubtreeState(inner_state, left_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Given(NamedTuple):
    """What ``update`` is called with."""

    updates: optax.Updates
    params: optax.Params | None
    extra: dict[str, Any]

    def update_of_part(
        self, tx: optax.GradientTransformationExtraArgs, mask: Any, state: Any
    ) -> tuple[optax.Updates, Any]:
        """The update of the parameters where the mask is True."""
        extra = {name: self._restricted(mask, name, value) for name, value in self.extra.items()}
        params = None if self.params is None else _cut(mask, self.params)
        found: tuple[optax.Updates, Any] = tx.update(
            _cut(mask, self.updates), state, params, **extra
        )
        return found

    def _restricted(self, mask: Any, name: str, value: Any) -> Any:
        """One extra argument as the part sees it."""
        if value is None:
            return None
        if name in FUNCTIONS and callable(value):
            return _function_of_part(mask, value, transforms.require_params(self.params))
        if name == "kfac_stats":
            return _cut_layers(mask, value)
        structure: Any = jax.tree.structure(self.updates)
        several = structure != jax.tree.structure(0.0)  # a lone array has any scalar's structure
        if name in TREES or (several and jax.tree.structure(value) == structure):
            return _cut(mask, value)
        return value


def _function_of_part(
    mask: Any, function: Callable[..., Any], params: optax.Params
) -> Callable[..., Any]:
    @functools.wraps(function)  # optax's line searches look for the names of its arguments
    def of_part(part: Any, *args: Any, **kwargs: Any) -> Any:
        return function(_merge(mask, part, params), *args, **kwargs)

    return of_part


# Masks --------------------------------------------------------------------------------------


def _full_mask(mask: Mask, params: chex.ArrayTree) -> Any:
    """A bool for every leaf of the parameters."""
    prefix = mask
    if callable(mask):
        prefix = mask(params)
        _check_bools(prefix)
    try:
        return jax.tree.map(
            lambda chosen, subtree: jax.tree.map(lambda _: bool(chosen), subtree), prefix, params
        )
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"mask does not fit the parameters: {reason}; accepted: a tree of bools that is a "
            f"prefix of the parameters' {jax.tree.structure(params)}, or a function of the "
            "parameters that returns one"
        ) from error


def _check_bools(mask: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(mask)[0]:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"mask{jax.tree_util.keystr(path)} = {leaf!r}; accepted: bools, known before "
                "tracing, or one function of the parameters for the whole tree"
            )


def _inverse(mask: Any) -> Any:
    return jax.tree.map(lambda chosen: not chosen, mask)


def _cut(mask: Any, tree: Any) -> Any:
    """The tree with `optax.MaskedNode` where the mask is False."""
    return jax.tree.map(lambda chosen, x: x if chosen else optax.MaskedNode(), mask, tree)


def _cut_layers(mask: Any, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The layers, by path, whose kernel is where the mask is True."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") + "/"
        for path, chosen in jax.tree_util.tree_flatten_with_path(mask)[0]
        if chosen
    ]
    return {
        layer: found
        for layer, found in statistics.items()
        if any(path.startswith(f"{layer}/kernel/".lstrip("/")) for path in paths)
    }


def _merge(mask: Any, part: Any, other: Any) -> Any:
    """The part where the mask is True, the other tree elsewhere."""
    return jax.tree.map(lambda chosen, x, y: x if chosen else y, mask, part, other)

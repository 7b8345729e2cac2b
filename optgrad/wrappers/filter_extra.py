"""Which extra arguments reach a transformation."""

from collections.abc import Sequence
from typing import Any

import optax


def filter_extra(
    tx: optax.GradientTransformation, names: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """The transformation ``tx``, which sees only those extra arguments that ``names`` lists.

    Within a chain every element is handed all extra arguments. Most ignore what is not theirs, but
    optax's line searches (optax 0.2.8) raise a `TypeError` on each argument that ``value_fn`` does
    not name, so that a line search in one chain with a curvature method needs this.

    Args:
      tx: the transformation.
      names: of the extra arguments that are passed on, if they are given.

    Returns:
      A `GradientTransformationExtraArgs` with the state of ``tx``.

    Raises:
      TypeError: if ``names`` is a string, or holds something else than strings.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> search = optax.scale_by_backtracking_linesearch(20)
      >>> names = ("value", "grad", "value_fn")
      >>> optimizer = optax.chain(optax.scale(-1.0), optgrad.filter_extra(search, names))
      >>> loss = lambda x: jnp.sum(x**4)
      >>> params = jnp.array([2.0])
      >>> value, grad = jax.value_and_grad(loss)(params)
      >>> updates, _ = optimizer.update(
      ...     grad, optimizer.init(params), params, value=value, grad=grad, value_fn=loss,
      ...     residual_fn=jnp.square)
      >>> bool(loss(params + updates) < value)
      True
    """
    if isinstance(names, str):
        raise TypeError(f"names = {names!r} is a string; accepted: a tuple of names")
    passed = frozenset(names)
    if others := [name for name in passed if not isinstance(name, str)]:
        raise TypeError(f"names = {tuple(names)!r} holds {others[0]!r}; accepted: strings")
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        kept = {name: value for name, value in extra.items() if name in passed}
        found: tuple[optax.Updates, optax.OptState] = tx.update(updates, state, params, **kept)
        return found

    return optax.GradientTransformationExtraArgs(tx.init, update)

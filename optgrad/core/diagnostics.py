"""What the optimizers model, read from their states."""

from typing import Any

import chex
import jax


def diagnostics(state: Any) -> dict[str, chex.Array]:
    """Modelled curvature, step sizes, confidence … of every optgrad method within a state.

    A method's state that models something has a ``diagnostics()`` of its own, which documents the
    entries; this collects them from any optax state (a chain's, an injected one, a `MultiSteps`').
    All entries are arrays of a shape fixed by the method, most of them scalars, computed from the
    state alone, without host callbacks: return them from the body of a `jax.lax.scan` to record
    them at every step.

    Args:
      state: any optimizer state.

    Returns:
      The entries by name; where several states have an entry of the same name, the second and
      further ones are numbered ``name_2``, ``name_3`` … Empty for methods that model nothing.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optax.chain(optgrad.adaptive_sgd(), optax.scale(1.0))
      >>> sorted(optgrad.diagnostics(optimizer.init(jnp.zeros(3))))[:1]
      ['step_size_geomean']
    """
    found: dict[str, chex.Array] = {}
    for leaf in jax.tree.leaves(state, is_leaf=_is_model):
        if not _is_model(leaf):
            continue
        for name, value in leaf.diagnostics().items():
            number = 2
            key = name
            while key in found:
                key, number = f"{name}_{number}", number + 1
            found[key] = value
    return found


def _is_model(state: Any) -> bool:
    return callable(getattr(state, "diagnostics", None))

"""What the rules with one step size per coordinate share."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import diagnostics, leafwise, trees


def curvature(
    gradient: optax.Updates,
    curvature_diagonal: optax.Updates | None,
    features: optax.Updates | None = None,
    accepted: str = "curvature_diagonal",
) -> optax.Updates:
    """The curvature of every coordinate, a tree like the gradient, in at least float32.

    Args:
      gradient: decides structure and shapes.
      curvature_diagonal: diagonal of a Hessian or Gauss–Newton matrix; preferred if both are given.
      features: inputs of a linear model, whose squares are its curvature.
      accepted: names of what may be given, for the message.

    Raises:
      ValueError: if neither is given, or shapes do not fit the gradient.
    """
    if curvature_diagonal is not None:
        check_like("curvature_diagonal", curvature_diagonal, gradient)
        return leafwise.tree_map(trees.wide, curvature_diagonal)
    if features is not None:
        check_like("features", features, gradient)
        return leafwise.tree_map(lambda x: jnp.square(trees.wide(x)), features)
    raise ValueError(
        f"update needs the extra argument {accepted}, got none; accepted: a tree like the "
        "gradient (optgrad.gauss_newton_diagonal computes curvature_diagonal)"
    )


def check_like(
    name: str, tree: chex.ArrayTree, gradient: optax.Updates, *, batched: bool = False
) -> None:
    """Raises unless a tree has the gradient's structure and shapes.

    Args:
      name: of the argument, for the message.
      tree: what was given.
      gradient: decides structure and shapes.
      batched: whether each leaf has a batch axis in front.

    Raises:
      ValueError: where it has not; the message names the argument and what is accepted.
    """
    found, wanted = str(jax.tree.structure(tree)), str(jax.tree.structure(gradient))
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    expected = [jnp.shape(x) for x in jax.tree.leaves(gradient)]
    if found != wanted or [shape[batched:] for shape in shapes] != expected:
        raise ValueError(
            f"{name} has leaves of shapes {shapes[:4]} in {found}; accepted: the structure of the "
            f"gradient, {wanted}, with leaves of shapes {expected[:4]}"
            + (", each with a leading batch axis" if batched else "")
        )


def summarize(name: str, tree: Any) -> dict[str, chex.Array]:
    """Geometric mean, minimum and maximum of the positive entries of a tree, zeros if none is.

    Returns:
      ``<name>_geomean``, ``<name>_min``, ``<name>_max``, scalars.
    """
    return {f"{name}_{k}": x for k, x in diagnostics.summarize(tree)._asdict().items()}

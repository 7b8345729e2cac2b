"""The parameter trees on which a step is measured."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optgrad.core import checks
from optgrad.experiments.bench import networks

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Parameters by their shapes.

    Attributes:
      name: for the command line.
      title: one line for tables.
      shapes: () -> name of a leaf -> shape.
    """

    name: str
    title: str
    shapes: Callable[[], Shapes]


def equal_leaves(leaves: int, size: int) -> Shapes:
    """So many vectors of one size.

    Examples:
      >>> equal_leaves(2, 5)
      {'leaf_000': (5,), 'leaf_001': (5,)}
    """
    return {f"leaf_{i:03d}": (size,) for i in range(leaves)}


def _of_network(network: type[nnx.Module]) -> Shapes:
    abstract = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))  # type: ignore[call-arg]
    params = nnx.state(abstract, nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


_TREES = {
    tree.name: tree
    for tree in (
        Tree("one", "one leaf of 10,000,000", lambda: equal_leaves(1, 10_000_000)),
        Tree("hundred", "100 leaves of 100,000", lambda: equal_leaves(100, 100_000)),
        Tree("small400", "400 leaves of 1,000", lambda: equal_leaves(400, 1000)),
        Tree("resnet18", "a ResNet-18", lambda: _of_network(networks.ResNet18)),
        Tree("transformer", "a small transformer", lambda: _of_network(networks.Transformer)),
        Tree("few", "4 leaves of 50, for dense methods", lambda: equal_leaves(4, 50)),
    )
}
LARGE = ("one", "hundred")  # 10M parameters: time is memory traffic


def trees() -> dict[str, Tree]:
    """All trees by name.

    Examples:
      >>> list(trees())
      ['one', 'hundred', 'small400', 'resnet18', 'transformer', 'few']
    """
    return dict(_TREES)


def get_tree(name: str) -> Tree:
    """The tree of that name.

    Raises:
      ValueError: for an unknown name.
    """
    checks.check_one_of("tree", name, _TREES)
    return _TREES[name]


def parameters(shapes: Shapes, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Parameters of these shapes: numbers in [−1, 1], none of them 0, different in every leaf.

    Examples:
      >>> parameters({"w": (2, 2)})["w"].tolist()
      [[-1.0, -0.5], [0.5, 1.0]]
    """

    def leaf(index: int, shape: tuple[int, ...]) -> jax.Array:
        size = int(np.prod(shape))
        half = np.linspace(0.5, 1.0, max(size // 2, 1), dtype=np.float32)
        numbers = np.concatenate([-half[::-1], half, [0.75]]).astype(np.float32)[:size]
        return jnp.asarray(np.roll(numbers, index).reshape(shape), dtype)

    return {name: leaf(i, shape) for i, (name, shape) in enumerate(shapes.items())}

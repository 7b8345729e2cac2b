"""A mesh of devices: runs divided among them along one axis, the examples of a batch along another.

Runs have nothing to do with each other, so each device group simply has runs of its own
(`jax.shard_map` over ``runs``: no communication, whatever the method does). Along ``data`` the
compiler divides the work itself: the batch is annotated, parameters and optimizer state are whole
on every device, and what crosses is the sum of the gradients.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from optgrad.core import checks

RUNS, DATA = AXES = ("runs", "data")
PartitionSpec: Any = jax.sharding.PartitionSpec  # untyped in jax


def parse(text: str) -> dict[str, int]:
    """The sizes in ``"runs=4,data=2"``.

    Raises:
      ValueError: naming the part that is not AXIS=SIZE.

    Examples:
      >>> parse("runs=4, data=2")
      {'runs': 4, 'data': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not size.isdecimal() or name in sizes:
            raise ValueError(f"mesh = {text!r}; accepted: AXIS=SIZE,…, such as runs=4,data=2")
        sizes[name] = int(size)
    check_sizes(sizes)
    return sizes


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuses unknown axes and sizes below one.

    Raises:
      TypeError, ValueError: naming the axis, its size and what is accepted.
    """
    for name, size in sizes.items():
        checks.check_one_of("mesh axis", name, AXES)
        checks.check_count(f"mesh {name}", size, 1)


class RunMesh:
    """Devices in a grid of ``runs`` × ``data``.

    Args:
      sizes: axis -> size; an axis that is not named has size 1. Empty: all devices along ``runs``.

    Raises:
      ValueError: if there are fewer devices, or with several processes others.

    Examples:
      >>> mesh = RunMesh({"runs": 1})
      >>> mesh.runs, mesh.data, mesh.padded(3)
      (1, 1, 3)
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        check_sizes(sizes)
        sizes = dict(sizes) or {RUNS: jax.device_count()}
        self.runs, self.data = (sizes.get(name, 1) for name in AXES)
        wanted, there = self.runs * self.data, jax.device_count()
        given = f"mesh = {self}"
        if wanted > there:
            raise ValueError(
                f"{given} needs {wanted} devices, and there are {there}; accepted: a product of at "
                f"most {there} (JAX simulates N devices on a CPU with the environment variable "
                "XLA_FLAGS=--xla_force_host_platform_device_count=N)"
            )
        if jax.process_count() > 1 and wanted < there:
            raise ValueError(
                f"{given} has {wanted} devices, and {jax.process_count()} processes have {there}; "
                f"accepted: a product of {there}, so that every process takes part"
            )
        auto = (jax.sharding.AxisType.Auto,) * 2
        self._mesh = jax.make_mesh(
            (self.runs, self.data), AXES, axis_types=auto, devices=jax.devices()[:wanted]
        )
        self._gathered = jax.jit(lambda tree: tree, out_shardings=self._sharding(PartitionSpec()))

    def __str__(self) -> str:
        return f"{RUNS}={self.runs},{DATA}={self.data}"

    def padded(self, count: int) -> int:
        """The least number of runs, ``count`` or more, that the axis of runs divides."""
        return math.ceil(count / self.runs) * self.runs

    def check_batch(self, batch: Any) -> None:
        """Refuses a batch, given by its shapes, that the axis of examples does not divide.

        Raises:
          ValueError: naming the size of the batch and what is accepted.
        """
        sizes = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(batch)})
        if any(not size or size[0] % self.data for size in sizes):
            found = ", ".join(str(size[0]) if size else "none" for size in sizes)
            raise ValueError(
                f"batch_size: a batch of {found} examples cannot be divided by mesh data = "
                f"{self.data}; accepted: a multiple of {self.data}, or a mesh of runs alone"
            )

    def replicate(self, tree: Any) -> Any:
        """Arrays, equal in all processes, whole on every device."""
        return self._place(tree, PartitionSpec())

    def split(self, tree: Any) -> Any:
        """Arrays, equal in all processes, with their leading axis divided among the runs' axis."""
        return self._place(tree, PartitionSpec(RUNS))

    def gather(self, tree: Any) -> Any:
        """What is divided among devices, of other processes too, whole as NumPy arrays."""
        return jax.tree.map(np.asarray, self._gathered(tree))

    def divide_examples(self, batch: Any) -> Any:
        """Inside a compiled function: the leading axis of every leaf is divided among ``data``."""
        # Inside `compiled` the mesh says that the axis of runs is divided already, and types carry
        # it; jax 0.7 however batches constraints on the mesh as it was made alone.
        context: Any = jax.sharding.get_abstract_mesh()
        constrain: Any = jax.lax.with_sharding_constraint
        for mesh in (self._mesh if context.empty else context, self._mesh):
            sharding = NamedSharding(mesh, PartitionSpec(DATA))
            with contextlib.suppress(NotImplementedError):
                return jax.tree.map(lambda x, at=sharding: constrain(x, at), batch)
        raise NotImplementedError("jax cannot divide a batch among devices here")

    def compiled(
        self,
        function: Callable[..., Any],
        in_axes: Sequence[int | None],
        *,
        together: bool,
        **options: Any,
    ) -> Any:
        """A function of one run, compiled for runs that are divided among the devices.

        Args:
          function: the function.
          in_axes: of each argument, 0 if it has an axis of runs, None if it is common to all.
          together: whether arguments and results really have that axis, or are those of one run.
          **options: of `jax.jit`.
        """
        specs = tuple(PartitionSpec(RUNS) if axis == 0 else PartitionSpec() for axis in in_axes)
        out = PartitionSpec(RUNS)
        if together:
            function = jax.vmap(function, tuple(in_axes))
        else:
            specs, out = (PartitionSpec(),) * len(specs), PartitionSpec()
        divided = jax.shard_map(
            function, mesh=self._mesh, in_specs=specs, out_specs=out, axis_names={RUNS},
            check_vma=False,
        )  # fmt: skip
        return jax.jit(
            divided,
            in_shardings=tuple(map(self._sharding, specs)),
            out_shardings=self._sharding(out),
            **options,
        )

    def _sharding(self, spec: Any) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    def _place(self, tree: Any, spec: Any) -> Any:
        sharding = self._sharding(spec)

        def place(x: Any) -> Any:
            if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
                return jax.device_put(x, sharding)
            whole = np.asarray(x)  # device_put would compare it among processes, and NaN is not NaN
            return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

        return jax.tree.map(place, tree)

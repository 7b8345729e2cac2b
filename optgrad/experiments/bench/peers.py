"""Optimizers of other packages, measured where they are installed: torch, pytorch_optimizer."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from optgrad.experiments.bench import timing, trees

_TORCH: Mapping[str, Mapping[str, Any]] = {
    "Adam (foreach)": {"foreach": True},
    "Adam (fused)": {"fused": True},
}
_PYTORCH_OPTIMIZER = ("AdaBelief", "Lion", "Adan", "Prodigy")


@dataclasses.dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
      name: of the optimizer.
      package: where it is from.
      prepare: shapes and type of the parameters -> one step in place, and the bytes of its state.
    """

    name: str
    package: str
    prepare: Callable[[trees.Shapes, str], tuple[timing.Run, int]]


def installed() -> list[Peer]:
    """Those that can be measured here; none without torch.

    Examples:
      >>> all(peer.package in {"torch", "pytorch_optimizer"} for peer in installed())
      True
    """
    if importlib.util.find_spec("torch") is None:
        return []
    found = [
        Peer(name, "torch", _preparation("torch.optim", "Adam", options))
        for name, options in _TORCH.items()
    ]
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        import pytorch_optimizer  # type: ignore[import-not-found]  # noqa: PLC0415

        found += [
            Peer(name, "pytorch_optimizer", _preparation("pytorch_optimizer", name, {}))
            for name in _PYTORCH_OPTIMIZER
            if hasattr(pytorch_optimizer, name)
        ]
    return found


def _preparation(
    module: str, name: str, options: Mapping[str, Any]
) -> Callable[[trees.Shapes, str], tuple[timing.Run, int]]:
    def prepare(shapes: trees.Shapes, dtype: str) -> tuple[timing.Run, int]:
        import torch  # type: ignore[import-not-found]  # noqa: PLC0415

        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = {"dtype": getattr(torch, dtype), "device": device}
        params = [
            torch.linspace(0.5, 1.0, math.prod(s), **kind).reshape(s).requires_grad_()
            for s in shapes.values()
        ]
        for p in params:
            p.grad = 0.1 * p.detach()
        optimizer = getattr(importlib.import_module(module), name)(params, lr=1e-3, **options)

        def run() -> None:
            optimizer.step()
            if device == "cuda":  # jax waits for its own arrays only
                torch.cuda.synchronize()

        run()
        state = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
        return run, sum(x.numel() * x.element_size() for x in state)

    return prepare

"""``optgrad bench compile``: what compiling a step takes, and what XLA makes of it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optgrad import registry
from optgrad.experiments.bench import programs, step, trees

LEAF = 1000  # entries: the time to compile does not depend on them


@dataclasses.dataclass(frozen=True)
class CompileCost:
    """A row: one method on so many leaves.

    Attributes:
      method: its name.
      kind: see `programs.StepProgram.kind`.
      leaves: of `LEAF` entries each.
      seconds: of tracing, lowering and compiling.
      ratio: to ``optax.adam``, compiled right before it.
      instructions: of the optimised program.
      instruction_ratio: to Adam's; unlike the seconds the same on every machine.
      fusions: of the optimised program.
      accessed_ratio: of the bytes that its loops read and write, to those of Adam's; see
        `programs.accessed_bytes`.
      copies: of a leaf.
      temp_share: bytes of temporaries over those of the parameters.
      reused_share: bytes of donated buffers that results are written to, over those of parameters
        and state.
    """

    method: str
    kind: str
    leaves: int
    seconds: float
    ratio: float
    instructions: int
    instruction_ratio: float
    fusions: int
    accessed_ratio: float
    copies: int
    temp_share: float
    reused_share: float


def costs(
    methods: Sequence[registry.Method],
    leaves: int,
    *,
    saving_memory: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[CompileCost]:
    """The rows of one table, one after the other; dense methods are left out, with a note.

    Args:
      methods: records.
      leaves: how many.
      saving_memory: see `programs.compiled_with_counts`.
      on_note: told what is left out, and why.
    """
    params = trees.parameters(trees.equal_leaves(leaves, LEAF))
    programs.compiled_with_counts(_adam(params), saving_memory=saving_memory)  # what jax sets up
    for method in methods:
        if reason := step.fitting(method, step.Setting("hundred")):
            on_note(f"{method.name}: {reason}")
            continue
        program = programs.StepProgram(method, params)
        adam = programs.compiled_with_counts(_adam(params), saving_memory=saving_memory)[1]
        counts = programs.compiled_with_counts(program, saving_memory=saving_memory)[1]
        yield CompileCost(
            method=method.name,
            kind=program.kind,
            leaves=leaves,
            seconds=counts.seconds,
            ratio=counts.seconds / adam.seconds,
            instructions=counts.instructions,
            instruction_ratio=counts.instructions / adam.instructions,
            fusions=counts.fusions,
            accessed_ratio=counts.accessed_bytes / adam.accessed_bytes,
            copies=counts.copies,
            temp_share=counts.temp_bytes / counts.param_bytes,
            reused_share=counts.alias_bytes / (counts.param_bytes + counts.state_bytes),
        )


def _adam(params: Any) -> programs.StepProgram:
    return programs.StepProgram(registry.get_method(step.REFERENCE), params)


HEADER = (
    "method", "kind", "leaves", "seconds", "× Adam", "instructions", "× Adam's", "fusions",
    "bytes accessed × Adam", "copies", "temporaries / parameters", "reused",
)  # fmt: skip
SHOWN = (0, 3, 4, 5, 6, 9)  # on a terminal of 80 columns


def cells(cost: CompileCost) -> list[str]:
    """A row as text, under `HEADER`."""
    return [
        cost.method,
        cost.kind,
        str(cost.leaves),
        f"{cost.seconds:.2f}",
        f"{cost.ratio:.2f}",
        f"{cost.instructions:,}",
        f"{cost.instruction_ratio:.2f}",
        str(cost.fusions),
        f"{cost.accessed_ratio:.2f}",
        str(cost.copies),
        f"{cost.temp_share:.3f}",
        f"{cost.reused_share:.3f}",
    ]

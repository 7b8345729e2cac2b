"""``optgrad bench step``: the cost of a step, beside Adam's and that of its memory traffic."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optgrad import registry
from optgrad.experiments.bench import peers, programs, timing, trees

REFERENCE = "adam"
ROUNDS = 20
DTYPES: Mapping[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ROUNDINGS = ("nearest", "stochastic")  # of `optgrad.low_precision_state`, for any optimizer
STATE_DTYPES = ("default", *DTYPES, *ROUNDINGS)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A row: one method on one tree. Ratios are to ``optax.adam`` in the same rounds.

    Attributes:
      method: its name.
      kind: see `programs.StepProgram.kind`; of a peer the package.
      tree: the parameters' name.
      param_dtype: their type.
      state_dtype: one of `STATE_DTYPES`: a method's argument, or the rounding of a wrapper.
      microseconds: of a step, the median.
      microseconds_low: lower quartile.
      microseconds_high: upper quartile.
      ratio: to Adam.
      ratio_low: lower quartile of the rounds' ratios.
      ratio_high: upper quartile.
      bound_ratio: of the bytes that a step must move to those of Adam's; None where that is not
        known.
      over_bound: ``ratio / bound_ratio``.
      gigabytes_per_second: those bytes over the time.
      stream_gigabytes_per_second: of a loop in place over one large array, in the same rounds.
      compile_seconds: tracing and compiling.
      compile_ratio: to Adam's, compiled right before it.
      state_bytes: of the optimizer's state.
      temp_bytes: of XLA's temporaries.
      copies: of a leaf, in the optimised program.
    """

    method: str
    kind: str
    tree: str
    param_dtype: str
    state_dtype: str
    microseconds: float
    microseconds_low: float
    microseconds_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    bound_ratio: float | None
    over_bound: float | None
    gigabytes_per_second: float | None
    stream_gigabytes_per_second: float
    compile_seconds: float | None
    compile_ratio: float | None
    state_bytes: int
    temp_bytes: int | None
    copies: int | None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What methods are measured on."""

    tree: str
    param_dtype: str = "float32"
    state_dtype: str = "default"
    rounds: int = ROUNDS


def fitting(method: registry.Method, setting: Setting) -> str:
    """Why a method is not measured on that tree; empty if it is.

    Examples:
      >>> import optgrad
      >>> fitting(optgrad.get_method("newton"), Setting("one"))
      'keeps matrices over all parameters: measured on few'
    """
    if not programs.is_measurable(method):
        return "its statistics are those of a network's layers"
    if method.is_dense and setting.tree != "few":
        return "keeps matrices over all parameters: measured on few"
    if setting.state_dtype in DTYPES and "state_dtype" not in method.hyperparameters:
        return "has no state_dtype"
    return ""


def costs(
    methods: Sequence[registry.Method],
    setting: Setting,
    *,
    with_peers: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[StepCost]:
    """The rows of one table, one after the other.

    Args:
      methods: records; those that do not fit are named in a note.
      setting: tree, types and rounds.
      with_peers: whether the optimizers of other packages that are installed come last.
      on_note: told what is left out, and why.
    """
    shapes = trees.get_tree(setting.tree).shapes()
    dtype = DTYPES[setting.param_dtype]
    for method in methods:
        if reason := fitting(method, setting):
            on_note(f"{method.name} on {setting.tree}: {reason}")
            continue
        yield _cost(method, trees.parameters(shapes, dtype), setting)
    if with_peers and setting.state_dtype == "default":
        for peer in peers.installed():
            try:
                yield _peer_cost(peer, shapes, setting)
            except (RuntimeError, TypeError, ValueError) as error:  # of versions that differ
                on_note(f"{peer.package}'s {peer.name} on {setting.tree}: {error}")


def _reference(params: Any) -> tuple[programs.StepProgram, Any, programs.Counts]:
    adam = programs.StepProgram(registry.get_method(REFERENCE), params)
    return adam, *programs.compiled_with_counts(adam)


def _cost(method: registry.Method, params: Any, setting: Setting) -> StepCost:
    adam, compiled_adam, adam_counts = _reference(params)
    kind = setting.state_dtype
    narrow = {"state_dtype": DTYPES[kind]} if kind in DTYPES else {}
    rounding = kind if kind in ROUNDINGS else None
    program = programs.StepProgram(method, params, narrow, rounding)
    compiled, counts = programs.compiled_with_counts(program)
    traffic, adam_traffic = program.traffic(), adam.traffic()
    assert adam_traffic is not None
    bound = None if traffic is None else traffic / adam_traffic
    return _row(
        {"method": method.name, "kind": program.kind},
        setting,
        program.runner(compiled),
        adam.runner(compiled_adam),
        bound=bound,
        traffic=traffic,
        compile_seconds=counts.seconds,
        compile_ratio=counts.seconds / adam_counts.seconds,
        state_bytes=counts.state_bytes,
        temp_bytes=counts.temp_bytes,
        copies=counts.copies,
    )


def _peer_cost(peer: peers.Peer, shapes: trees.Shapes, setting: Setting) -> StepCost:
    adam, compiled_adam, _ = _reference(trees.parameters(shapes, DTYPES[setting.param_dtype]))
    run, state_bytes = peer.prepare(shapes, setting.param_dtype)
    return _row(
        {"method": peer.name, "kind": peer.package},
        setting,
        run,
        adam.runner(compiled_adam),
        state_bytes=state_bytes,
    )


def _row(
    names: Mapping[str, str],
    setting: Setting,
    run: timing.Run,
    adam: timing.Run,
    *,
    bound: float | None = None,
    traffic: int | None = None,
    state_bytes: int,
    compile_seconds: float | None = None,
    compile_ratio: float | None = None,
    temp_bytes: int | None = None,
    copies: int | None = None,
) -> StepCost:
    stream = timing.Stream()
    runs: dict[str, timing.Run] = {"stream": stream, "adam": adam, "method": run}
    spent = timing.interleaved(runs, setting.rounds)
    time, ratio = timing.spread(spent["method"]), timing.ratios(spent["method"], spent["adam"])
    return StepCost(
        **names,
        tree=setting.tree,
        param_dtype=setting.param_dtype,
        state_dtype=setting.state_dtype,
        microseconds=1e6 * time.median,
        microseconds_low=1e6 * time.low,
        microseconds_high=1e6 * time.high,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        bound_ratio=bound,
        over_bound=None if bound is None else ratio.median / bound,
        gigabytes_per_second=None if traffic is None else 1e-9 * traffic / time.median,
        stream_gigabytes_per_second=1e-9 * stream.bytes / timing.spread(spent["stream"]).median,
        compile_seconds=compile_seconds,
        compile_ratio=compile_ratio,
        state_bytes=state_bytes,
        temp_bytes=temp_bytes,
        copies=copies,
    )


HEADER = (
    "method", "kind", "µs a step", "× Adam", "bound", "÷ bound", "GB/s", "of the stream",
    "compile s", "compile × Adam", "state bytes", "temporaries", "copies",
)  # fmt: skip
SHOWN = (0, 2, 3, 4, 5, 9)  # on a terminal of 80 columns


def cells(cost: StepCost) -> list[str]:
    """A row as text, under `HEADER`."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    speed = cost.gigabytes_per_second
    return [
        cost.method,
        cost.kind,
        f"{cost.microseconds:,.0f}",
        f"{cost.ratio:.2f} ({cost.ratio_low:.2f}–{cost.ratio_high:.2f})",
        number(cost.bound_ratio),
        number(cost.over_bound),
        number(speed, ".1f"),
        number(None if speed is None else speed / cost.stream_gigabytes_per_second),
        number(cost.compile_seconds),
        number(cost.compile_ratio),
        f"{cost.state_bytes:,}",
        number(cost.temp_bytes, ",d"),
        number(cost.copies, "d"),
    ]

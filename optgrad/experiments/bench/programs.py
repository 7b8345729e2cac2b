"""The step of a method on given parameters, compiled, and what the compiler made of it."""

import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad import registry
from optgrad.wrappers.low_precision_state import low_precision_state

EXAMPLES = 4  # of the per-example gradients that some methods take
_LITTLE = 1000  # entries, below which a copy costs nothing
_LOOPS = frozenset({"value_fn", "residual_fn", "outputs_fn"})
_REDUCTIONS = ("reduce", "dot_general", "argmax", "argmin", "cumsum", "sort")


class StepProgram:
    """``update`` and ``apply_updates`` of one method; parameters and state are donated.

    Losses, where a method asks for functions of the parameters, are ½‖p − t‖²/n: nearly as cheap as
    a function of all parameters can be, so that what is measured is the method.

    Args:
      method: its record.
      params: a tree of arrays.
      hyperparams: in place of those of `measured_hyperparams`.
      rounding: of the state to bfloat16 by `optgrad.low_precision_state`, if any.

    Attributes:
      method, params: as above.
      state: the optimizer's first state.
      grad: the gradient that every step is given.
      extras: further arguments of ``update`` that are arrays.
    """

    def __init__(
        self,
        method: registry.Method,
        params: Any,
        hyperparams: Mapping[str, Any] | None = None,
        rounding: str | None = None,
    ) -> None:
        chosen = {**measured_hyperparams(method), **(hyperparams or {})}
        self.method, self.params = method, params
        self.optimizer = registry.create(method.name, **chosen)
        if rounding:
            self.optimizer = low_precision_state(self.optimizer, rounding=rounding)
        self.state = self.optimizer.init(params)
        self.grad = jax.tree.map(lambda p: 0.1 * p + jnp.asarray(0.01, p.dtype), params)
        self._names = method.extras(has_layers=False)
        self.extras = {name: f(self) for name, f in _ARRAYS.items() if name in self._names}

    def step(self, params: Any, state: Any, grad: Any, extras: Any) -> tuple[Any, Any]:
        """What is measured."""
        functions = {n: f(params) for n, f in _FUNCTIONS.items() if n in self._names}
        updates, state = self.optimizer.update(grad, state, params, **extras, **functions)
        return optax.apply_updates(params, updates), state

    def lower(self) -> Any:
        """The step, traced and lowered, with donated buffers."""
        arguments = (self.params, self.state, self.grad, self.extras)
        return jax.jit(self.step, donate_argnums=(0, 1)).lower(*arguments)

    def runner(self, compiled: Any) -> Callable[[], Any]:
        """A function that takes one step in place and gives what is to be waited for."""
        held = jax.tree.map(jnp.copy, (self.params, self.state))

        def run() -> Any:
            nonlocal held
            held = compiled(*held, self.grad, self.extras)
            return held

        return run

    @functools.cached_property
    def kind(self) -> str:
        """``"dense"``, ``"functions"`` (of the parameters), ``"tree-wide"`` or ``"elementwise"``.

        Tree-wide is what reduces anything of a parameter's size: a sum over the tree.
        """
        if self.method.is_dense:
            return "dense"
        if _LOOPS & self.method.needs:
            return "functions"
        jaxpr = jax.make_jaxpr(self.step)(self.params, self.state, self.grad, self.extras)
        return "tree-wide" if _reduces(jaxpr.jaxpr) else "elementwise"

    def traffic(self) -> int | None:
        """Bytes that a step must at least move, or None where that depends on the functions.

        Everything is read once and parameters and state are written. A tree-wide method reads
        everything twice: a sum over the tree is finished before it can be used.
        """
        kind = self.kind
        if kind in {"dense", "functions"}:
            return None
        written = nbytes(self.params) + nbytes(self.state)
        read = written + nbytes(self.grad) + nbytes(self.extras)
        return written + (2 if kind == "tree-wide" else 1) * read


class Counts(NamedTuple):
    """What XLA made of a step: deterministic for its version and options."""

    copies: int  # of arrays of a leaf's size
    temp_bytes: int
    alias_bytes: int  # of donated buffers that results are written to
    param_bytes: int
    state_bytes: int
    fusions: int
    instructions: int
    accessed_bytes: float  # by all its loops together, as XLA counts them
    seconds: float  # of tracing, lowering and compiling


def compiled_with_counts(
    program: StepProgram, *, saving_memory: bool = False
) -> tuple[Any, Counts]:
    """The compiled step, and its counts.

    Args:
      program: the step.
      saving_memory: whether XLA schedules for little memory, as on accelerators. Its default on a
        CPU is to start whatever can be started, with as many temporaries alive.
    """
    started = time.perf_counter()
    lowered = program.lower()
    compiled = compiled_for_memory(lowered) if saving_memory else lowered.compile()
    seconds = time.perf_counter() - started
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    leaves = [x.size for x in jax.tree.leaves(program.params)]
    return compiled, Counts(
        copies=copies(hlo, min([_LITTLE, *leaves])),
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        param_bytes=nbytes(program.params),
        state_bytes=nbytes(program.state),
        fusions=len(re.findall(r"= \S+ fusion\(", hlo)),
        instructions=instructions(hlo),
        accessed_bytes=accessed_bytes(compiled),
        seconds=seconds,
    )


def accessed_bytes(compiled: Any) -> float:
    """What the loops of a program read and write, each array as often as a loop has it; or NaN.

    More than the traffic of a step where XLA makes one loop for each result, as on a CPU: two
    averages of one gradient read it twice.
    """
    return float(compiled.cost_analysis().get("bytes accessed", math.nan))


def compiled_for_memory(lowered: Any) -> Any:
    """The program scheduled for little memory, with the default code generator.

    The latter is faster for many fusions than the one that the tests choose for the sake of
    compilation.
    """
    scheduler = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    emitters = {"xla_cpu_use_fusion_emitters": True}
    older = {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # the same, before jax 0.8
    for options in ({**scheduler, **emitters}, scheduler, {**older, **emitters}, older):
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:  # versions of XLA that have no such option
            continue
    return lowered.compile()


def copies(hlo: str, size: int) -> int:
    """How many arrays of at least ``size`` entries are copied.

    Examples:
      >>> copies("x = f32[2,3]{1,0} copy(y)", 6), copies("x = f32[] copy(y)", 6)
      (1, 0)
    """
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", hlo)
    return sum(math.prod(int(n) for n in shape.split(",") if n) >= size for shape in shapes)


def instructions(hlo: str) -> int:
    r"""How many instructions a program has, those within fusions and loops included.

    Examples:
      >>> instructions("ENTRY e {\n  x = f32[] parameter(0)\n  ROOT y = f32[] negate(x)\n}")
      2
    """
    return len(re.findall(r"^ .* = ", hlo, re.MULTILINE))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays.

    Examples:
      >>> nbytes({"a": np.zeros(3, np.float32), "b": np.zeros((), np.int32)})
      16
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measured_hyperparams(method: registry.Method) -> dict[str, Any]:
    """What must be given, and nothing that has a default: what a user would run.

    Examples:
      >>> import optgrad
      >>> measured_hyperparams(optgrad.get_method("adaptive_sgd"))
      {}
    """
    required = [k for k, p in method.hyperparameters.items() if p.default is p.empty]
    known = dict(method.published) | dict(method.test_hyperparams)
    if method.tunes is not None:
        known.setdefault(method.tunes.hyperparameter, math.sqrt(method.tunes[1] * method.tunes[2]))
    known.setdefault("learning_rate", 1e-3)
    return {name: known[name] for name in required}


def _reduces(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        is_large = any(getattr(v.aval, "size", 0) > 1 for v in equation.invars)
        if is_large and equation.primitive.name.startswith(_REDUCTIONS):
            return True
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or callable(x)
        )
        if any(_reduces(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x)):
            return True
    return False


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _ones(program: StepProgram) -> Any:
    return jax.tree.map(jnp.ones_like, program.params)


def _examples(program: StepProgram) -> Any:
    scales = np.linspace(0.5, 1.5, EXAMPLES)
    return jax.tree.map(
        lambda g: jnp.stack([g * jnp.asarray(s, g.dtype) for s in scales]), program.grad
    )


_ARRAYS: Mapping[str, Callable[[StepProgram], Any]] = {
    "value": lambda program: jnp.ones((), jnp.float32),
    "grad": lambda program: program.grad,
    "gradient_variance": _ones,
    "curvature_diagonal": _ones,
    "per_example_grads": _examples,
}


def _loss(params: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(p.astype(jnp.float32) - 0.5)) for p in jax.tree.leaves(params)]
    return sum(squares, start=jnp.zeros(())) / (2 * max(len(squares), 1))


def _residuals(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32) - 0.5, params)


_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "value_fn": lambda params: _loss,
    "residual_fn": lambda params: _residuals,
    "outputs_fn": lambda params: lambda p: p,
    "out_loss_fn": lambda params: _loss,
}


def is_measurable(method: registry.Method) -> bool:
    """Whether its extra arguments can be made up: those of layers need a network."""
    return method.extras(has_layers=False) <= {*_ARRAYS, *_FUNCTIONS}


def measurable() -> tuple[registry.Method, ...]:
    """All methods that can be measured."""
    return tuple(filter(is_measurable, registry.methods()))

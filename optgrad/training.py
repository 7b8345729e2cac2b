"""Training steps for methods that need more than gradients.

`curvature_args` turns the functions of a training problem, of parameters *and* a batch, into the
extra arguments of ``update``, which are closed over one batch; `make_step` makes the whole compiled
step of them.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad import registry
from optgrad.core import gauss_newton, linalg, microbatches, oracles, transforms
from optgrad.core.diagnostics import diagnostics

BatchFn = Callable[..., Any]  # (params, batch) or (params, batch, key) -> anything
OtherBatch = int | Callable[[Any, Any], Any]  # the first m examples, or (batch, key) -> batch

# What each extra argument is made of, as the caller names it.
_SOURCES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("value", "grad", "value_fn"), ("loss_fn",)),
    **dict.fromkeys(("per_example_grads", "gradient_variance"), ("loss_fn",)),
    **dict.fromkeys(("outputs_fn", "out_loss_fn", "curvature_diagonal"), ("outputs", "out_loss")),
    "residual_fn": ("residual",),
    "curvature_fn": ("loss_fn", "curvature_batch"),
    "inner_fn": ("loss_fn", "inner_batch"),
    "kfac_stats": ("kfac",),
}

# --- the extra arguments ------------------------------------------------------------------------


def curvature_args(
    loss_fn: BatchFn | None = None,
    outputs: BatchFn | None = None,
    out_loss: BatchFn | None = None,
    residual: BatchFn | None = None,
    *,
    per_example: bool = False,
    variance: bool = False,
    diagonal: bool = False,
    kfac: BatchFn | None = None,
    microbatch_size: int | None = None,
    curvature_batch: OtherBatch | None = None,
    inner_batch: OtherBatch | None = None,
) -> "CurvatureArgs":
    r"""The function ``args(params, batch, key=None)`` that builds ``update``'s extra arguments.

    Call it *inside* the jitted step: functions cannot pass through ``jit``, ``scan`` or ``cond``.
    What the optimizer does not use costs nothing under ``jit``, so that one step serves all.

    ====================== ==================================== =========================
    extra argument         what it is                           built if there is
    ====================== ==================================== =========================
    ``value``, ``grad``    the loss and its gradient            always
    ``value_fn``           params -> loss                       always
    ``outputs_fn``         params -> z                          ``outputs``
    ``out_loss_fn``        z -> loss                            ``outputs``, ``out_loss``
    ``residual_fn``        params -> r                          ``residual``
    ``curvature_fn``       params -> loss, another batch        ``curvature_batch``
    ``inner_fn``           params -> loss, another batch        ``inner_batch``
    ``per_example_grads``  gradients of all examples            ``per_example=True``
    ``gradient_variance``  that of the mean gradient            ``variance=True``
    ``curvature_diagonal`` of the Gauss–Newton matrix           ``diagonal=True``
    ``kfac_stats``         layer -> statistics of all examples  ``kfac``
    ====================== ==================================== =========================

    Each of the functions may take a PRNG key as its third positional argument, called ``key`` or
    ``rng`` or without a default: it is then handed the key of the call, so that the loss of one
    step is one function of the parameters, dropout and all. (Micro-batches and single examples
    have keys of their own, folded in or split from it.)

    Args:
      loss_fn: (params, batch) -> *mean* loss over the batch, a scalar; regularisation included.
        By default it is composed, ``out_loss(outputs(params, batch), batch)``, or
        ½·Σr² of ``residual``.
      outputs: (params, batch) -> z, the network's outputs, any pytree. What the loss has beside
        the network, such as L2, belongs to the curvature too if the parameters are among the
        outputs: ``lambda params, batch: (network(params, batch), params)``.
      out_loss: (z, batch) -> mean loss, a scalar, convex in z. The same as ``loss_fn`` if both are
        given.
      residual: (params, batch) -> r, any pytree, of a least-squares loss.
      per_example: whether to compute ``per_example_grads``: ``loss_fn`` is differentiated on
        batches of one example, B × D numbers.
      variance: whether to compute ``gradient_variance``, from the same in micro-batches.
      diagonal: whether to compute ``curvature_diagonal``, C gradients of each example for C
        outputs.
      kfac: (params, batch, key) -> ``kfac_stats``, for instance ``lambda params, batch, key:
        optgrad.layer_statistics(model, params, batch["x"], key=key)``; the key samples labels.
      microbatch_size: the loss is computed over at most that many examples at once, and again in
        backward passes, so that ``value_fn``, ``curvature_fn``, ``inner_fn``, their gradients and
        Hessian-vector products, ``outputs_fn`` and its products need the activations of one
        micro-batch only. It need not divide the batch. The numbers are the whole batch's, up to
        rounding, provided that every output has one row for each example: an output without such
        an axis that depends on the batch (an auxiliary loss) is taken from the first micro-batch.
        ``residual_fn`` is not divided: how it is scaled by the number of examples is its own
        affair.
      curvature_batch: the batch of ``curvature_fn``: the first m examples for an integer m, or
        (batch, key) -> batch.
      inner_batch: the batch of ``inner_fn``, likewise.

    Returns:
      A function of (params, batch, key), which returns a dictionary.

    Raises:
      ValueError: if there is no loss, or ``outputs`` without ``out_loss``, or another option lacks
        what it is made of.

    Examples:
      >>> import optgrad
      >>> def outputs(params, batch):
      ...     return batch["x"] @ params
      >>> def squared(z, batch):
      ...     return 0.5 * jnp.mean((z - batch["y"]) ** 2)
      >>> args = optgrad.curvature_args(outputs=outputs, out_loss=squared)
      >>> batch = {"x": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "y": jnp.array([1.0, -1.0])}
      >>> optimizer = optgrad.create("lbfgs")
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for _ in range(20):
      ...     extra = args(params, batch)
      ...     passed = {name: extra[name] for name in ("value", "grad", "value_fn")}
      ...     updates, state = optimizer.update(extra["grad"], state, params, **passed)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2), sorted(extra))
      [ 1. -1.] ['grad', 'out_loss_fn', 'outputs_fn', 'value', 'value_fn']

      A Flax NNX optimizer: ``nnx.Optimizer(model, tx, wrt=nnx.Param)``, then, with
      ``graph, params, rest = nnx.split(model, nnx.Param, ...)`` and a ``loss_fn`` that merges
      them, ``optimizer.update(model, extra["grad"], **extra)`` inside ``nnx.jit``.
    """
    sources = _Sources(
        loss_fn, outputs, out_loss, residual, kfac, microbatch_size, curvature_batch, inner_batch
    )
    asked = {
        "per_example_grads": per_example,
        "gradient_variance": variance,
        "curvature_diagonal": diagonal,
    }
    names = sources.given_names()
    names |= {name for name, wanted in asked.items() if wanted}
    sources.check("curvature_args", names)
    return CurvatureArgs(sources, frozenset(names))


@dataclasses.dataclass(frozen=True, eq=False)
class CurvatureArgs:
    """What `curvature_args` returns.

    Attributes:
      sources: the functions of parameters and batch.
      names: of the extra arguments that are built.
    """

    sources: "_Sources"
    names: frozenset[str]

    def __call__(self, params: optax.Params, batch: Any, key: Any = None) -> dict[str, Any]:
        """The extra arguments at these parameters, closed over the batch.

        Args:
          params: θ.
          batch: a pytree with a leading batch axis on every leaf.
          key: a PRNG key, for functions that take one.
        """
        return self.sources.build(self.names, params, batch, key)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sources:
    """The functions of parameters and batch that everything is built from."""

    loss_fn: BatchFn | None
    outputs: BatchFn | None
    out_loss: BatchFn | None
    residual: BatchFn | None
    kfac: BatchFn | None
    microbatch_size: int | None
    curvature_batch: OtherBatch | None
    inner_batch: OtherBatch | None

    def __post_init__(self) -> None:
        for name in ("loss_fn", "outputs", "out_loss", "residual", "kfac"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} = {function!r}; accepted: a function (params, batch)")
        for name in ("curvature_batch", "inner_batch"):
            other = getattr(self, name)
            if not (other is None or callable(other) or _is_count(other)):
                raise ValueError(
                    f"{name} = {other!r}; accepted: an integer ≥ 1, the number of examples, or "
                    "a function (batch, key) -> batch"
                )
        if (self.outputs is None) != (self.out_loss is None):
            given, missing = ("outputs", "out_loss") if self.outputs else ("out_loss", "outputs")
            raise ValueError(
                f"{given} is given without {missing}; accepted: both, outputs(params, batch) -> z "
                "and out_loss(z, batch) -> scalar"
            )
        oracles.examples_at_once(self.microbatch_size, 1)
        if self.microbatch_size is not None and self.loss_fn is None and self.outputs is None:
            raise ValueError(
                f"microbatch_size = {self.microbatch_size} needs a mean over examples; accepted: "
                "with loss_fn, or outputs and out_loss"
            )

    def has(self, source: str) -> bool:
        """Whether what the caller names so was given, or can be composed."""
        if source == "loss_fn":
            return any(f is not None for f in (self.loss_fn, self.outputs, self.residual))
        return getattr(self, source) is not None

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether the loss or the outputs take a key."""
        functions = (self.loss_fn, self.outputs, self.out_loss, self.residual)
        return any(f is not None and _takes_key(f) for f in functions)

    def given_names(self) -> set[str]:
        """The extra arguments that are built unasked, because their sources were given."""
        optional = ("outputs_fn", "out_loss_fn", "residual_fn", "curvature_fn", "inner_fn")
        found = {n for n in (*optional, "kfac_stats") if all(map(self.has, _SOURCES[n]))}
        return {"value", "grad", "value_fn", *found}

    def check(self, who: str, names: Collection[str]) -> None:
        """Raises unless everything is there that these extra arguments are made of."""
        for name in sorted(names):
            if name not in _SOURCES:
                raise ValueError(
                    f"{who} needs {name}, which is not built here; accepted: {', '.join(_SOURCES)}"
                )
            if missing := [source for source in _SOURCES[name] if not self.has(source)]:
                passed = " and ".join(
                    "loss_fn" if source == "loss_fn" else f"{source}=..." for source in missing
                )
                raise ValueError(f"{who} needs {name}: pass {passed}")

    def build(
        self, names: Collection[str], params: optax.Params, batch: Any, key: Any
    ) -> dict[str, Any]:
        """The named extra arguments."""
        found: dict[str, Any] = {}
        for name, builder in self._builders(params, batch, key).items():
            if name in names:
                found[name] = builder()
        if {"value", "grad", "gradient_variance"} & set(names):
            variance = "gradient_variance" in names
            found |= self._value_and_gradient(params, batch, key, variance=variance)
        return {name: value for name, value in found.items() if name in names}

    def _builders(self, params: optax.Params, batch: Any, key: Any) -> dict[str, Callable[[], Any]]:
        def value_fn_of(other: OtherBatch | None) -> Callable[[], Any]:
            return lambda: self._value_fn(_other(other, batch, key), key)

        return {
            "value_fn": lambda: self._value_fn(batch, key),
            "curvature_fn": value_fn_of(self.curvature_batch),
            "inner_fn": value_fn_of(self.inner_batch),
            "outputs_fn": lambda: self._outputs_fn(batch, key),
            "out_loss_fn": lambda: lambda z: _keyed(self.out_loss)(z, batch, key),
            "residual_fn": lambda: lambda p: _keyed(self.residual)(p, batch, key),
            "per_example_grads": lambda: oracles.per_example_grads(
                self._example_loss, params, self._examples(batch, key),
                microbatch_size=self.microbatch_size,
            ),
            "curvature_diagonal": lambda: self._diagonal(params, batch, key),
            "kfac_stats": lambda: _keyed(self.kfac)(params, batch, key),
        }  # fmt: skip

    # The loss ----------------------------------------------------------------------------------

    def loss(self, params: optax.Params, batch: Any, key: Any) -> chex.Array:
        """The mean loss of a batch."""
        if self.loss_fn is not None:
            value = _keyed(self.loss_fn)(params, batch, key)
        elif self.outputs is not None:
            outputs = _keyed(self.outputs)(params, batch, key)
            value = _keyed(self.out_loss)(outputs, batch, key)
        else:
            residuals = linalg.widened(_keyed(self.residual)(params, batch, key))
            value = 0.5 * linalg.dot(residuals, residuals)
        shapes = jax.tree.map(jnp.shape, value)
        if shapes != ():
            raise ValueError(
                f"the loss has the shapes {shapes}; accepted: a scalar, the mean loss of the batch"
            )
        return value

    def _value_fn(self, batch: Any, key: Any) -> Callable[[Any], chex.Array]:
        if self.microbatch_size is None:
            return lambda params: self.loss(params, batch, key)
        return lambda params: microbatches.mean_loss(
            self.loss, params, batch, key, self.microbatch_size
        )

    def _outputs_fn(self, batch: Any, key: Any) -> Callable[[Any], Any]:
        outputs = _keyed(self.outputs)
        if self.microbatch_size is None:
            return lambda params: outputs(params, batch, key)
        return lambda params: microbatches.stacked_outputs(
            outputs, params, batch, key, self.microbatch_size
        )

    def _value_and_gradient(
        self, params: optax.Params, batch: Any, key: Any, *, variance: bool
    ) -> dict[str, Any]:
        """The loss and its gradient, and in one pass with them the gradient's variance."""
        found: tuple[Any, ...] = ()
        if variance:
            found = oracles.value_grad_and_variance(
                self._example_loss, params, self._examples(batch, key),
                microbatch_size=self.microbatch_size,
            )  # fmt: skip
        if not variance or self.is_random:  # examples' own keys make another loss than the batch's
            found = (*jax.value_and_grad(self._value_fn(batch, key))(params), *found[2:])
        return dict(zip(("value", "grad", "gradient_variance"), found, strict=False))

    # Single examples ---------------------------------------------------------------------------

    def _examples(self, batch: Any, key: Any) -> tuple[Any, Any]:
        """The batch, and a key for each example if there is one."""
        if key is None or not self.is_random:
            return batch, None
        return batch, jax.random.split(key, oracles.batch_size(batch))

    def _example_loss(self, params: optax.Params, example: tuple[Any, Any]) -> chex.Array:
        one, key = example
        return self.loss(params, _batch_of(one), key)

    def _diagonal(self, params: optax.Params, batch: Any, key: Any) -> optax.Updates:
        def model(params: optax.Params, example: tuple[Any, Any]) -> Any:
            one, key = example
            return _keyed(self.outputs)(params, _batch_of(one), key)

        def loss(z: Any, example: tuple[Any, Any]) -> Any:
            one, key = example
            return _keyed(self.out_loss)(z, _batch_of(one), key)

        examples = self._examples(batch, key)
        return gauss_newton.gauss_newton_diagonal(
            model, loss, params, examples, examples, microbatch_size=self.microbatch_size
        )


def _batch_of(example: Any) -> Any:
    return jax.tree.map(lambda x: x[None], example)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _other(chosen: OtherBatch | None, batch: Any, key: Any) -> Any:
    """The batch of `curvature_fn` or `inner_fn`."""
    if callable(chosen):
        return chosen(batch, key)
    return jax.tree.map(lambda x: x[:chosen], batch)


def _keyed(function: BatchFn | None) -> Callable[[Any, Any, Any], Any]:
    """The function as one of (params, batch, key), whether it takes a key or not."""
    assert function is not None  # `check` has been called
    if not _takes_key(function):
        return lambda params, batch, key: function(params, batch)

    def keyed(params: Any, batch: Any, key: Any) -> Any:
        if key is None:
            name = getattr(function, "__name__", repr(function))
            raise ValueError(
                f"key = None; accepted: a PRNG key, which {name} takes, as the third argument "
                "after the parameters and the batch"
            )
        return function(params, batch, key)

    return keyed


def _takes_key(function: BatchFn) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [p for p in parameters if p.kind in kinds][2:3]
    return bool(third) and (third[0].default is third[0].empty or third[0].name in ("key", "rng"))


# --- the whole step -------------------------------------------------------------------------------


class StepInfo(NamedTuple):
    """What a training step reports."""

    value: chex.Array  # the loss before the step, shape ()
    diagnostics: dict[str, chex.Array]  # of the optimizer's new state, see `optgrad.diagnostics`


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingStep:
    """A compiled training step, which `make_step` makes.

    Attributes:
      optimizer: the transformation.
      args: (params, batch, key) -> the extra arguments that it is given.
      donate: whether the buffers of parameters and state are reused.
    """

    optimizer: optax.GradientTransformationExtraArgs
    args: CurvatureArgs
    donate: bool = False

    def init(self, params: optax.Params) -> optax.OptState:
        """The optimizer's state for these parameters, with buffers of its own."""
        return jax.tree.map(jnp.copy, transforms.strongly_typed(self.optimizer.init(params)))

    def __call__(
        self, params: optax.Params, state: optax.OptState, batch: Any, key: Any = None
    ) -> tuple[optax.Params, optax.OptState, StepInfo]:
        """One step.

        Args:
          params: θ.
          state: of the optimizer.
          batch: a pytree with a leading batch axis on every leaf.
          key: a PRNG key, if a function of the problem takes one.

        Returns:
          The new parameters, the new state, and a `StepInfo`.
        """
        new: tuple[optax.Params, optax.OptState, StepInfo] = self._compiled(
            params, state, batch, key
        )
        return new

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self._step, donate_argnums=(0, 1) if self.donate else ())

    def _step(
        self, params: optax.Params, state: optax.OptState, batch: Any, key: Any
    ) -> tuple[optax.Params, optax.OptState, StepInfo]:
        names = self.args.names | {"value", "grad"}
        extra = self.args.sources.build(names, params, batch, key)
        passed = {name: extra[name] for name in self.args.names}
        updates, state = self.optimizer.update(extra["grad"], state, params, **passed)
        state = transforms.strongly_typed(state)
        params = optax.apply_updates(params, updates)
        return params, state, StepInfo(extra["value"], diagnostics(state))


def make_step(
    optimizer: str | optax.GradientTransformation,
    loss_fn: BatchFn | None = None,
    outputs: BatchFn | None = None,
    out_loss: BatchFn | None = None,
    residual: BatchFn | None = None,
    *,
    kfac: BatchFn | None = None,
    microbatch_size: int | None = None,
    curvature_batch: OtherBatch | None = None,
    inner_batch: OtherBatch | None = None,
    needs: Collection[str] | None = None,
    donate: bool = False,
    **hyperparams: Any,
) -> TrainingStep:
    """A whole training step, compiled: loss, gradient, extra arguments, update.

    Args:
      optimizer: a name of the registry, or a transformation.
      loss_fn: (params, batch) -> mean loss; this and the other functions of the problem are
        described in `curvature_args`.
      outputs: (params, batch) -> z.
      out_loss: (z, batch) -> mean loss.
      residual: (params, batch) -> r.
      kfac: (params, batch, key) -> ``kfac_stats``.
      microbatch_size: examples whose activations exist at once.
      curvature_batch: of ``curvature_fn``.
      inner_batch: of ``inner_fn``.
      needs: names of the extra arguments that are built. Default: for a baseline of the registry
        those that its record needs (optax's line searches refuse others); for any other method
        these, and beyond them ``value``, ``grad``, ``value_fn`` and the functions that were given
        here, which its options may ask for; for a transformation the latter, and ``kfac_stats``.
      donate: whether to reuse the buffers of the parameters and the state that are handed over;
        these cannot be used any more then.
      **hyperparams: of the method, if it is named.

    Returns:
      A `TrainingStep`: ``step.init(params)`` is the optimizer's state, and
      ``params, state, info = step(params, state, batch, key=None)`` a step, where ``info.value``
      is the loss before it and ``info.diagnostics`` what the optimizer models.

    Raises:
      ValueError: if what the optimizer needs cannot be built, with what to pass.

    Examples:
      >>> import optgrad
      >>> def loss_fn(params, batch):
      ...     return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
      >>> batch = {"x": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "y": jnp.array([1.0, -1.0])}
      >>> step = optgrad.make_step("lbfgs", loss_fn, memory_size=5)
      >>> params = jnp.zeros(2)
      >>> state = step.init(params)
      >>> for _ in range(20):
      ...     params, state, info = step(params, state, batch)
      >>> print(params.round(2), f"{info.value:.4f}")
      [ 1. -1.] 0.0000
    """
    sources = _Sources(
        loss_fn, outputs, out_loss, residual, kfac, microbatch_size, curvature_batch, inner_batch
    )
    if isinstance(optimizer, str):
        method = registry.get_method(optimizer)
        transformation = registry.create(optimizer, **hyperparams)
        who, names = method.name, _needed(method, sources)
    else:
        if hyperparams:
            raise TypeError(
                f"{', '.join(hyperparams)} given with a transformation; accepted: hyperparameters "
                "with the name of a method, or make_step's own options"
            )
        transformation = optax.with_extra_args_support(optimizer)
        who, names = "the optimizer", sources.given_names()
    if needs is not None:
        names = set(needs) - {"params"}
    sources.check(who, {"value", "grad", *names})
    return TrainingStep(transformation, CurvatureArgs(sources, frozenset(names)), donate)


def _needed(method: registry.Method, sources: _Sources) -> set[str]:
    """The extra arguments that are built for a method of the registry."""
    names = method.extras(has_layers=sources.kfac is not None)
    if method.family == "baselines":
        return names
    return names | sources.given_names() - {"kfac_stats"}

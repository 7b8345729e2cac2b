"""The registry: one `Method` record for every optimizer that optgrad knows.

Tests, documentation, the command line and the harness iterate over these records. A method is
added by registering it, in its own file, and by one import line in its family's ``__init__``.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, transforms

# What `update` may take beyond gradients, state and parameters' values: one vocabulary for all.
EXTRAS: Mapping[str, str] = {
    "params": "the parameters at which the gradient was evaluated",
    "value": "the loss at params, a scalar",
    "grad": "the gradient at params, before any transformation ahead in the chain",
    "value_fn": "params -> loss on the same batch",
    "per_example_grads": "gradients of every example, leading batch axis on each leaf",
    "gradient_variance": "estimated variance of the minibatch gradient, a tree like the gradient; "
    "a method that lists it beside per_example_grads takes either",
    "curvature_diagonal": "nonnegative diagonal of the Hessian or Gauss-Newton matrix of the "
    "batch's loss, a tree like the gradient",
    "features": "the inputs x_i of a linear model, a tree like the gradient; "
    "a method that lists it beside curvature_diagonal takes either",
    "residual_fn": "params -> residuals of a least-squares loss, any pytree",
    "outputs_fn": "params -> network outputs z on the batch, any pytree",
    "out_loss_fn": "z -> loss, a scalar, convex in z",
    "curvature_fn": "params -> loss on another batch, for curvature (default: value_fn)",
    "inner_fn": "params -> loss on another batch, for inner minimisations (default: value_fn)",
    "kfac_stats": "layer -> (activations, pre-activation gradients) of every example; "
    "a method that lists it beside per_example_grads takes either",
}

# Where a method that lists both takes either: the one that is built, and the other.
_EITHER = (("gradient_variance", "per_example_grads"), ("curvature_diagonal", "features"))


class Tunable(NamedTuple):
    """The hyperparameter that a sweep tunes, and the decades in which its best value may lie."""

    hyperparameter: str
    low: float  # > 0; sweeps are logarithmic
    high: float


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything the rest of the project knows about one optimizer.

    Attributes:
      name: key in the registry, e.g. ``"m_svag"``.
      factory: the alias, called with keyword arguments, returns the complete optimizer.
      scale_by: the factory of the direction alone (no learning rate), or None.
      family: name of the package that defines it, or ``"baselines"``.
      title: what people call it.
      reference: authors, title, year.
      equation: which equation or algorithm box, and the update in one line.
      needs: names from ``optgrad.registry.EXTRAS``: what ``update`` takes beyond gradients.
      static_args: arguments that may not be traced: sizes, strings, callables, dtypes.
      tunes: what a sweep tunes, or None where there is nothing to tune.
      test_hyperparams: keyword arguments under which it converges on small problems.
      state_size: vectors of parameter size in the state: a number, or for a dense method (one that
        keeps matrices over all parameters) a function of the number of parameters.
      cost: gradient equivalents per step (a gradient is 1).
      published: what the paper states as default for arguments that have none here.
      low_precision: which of its averages may be kept in 16 bits, and at which decays; what
        ``state_dtype`` does where there is one. Empty only where the state has no vectors.
      wide_state: fields of its state that may not be kept in 16 bits, by any rounding: positions,
        and what is only used in differences. Names as `low_precision_state` takes them.
      evaluation_params: ``(state, params) -> params`` to evaluate, an average of iterates, for
        methods that are not evaluated at the parameters that they train. It finds the method's
        state within any other, a chain's, a guard's or an injected one. None: the trained ones.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    scale_by: Callable[..., optax.GradientTransformationExtraArgs] | None
    family: str
    title: str
    reference: str
    equation: str
    needs: frozenset[str] = frozenset()
    static_args: tuple[str, ...] = ()
    tunes: Tunable | None = None
    test_hyperparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state_size: float | Callable[[int], float] = 0
    cost: float = 1.0
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    low_precision: str = ""
    wide_state: tuple[str, ...] = ()
    evaluation_params: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if unknown := self.needs - EXTRAS.keys():
            raise ValueError(
                f"{self.name}: needs = {sorted(unknown)}; {checks.did_you_mean(unknown, EXTRAS)}"
            )
        named = {*self.static_args, *self.test_hyperparams, *self.published}
        named |= {self.tunes.hyperparameter} if self.tunes else set()
        for name in sorted(named):
            self.check_hyperparameter(name)

    @property
    def hyperparameters(self) -> Mapping[str, inspect.Parameter]:
        """The factory's parameters, by name."""
        return inspect.signature(self.factory).parameters

    @property
    def runs_at_published_defaults(self) -> bool:
        """Whether every argument has a default, the factory's or a published one.

        Examples:
          >>> import optgrad
          >>> [optgrad.get_method(m).runs_at_published_defaults for m in ("adam", "sgd", "kfac")]
          [True, False, True]
        """
        empty = inspect.Parameter.empty
        return all(
            p.default is not empty or k in self.published for k, p in self.hyperparameters.items()
        )

    @property
    def is_dense(self) -> bool:
        """Whether it keeps matrices over all parameters and is for few of them only."""
        return callable(self.state_size)

    def state_vectors(self, size: int) -> float:
        """Vectors of parameter size in the state, for that number of parameters.

        Examples:
          >>> get_method("ogr_full").state_vectors(10)
          23
        """
        return self.state_size(size) if callable(self.state_size) else self.state_size

    def evaluated(self, state: Any, params: Any) -> Any:
        """The parameters at which the method is evaluated.

        Args:
          state: its state, alone or within any other.
          params: the parameters that it trains.

        Examples:
          >>> import jax.numpy as jnp, optgrad
          >>> method = optgrad.get_method("schedule_free_adamw")
          >>> optimizer, params = optgrad.guard(method.factory(0.5)), jnp.ones(())
          >>> state = optimizer.init(params)
          >>> for _ in range(3):
          ...     updates, state = optimizer.update(params, state, params)
          ...     params = params + updates
          >>> print(f"{params:.3f} {method.evaluated(state, params):.3f}")
          0.182 0.208
        """
        return self.evaluation_params(state, params) if self.evaluation_params else params

    def extras(self, *, has_layers: bool) -> set[str]:
        """What to build for ``update``: of two arguments that it takes either of, one.

        Args:
          has_layers: whether statistics of layers can be had, which are cheaper to hold than the
            gradients of all examples.

        Examples:
          >>> sorted(get_method("m_svag_mb").extras(has_layers=False))
          ['gradient_variance']
        """
        names = set(self.needs - {"params"})
        layers = ("kfac_stats", "per_example_grads")
        for chosen, other in (*_EITHER, layers if has_layers else layers[::-1]):
            if {chosen, other} <= names:
                names -= {other}
        return names

    def check_hyperparameter(self, name: str) -> None:
        """Raises `UnknownHyperparameterError` unless the factory has a parameter of that name."""
        if name not in self.hyperparameters:
            raise UnknownHyperparameterError(
                f"{self.name} has no hyperparameter {name!r}; "
                f"{checks.did_you_mean(name, self.hyperparameters)}"
            )


class UnknownMethodError(KeyError, ValueError):
    """A name that is not in the registry (a `KeyError` for whoever treats it as a mapping)."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0])


class UnknownHyperparameterError(TypeError, ValueError):
    """A keyword argument that the method's factory does not have, or lacks."""


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a record to the registry; a second record of the same name is refused."""
    if method.name in _METHODS:
        raise ValueError(f"name = {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def methods(family: str | None = None) -> tuple[Method, ...]:
    """All registered methods, or those of one family, in the order of registration.

    Examples:
      >>> import optgrad
      >>> [m.name for m in optgrad.methods("dissecting_adam")][:4]
      ['ssd', 'm_ssd', 'svag', 'm_svag']
    """
    if family is None:
        return tuple(_METHODS.values())
    checks.check_one_of("family", family, dict.fromkeys(m.family for m in _METHODS.values()))
    return tuple(m for m in _METHODS.values() if m.family == family)


def get_method(name: str) -> Method:
    """The record of one method.

    Raises:
      UnknownMethodError: with the nearest registered names.

    Examples:
      >>> import optgrad
      >>> optgrad.get_method("m_svag").equation.split(":")[0]
      'Algorithm 2, Eq. (19)'
    """
    if name not in _METHODS:
        raise UnknownMethodError(
            f"unknown method {name!r}; {checks.did_you_mean(name, sorted(_METHODS))}"
        )
    return _METHODS[name]


def create(name: str, **hyperparams: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer ``name`` with these hyperparameters.

    Raises:
      UnknownMethodError: no such method; the message suggests the nearest names.
      UnknownHyperparameterError: no such hyperparameter, or a required one is missing.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.create("m_ssd", learning_rate=0.5)
      >>> updates, _ = optimizer.update(jnp.array([2.0, -3.0]), optimizer.init(jnp.zeros(2)))
      >>> print(updates)
      [-0.5  0.5]
    """
    method = get_method(name)
    check_hyperparams(method, hyperparams)
    return method.factory(**hyperparams)


def inject(name: str, **hyperparams: Any) -> optax.GradientTransformationExtraArgs:
    """`create` under `optax.inject_hyperparams`: hyperparameters live in the state.

    Each hyperparameter may be a schedule (a callable of the step count), and those that are
    numbers can be read and set in ``state.hyperparams``. The method's static arguments are
    handled, integers given for real hyperparameters become floats, and values are kept in
    float32 at least (optax would round a decay of 0.999 to 1 for bfloat16 parameters). Updates
    still have their parameter's type, and the state keeps its types.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> schedule = optax.linear_schedule(1.0, 0.0, 4)
      >>> optimizer = optgrad.inject("ssd", learning_rate=schedule)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.ones(2), state, jnp.zeros(2))
      >>> print(updates)
      [-0.75 -0.75]
    """
    method = get_method(name)
    check_hyperparams(method, hyperparams)
    method.factory(**hyperparams)  # refuses bad values now, not in init
    real = {
        key: value if key in method.static_args else _as_float(value)
        for key, value in hyperparams.items()
    }

    def injected(tree: chex.ArrayTree) -> optax.GradientTransformationExtraArgs:
        dtypes = [x.dtype for x in map(jnp.asarray, jax.tree.leaves(tree))]
        dtype = averages.widest_dtype(*[d for d in dtypes if jnp.issubdtype(d, jnp.floating)])
        wrapped = optax.inject_hyperparams(
            method.factory, static_args=method.static_args, hyperparam_dtype=dtype
        )
        return wrapped(**real)

    def init(params: chex.ArrayTree) -> optax.OptState:
        return injected(params).init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        optimizer = injected(updates if params is None else params)
        new_updates, new_state = optimizer.update(updates, state, params, **extra)
        like = updates if params is None else params
        return transforms.cast_like(new_updates, like), transforms.cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_float(value: Any) -> Any:
    """Integers and NumPy scalars as floats; all else as it is."""
    if isinstance(value, np.generic | int) and not isinstance(value, bool | np.bool_):
        return float(value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.float32)
    return value


def check_hyperparams(method: Method, names: Iterable[str]) -> None:
    """Raises unless ``names`` are hyperparameters of the method and none it requires is missing."""
    names = tuple(names)
    for name in names:
        method.check_hyperparameter(name)
    required = [
        k for k, p in method.hyperparameters.items() if p.default is inspect.Parameter.empty
    ]
    if missing := [k for k in required if k not in names]:
        raise UnknownHyperparameterError(
            f"{method.name} requires {', '.join(missing)}; given: {', '.join(names) or 'nothing'}"
        )

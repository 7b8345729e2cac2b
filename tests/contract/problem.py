"""Small problems, every extra argument that a method may need on them, and ways to run a method.

A family that needs an extra argument of a new kind adds one line to `BUILDERS`, nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

STEPS = 4
EXAMPLES = 3  # per batch
FEW_PARAMETERS = 100  # so few that a dense Hessian costs nothing

LossFn = Callable[[Any, Any], jax.Array]  # (params, example) -> loss of that example
Step = Callable[[Any, Any, Any], tuple[Any, Any]]
Update = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]

# Marks a property of optgrad's own families, which optax's methods need not have.
OWN = pytest.mark.methods_where(predicate=lambda method: method.family != "baselines")


# --- extra arguments -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What can be asked about a mean loss at one point, on one batch."""

    loss_fn: LossFn
    params: Any
    batch: Any  # a tree like an example, leading batch axis on every leaf

    def value_fn(self, params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(self.loss_fn, in_axes=(None, 0))(params, self.batch))

    @functools.cached_property
    def value_and_grad(self) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(self.value_fn)(self.params)

    def per_example_grads(self) -> Any:
        return optgrad.per_example_grads(self.loss_fn, self.params, self.batch)

    def gradient_variance(self) -> Any:
        return optgrad.value_grad_and_variance(self.loss_fn, self.params, self.batch)[2]

    def curvature_diagonal(self) -> Any:
        """The diagonal of the Hessian.

        For many parameters the sums of its rows, which are the same if each parameter has a loss
        of its own.
        """

        def product(v: Any) -> Any:
            return jax.jvp(jax.grad(self.value_fn), (self.params,), (v,))[1]

        flat, unravel = jax.flatten_util.ravel_pytree(self.params)
        if flat.size > FEW_PARAMETERS:
            return product(jax.tree.map(jnp.ones_like, self.params))
        columns = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0])
        return unravel(jnp.diagonal(columns(jnp.eye(flat.size, dtype=flat.dtype))))

    def residual_fn(self, params: Any) -> jax.Array:
        """One residual an example: half its square is the example's part of the mean loss.

        Where a loss may be negative (a linear one), of the same sign and slope.
        """
        losses = jax.vmap(self.loss_fn, in_axes=(None, 0))(params, self.batch)
        roots = jnp.sqrt(jnp.where(losses > 0, 2.0 * losses, 1.0))
        return jnp.where(losses > 0, roots, losses) / math.sqrt(losses.size)

    def features(self) -> Any:
        """Inputs of a linear model of the same curvature."""
        return jax.tree.map(jnp.sqrt, self.curvature_diagonal())


BUILDERS: Mapping[str, Callable[[Oracle], Any]] = {
    "value": lambda oracle: oracle.value_and_grad[0],
    "grad": lambda oracle: oracle.value_and_grad[1],
    "value_fn": lambda oracle: oracle.value_fn,
    "per_example_grads": Oracle.per_example_grads,
    "gradient_variance": Oracle.gradient_variance,
    "curvature_diagonal": Oracle.curvature_diagonal,
    "features": Oracle.features,
    "residual_fn": lambda oracle: oracle.residual_fn,
    # The parameters as outputs: the Gauss-Newton matrix is the Hessian of a convex loss.
    "outputs_fn": lambda oracle: lambda params: params,
    "out_loss_fn": lambda oracle: oracle.value_fn,
    "kfac_stats": lambda oracle: {},  # no layers: every parameter is left to the fallback
}

# A method that lists both of a pair takes either; the first is passed unless a test asks for the
# other.
EITHER = (
    ("gradient_variance", "per_example_grads"),
    ("curvature_diagonal", "features"),
    ("per_example_grads", "kfac_stats"),
)


def alternatives(method: optgrad.Method) -> list[tuple[str, str]]:
    """The pairs of keyword arguments of which the method takes either."""
    return [pair for pair in EITHER if method.needs.issuperset(pair)]


def names_of_extras(method: optgrad.Method, prefer: str | None = None) -> list[str]:
    """The keyword arguments that the method's ``update`` is given, no more than it needs."""
    names = method.needs - {"params"}
    for pair in alternatives(method):
        chosen = prefer if prefer in pair else pair[0]
        names = names - set(pair) | {chosen}
    return sorted(names)


def accepted_for(method: optgrad.Method, name: str) -> tuple[str, ...]:
    """That argument, and the one that the method takes instead of it."""
    return next((pair for pair in alternatives(method) if name in pair), (name,))


def is_function(name: str) -> bool:
    """Whether an extra argument is a function of the parameters, closed over the batch."""
    return name.endswith("_fn")


def build(method: optgrad.Method, name: str, oracle: Oracle) -> Any:
    """One extra argument."""
    if name not in BUILDERS:
        raise NotImplementedError(
            f"{method.name} needs {name!r}, which the contract suite cannot build yet: "
            f"add it to BUILDERS in {__file__}; known: {sorted(BUILDERS)}"
        )
    return BUILDERS[name](oracle)


def gradient_and_extras(
    method: optgrad.Method, loss_fn: LossFn, params: Any, batch: Any, prefer: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """The gradient at ``params`` and the extra arguments that go with it, to be traced."""
    oracle = Oracle(loss_fn, params, batch)
    names = names_of_extras(method, prefer)
    return oracle.value_and_grad[1], {name: build(method, name, oracle) for name in names}


def functions(
    method: optgrad.Method, loss_fn: LossFn, params: Any, batch: Any
) -> dict[str, Callable[[Any], Any]]:
    """Those extra arguments that are functions and cannot be passed into jit."""
    oracle = Oracle(loss_fn, params, batch)
    names = filter(is_function, names_of_extras(method))
    return {name: build(method, name, oracle) for name in names}


def arrays(
    method: optgrad.Method, loss_fn: LossFn, params: Any, batch: Any
) -> tuple[Any, dict[str, Any]]:
    """The gradient and those extra arguments that are arrays, computed under jit."""
    return _compiled_arrays(method.needs, loss_fn)(params, batch)


@functools.cache
def _compiled_arrays(needs: frozenset[str], loss_fn: LossFn) -> Callable[[Any, Any], Any]:
    method = next(m for m in optgrad.methods() if m.needs == needs)  # one for all that need these

    def compute(params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        grad, extras = gradient_and_extras(method, loss_fn, params, batch)
        return grad, {key: extra for key, extra in extras.items() if not is_function(key)}

    return jax.jit(compute)


# --- problems --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mean loss over examples, a starting point and a stream of batches."""

    loss_fn: LossFn
    params: Any
    batches: Any  # like an example, leading axes (steps, examples)

    def batch(self, step: int) -> Any:
        return jax.tree.map(lambda x: x[step], self.batches)


def _wide(x: jax.Array) -> jax.Array:
    # Types of 8 bits have no promotion.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if x.dtype.itemsize > 1 else "float32")


def quadratic_loss(params: Any, example: Any) -> jax.Array:
    """Half the squared distance to a target, with the curvatures ½, 1, 1½ in turn."""
    distances = jax.tree.map(
        lambda p, t: jnp.sum(jnp.square(_wide(p) - _wide(t))), params, example["target"]
    )
    terms = [(0.25 + 0.25 * (i % 3)) * d for i, d in enumerate(jax.tree.leaves(distances))]
    return sum(terms, start=0.0 * example["number"])


def quadratic(params: Any, *, noise: float = 0.3, steps: int = STEPS, seed: int = 0) -> Problem:
    """A quadratic on any tree of floating-point leaves, with noisy targets around 0."""
    generator = np.random.default_rng(seed)

    def target(leaf: jax.Array) -> jax.Array:
        noises = generator.standard_normal((steps, EXAMPLES, *leaf.shape))
        return jnp.asarray(noise * noises, leaf.dtype)

    # The number gives the batch a leaf where the parameters have none.
    number = jnp.zeros((steps, EXAMPLES), jnp.float32)
    return Problem(
        quadratic_loss, params, {"target": jax.tree.map(target, params), "number": number}
    )


@functools.cache
def standard() -> Problem:
    """The quadratic that most properties are tested on; its compiled steps are shared."""
    params = {
        "b": jnp.array([0.5, -1.0, 1.5], jnp.float32),
        "w": jnp.array([[1.0, -0.7, 0.3], [-0.4, 0.9, -1.2]], jnp.float32),
    }
    return quadratic(params)


def linear_loss(params: Any, example: Any) -> jax.Array:
    """A loss whose gradient is its slope, times a weight whose mean over the batch is 1."""
    terms = jax.tree.map(lambda p, s: example["weight"] * jnp.sum(p * s), params, example["slope"])
    return sum(jax.tree.leaves(terms))


def linear_batch(slope: Any) -> Any:
    """A batch on which the gradient of `linear_loss` is ``slope``, everywhere."""
    weights = jnp.linspace(0.5, 1.5, EXAMPLES, dtype=jnp.float32)
    slopes = jax.tree.map(lambda s: jnp.broadcast_to(s, (EXAMPLES, *s.shape)), slope)
    return {"slope": slopes, "weight": weights}


def logistic_loss(params: Any, example: Any) -> jax.Array:
    """Regularised logistic loss of one labelled example, label ±1."""
    margin = example["label"] * (jnp.dot(example["x"], params["w"]) + params["b"])
    penalty = 0.05 * (jnp.sum(params["w"] ** 2) + params["b"] ** 2)
    return jnp.logaddexp(0.0, -margin) + penalty


def logistic(examples: int = 24, features: int = 3) -> Problem:
    """Logistic regression on overlapping classes; one batch, which is the whole data set."""
    generator = np.random.default_rng(0)
    label = np.where(np.arange(examples) % 2, 1.0, -1.0)
    x = generator.standard_normal((examples, features)) + 0.8 * label[:, None]
    batches = {"x": jnp.asarray(x[None], jnp.float32), "label": jnp.asarray(label[None])}
    params = {"w": jnp.array([-1.5, 1.0, -1.0], jnp.float32), "b": jnp.array(1.0, jnp.float32)}
    return Problem(logistic_loss, params, jax.tree.map(lambda a: a.astype(jnp.float32), batches))


# --- odd trees -------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


class Network(NamedTuple):
    first: Layer
    second: Any


def odd_trees() -> dict[str, Any]:
    """Pytrees that a user may hand over, by name; those with leaves begin with the same two."""
    pair, scalar = plain_leaves()
    return {
        "array": pair,
        "scalar": scalar,
        "tuple": (pair, (scalar,)),
        "namedtuple": Network(Layer(pair, scalar), {"third": []}),
        "none": {"absent": None, "nested": [None, pair], "present": scalar},
        "masked_node": {"first": pair, "masked": optax.MaskedNode(), "second": scalar},
        "zero_size": {"a": pair, "b": scalar, "c": jnp.zeros((0, 3), jnp.float32)},
        "deep": functools.reduce(lambda tree, _: {"only": (tree,)}, range(100), [pair, scalar]),
        "empty": {},
        "only_none": (None, {"masked": optax.MaskedNode()}),
    }


def plain_leaves() -> list[Any]:
    return [jnp.array([0.5, -1.0], jnp.float32), jnp.array(0.7, jnp.float32)]


# --- ways to run a method --------------------------------------------------------------------


def tuned(method: optgrad.Method) -> tuple[str, float] | None:
    """The real hyperparameter that a test may vary, and a good value of it."""
    if method.tunes is not None:
        name, low, high = method.tunes
        return name, float(method.test_hyperparams.get(name, math.sqrt(low * high)))
    if "learning_rate" in method.hyperparameters:
        return "learning_rate", float(method.test_hyperparams.get("learning_rate", 1.0))
    return None


def hyperparams(method: optgrad.Method, **changes: Any) -> dict[str, Any]:
    """The record's hyperparameters for tests, the tuned one always among them, with changes."""
    return {**dict([tuned(method)] if tuned(method) else []), **method.test_hyperparams, **changes}


def real_hyperparameters(method: optgrad.Method) -> dict[str, float]:
    """The defaults of all hyperparameters that are real numbers."""
    return {
        name: parameter.default
        for name, parameter in method.hyperparameters.items()
        if type(parameter.default) is float and name not in method.static_args
    }


def create(method: optgrad.Method, **changes: Any) -> optax.GradientTransformationExtraArgs:
    return optgrad.create(method.name, **hyperparams(method, **changes))


def make_step(
    method: optgrad.Method,
    optimizer: Any,
    loss_fn: LossFn = quadratic_loss,
    prefer: str | None = None,
) -> Step:
    """A whole training step to be traced, (params, state, batch) -> (params, state)."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grad, extras = gradient_and_extras(method, loss_fn, params, batch, prefer)
        updates, state = optimizer.update(grad, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return step


def scan(step: Step, params: Any, state: Any, batches: Any) -> tuple[Any, Any]:
    """A run of such steps in `jax.lax.scan`."""

    def body(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
        return step(*carry, batch), None

    return jax.lax.scan(body, (params, state), batches)[0]


def make_update(method: optgrad.Method, optimizer: Any, loss_fn: LossFn = quadratic_loss) -> Update:
    """``optimizer.update`` alone, (grad, state, params, extras, batch) -> (updates, state).

    The extra arguments that are arrays are passed in; the functions are built from the batch.
    """

    def update(grad: Any, state: Any, params: Any, extras: Any, batch: Any) -> tuple[Any, Any]:
        closures = functions(method, loss_fn, params, batch)
        return optimizer.update(grad, state, params, **extras, **closures)

    return update


class Run(NamedTuple):
    """What a run leaves."""

    params: Any
    state: Any
    updates: list[Any]


_apply_updates = jax.jit(optax.apply_updates)


def run(
    method: optgrad.Method, update: Update, state: Any, single: Problem, steps: int = STEPS
) -> Run:
    """A run in a Python loop. Only ``update`` is the method's, all else is compiled once."""
    params, every = single.params, []
    for t in range(steps):
        batch = single.batch(t)
        grad, extras = arrays(method, single.loss_fn, params, batch)
        updates, state = update(grad, state, params, extras, batch)
        params = _apply_updates(params, updates)
        every.append(updates)
    return Run(params, state, every)


def cheap(method: optgrad.Method, update: Update) -> Update:
    """For runs of two steps on shapes of their own, where compiling is most of the cost.

    Operation by operation, each is compiled once for all methods. Methods that call functions of
    the parameters, in loops of their own, are compiled as a whole.
    """
    return jax.jit(update) if any(map(is_function, method.needs)) else update


@functools.cache
def standard_update(name: str, factor: float = 1.0) -> Update:
    """The compiled update of a method, shared by the tests of a process.

    Args:
      name: of the method.
      factor: of its tuned hyperparameter.
    """
    method = optgrad.get_method(name)
    return jax.jit(make_update(method, create(method, **scaled(method, factor))))


def scaled(method: optgrad.Method, factor: float) -> dict[str, float]:
    """The tuned hyperparameter, a multiple of its good value."""
    return {tuned(method)[0]: factor * tuned(method)[1]} if tuned(method) else {}


def standard_run(method: optgrad.Method, steps: int = STEPS, factor: float = 1.0) -> Run:
    """A run on the standard problem."""
    single = standard()
    state = create(method, **scaled(method, factor)).init(single.params)
    return run(method, standard_update(method.name, factor), state, single, steps)


def run_of(method: optgrad.Method, optimizer: Any, steps: int = STEPS) -> Run:
    """A run of some optimizer that takes the method's extra arguments, on the standard problem."""
    single = standard()
    update = jax.jit(make_update(method, optimizer))
    return run(method, update, optimizer.init(single.params), single, steps)


@functools.cache
def donated_step(name: str) -> tuple[Step, list[str]]:
    """The compiled training step, parameters and state donated, and the list of its traces."""
    method = optgrad.get_method(name)
    step = make_step(method, create(method))
    traces = []

    def traced(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        traces.append(name)
        return step(params, state, batch)

    return jax.jit(traced, donate_argnums=(0, 1)), traces


@functools.cache
def linear_update(name: str) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The compiled step of a method on `linear_loss`, (params, state, slope) -> …"""
    method = optgrad.get_method(name)
    step = make_step(method, create(method), linear_loss)
    return jax.jit(lambda params, state, slope: step(params, state, linear_batch(slope)))


def linear_run(method: optgrad.Method, slopes: list[Any], start: Any = None) -> tuple[Any, Any]:
    """Parameters and state of a run that is handed these gradients, by default from ½ to 1½."""
    params = linear_start() if start is None else start
    state = create(method).init(params)
    for slope in slopes:
        params, state = linear_update(method.name)(params, state, slope)
    return params, state


def linear_start() -> Any:
    """Parameters of ½ to 1½."""
    return jax.tree.map(lambda s: jnp.linspace(0.5, 1.5, s.size).reshape(s.shape), slope_like(0.0))


def slope_like(value: float, **entries: float) -> Any:
    """A gradient for `linear_run`, all ``value`` but for the first entry of the named leaves."""
    leaves = {"b": np.full(3, value, np.float32), "w": np.full((2, 3), value, np.float32)}
    for key, entry in entries.items():
        leaves[key].flat[0] = entry
    return jax.tree.map(jnp.asarray, leaves)


def others(tree: Any, key: str) -> Any:
    """All entries of such a tree but the first of one leaf, as one flat array."""
    kept = [np.ravel(x)[1:] if k == key else np.ravel(x) for k, x in sorted(tree.items())]
    return np.concatenate(kept)


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether no coordinate's update depends on another coordinate's gradient, nor on the loss.

    Found by trying, past the first steps in which some methods only gather statistics: one entry
    of the gradients is changed, and no other parameter may move. On a linear loss, what depends on
    the loss may look as if it did not; it says that it needs it.
    """
    method = optgrad.get_method(name)
    if "value" in method.needs or any(map(is_function, method.needs)):
        return False
    pairs = 8 * ((0.3, 2.0), (-0.2, 0.7), (0.1, -1.0))
    plain = linear_run(method, [slope_like(s) for s, _ in pairs])[0]
    changed = linear_run(method, [slope_like(s, w=w) for s, w in pairs])[0]
    return np.array_equal(others(plain, "w"), others(changed, "w"))


# --- comparisons -----------------------------------------------------------------------------


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """The same structure, shapes and dtypes, and numbers that agree.

    Numbers of less than 32 bits may differ by a few of their roundings.
    """

    def same(x: np.ndarray, y: np.ndarray, dtype: Any, where: str) -> None:
        narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
        coarse = 4 * float(jnp.finfo(dtype).eps) if narrow else 0.0
        np.testing.assert_allclose(x, y, rtol=max(rtol, coarse), atol=atol, err_msg=where)

    _compare(actual, expected, same)


def assert_identical(actual: Any, expected: Any) -> None:
    """The same structure, shapes, dtypes and numbers, bit by bit (NaN equals NaN)."""

    def same(x: np.ndarray, y: np.ndarray, dtype: Any, where: str) -> None:
        del dtype
        np.testing.assert_array_equal(x, y, err_msg=where)

    _compare(actual, expected, same)


def _compare(actual: Any, expected: Any, same: Callable[..., None]) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        found, wanted = np.asarray(x), np.asarray(y)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), where
        number = np.float64 if jnp.issubdtype(found.dtype, jnp.floating) else found.dtype
        same(found.astype(number), wanted.astype(number), found.dtype, where)


def assert_finite(tree: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(np.asarray(x).astype(np.float64))), f"{where} = {x}"


def assert_no_nan(tree: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path)
        assert not np.any(np.isnan(np.asarray(x).astype(np.float64))), f"{where} = {x}"


def avals(tree: Any) -> list[tuple[str, Any, tuple[int, ...], bool]]:
    """Path, dtype, shape and weak type of every leaf: what a compiled function is specific to."""
    return [
        (jax.tree_util.keystr(path), x.dtype, x.shape, bool(x.weak_type))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]

"""Problems that are one function: the test functions with noise, and any function of a user's."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import checks
from optgrad.experiments import functions, landscapes
from optgrad.experiments.problems import Problem, step_keys
from optgrad.experiments.scores import LOSS, Score

EXCESS = Score("excess", is_exact=True)
SADDLES = ("plain", "ill_conditioned")


def function_problem(
    function: Callable[[Any], chex.Array],
    start: Any,
    *,
    batch_size: int = 1,
    name: str = "function",
    noise: float = 0.0,
    minimum: float | None = None,
    minimizers: Sequence[Any] = (),
    residuals: Callable[[Any], chex.Array] | None = None,
) -> Problem:
    r"""A function f of the parameters, whose gradient is seen through Gaussian noise.

    .. math::
      \ell_k(\theta) = f(\theta) + n_k^\top\theta, \qquad n_k \sim \mathcal N(0, \sigma^2 I)

    is the loss of an example, so that the gradient of a batch of B fresh examples is
    ∇f + N(0, σ²/B · I). Without noise all examples are equal and a batch of one is enough.

    Args:
      function: parameters -> f, in JAX.
      start: the first parameters, any pytree of floating-point numbers; or key -> such a pytree,
        for starts that differ by seed.
      batch_size: B ≥ 1.
      name: for reports.
      noise: σ ≥ 0.
      minimum: the smallest value of f, if known.
      minimizers: parameters at which f has it, as far as known.
      residuals: parameters -> r with f = ½ Σ r², for Gauss-Newton methods; those that need the
        residuals themselves refuse a problem with noise, which is no sum of squares.

    Returns:
      The problem. Its metrics are without noise, ``loss`` = f; with a minimum ``excess`` = f − f*,
      by which it is then judged; with minimizers ``distance`` to the nearest.

    Raises:
      TypeError, ValueError: for a batch size or noise outside its range.

    Examples:
      >>> problem = function_problem(lambda x: jnp.sum(x**2), np.ones(3), minimum=0.0)
      >>> float(problem.evaluate(problem.init(jax.random.key(0)), None, "test", 0)["excess"])
      3.0
    """
    checks.check_count("batch_size", batch_size, 1)
    checks.check_in_range("noise", noise, 0.0, high_open=True)

    def init(key: chex.PRNGKey) -> Any:
        first = start(key) if callable(start) else start
        return jax.tree.map(lambda x: jnp.asarray(x, float), first)

    template = jax.eval_shape(init, jax.random.key(0))

    def batch(data: Any, key: chex.PRNGKey) -> Any:
        leaves, tree = jax.tree.flatten(template)
        keys = jax.random.split(key, len(leaves))
        noises = [
            noise * jax.random.normal(k, (batch_size, *leaf.shape), leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, noises)

    def loss(params: Any, batch: Any) -> chex.Array:
        return example_loss(params, _mean(batch))

    def example_loss(params: Any, example: Any) -> chex.Array:
        return function(params) + optax.tree.vdot(example, params)

    def outputs(params: Any, batch: Any) -> Any:
        assert residuals is not None
        return residuals(params), params  # the noise is linear in the parameters

    def out_loss(z: Any, batch: Any) -> chex.Array:
        return 0.5 * jnp.sum(z[0] ** 2) + optax.tree.vdot(_mean(batch), z[1])

    def evaluate(params: Any, data: Any, split: str, index: chex.Numeric) -> dict[str, chex.Array]:
        found = {"loss": function(params), "count": jnp.ones(())}
        if minimum is not None:
            found["excess"] = found["loss"] - minimum
        if minimizers:
            offsets = [jax.tree.map(lambda x, y: x - y, params, place) for place in minimizers]
            found["distance"] = jnp.min(jnp.stack([optax.tree.norm(x) for x in offsets]))
        return found

    return Problem(
        name=name,
        data=None,
        init=init,
        batches=keys_of_steps,
        batch=batch,
        loss=loss,
        example_loss=example_loss,
        splits={"test": 1},
        evaluate=evaluate,
        outputs=outputs if residuals else None,
        out_loss=out_loss if residuals else None,
        residuals=(lambda params, batch: residuals(params)) if residuals and not noise else None,
        score=Score(LOSS.metric, is_exact=True) if minimum is None else EXCESS,
    )


def keys_of_steps(
    data: Any, key: chex.PRNGKey, first_step: chex.Numeric, num_steps: int
) -> chex.PRNGKey:
    """A key for each step, by key and step alone: `Problem.batches` where examples are fresh."""
    return step_keys(key, first_step + jnp.arange(num_steps))


def _mean(batch: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), batch)


# The test functions -----------------------------------------------------------------------------


def yao_convex(*, batch_size: int = 1, noise: float = 0.0) -> Problem:
    """½wᵀQw with Q = diag(1000, 1) from (−1, 2): Yao, figures 3 and 4.

    Args:
      batch_size: as in `function_problem`.
      noise: as in `function_problem`.
    """
    return function_problem(
        functions.yao_convex,
        functions.YAO_CONVEX_START,
        batch_size=batch_size,
        name="Yao's convex problem" + _with(noise),
        noise=noise,
        minimum=0.0,
        minimizers=[np.zeros(2)],
        residuals=functions.yao_convex_residuals,
    )


def rosenbrock(*, batch_size: int = 1, dimension: int = 2, noise: float = 0.0) -> Problem:
    """Rosenbrock's function from (−1, 0, −1, 0, …): in two dimensions Yao's, figures 5 to 9.

    Args:
      batch_size: as in `function_problem`.
      dimension: n ≥ 2; from four on there is a local minimum near (−1, 1, …, 1).
      noise: as in `function_problem`.
    """
    checks.check_count("dimension", dimension, 2)
    return function_problem(
        functions.rosenbrock_chain,
        np.resize(functions.YAO_ROSENBROCK_START, dimension),
        batch_size=batch_size,
        name=f"Rosenbrock's function, d = {dimension}" + _with(noise),
        noise=noise,
        minimum=0.0,
        minimizers=[np.ones(dimension)],
        residuals=functions.rosenbrock_residuals,
    )


def lattice(
    *, batch_size: int = 1, function: str = "beale", side: int = 9, noise: float | None = None
) -> Problem:
    """A test function of Duda's lattices, from a random point of the lattice for each seed.

    Args:
      batch_size: as in `function_problem`.
      function: a name from `landscapes.landscapes`.
      side: points of the lattice in each coordinate, at least 2.
      noise: as in `function_problem`; None: what is usual for the function.
    """
    found = landscapes.landscapes()
    checks.check_one_of("function", function, found)
    checks.check_count("side", side, 2)
    landscape = found[function]
    noise = landscape.noise if noise is None else noise
    starts = landscape.lattice(side)

    def start(key: chex.PRNGKey) -> chex.Array:
        return jax.random.choice(key, jnp.asarray(starts, float), axis=0)

    return function_problem(
        landscape.function,
        start,
        batch_size=batch_size,
        name=f"{landscape.title} from a lattice" + _with(noise),
        noise=noise,
        minimum=landscape.minimum,
        minimizers=[np.array(place) for place in landscape.minimizers],
        residuals=landscape.residuals,
    )


def saddle(
    *, batch_size: int = 1, shape: str = "plain", distance: float = 0.01, noise: float = 0.0
) -> Problem:
    """A saddle at 0 between two minima at (0, ±√2), from (1, distance to its stable manifold).

    Args:
      batch_size: as in `function_problem`.
      shape: ``"plain"``, x² − y² + y⁴/4, or ``"ill_conditioned"``, 50x² + 0.01 (−y² + y⁴/4).
      distance: y₀; at 0 gradients alone never leave the manifold.
      noise: as in `function_problem`.
    """
    checks.check_one_of("shape", shape, SADDLES)
    checks.check_in_range("distance", distance, -np.inf, np.inf, low_open=True, high_open=True)
    plain = shape == "plain"
    value = functions.saddle_of if plain else functions.ill_conditioned_saddle_of
    return function_problem(
        lambda x: value(x[0], x[1]),
        np.array([1.0, distance]),
        batch_size=batch_size,
        name=f"{'saddle' if plain else 'ill-conditioned saddle'} from {distance:g}" + _with(noise),
        noise=noise,
        minimum=-1.0 if plain else -0.01,
        minimizers=[np.array([0.0, side * 2**0.5]) for side in (1, -1)],
    )


def _with(noise: float) -> str:
    checks.check_in_range("noise", noise, 0.0, high_open=True)
    return f", noise {noise:g}" if noise else ""

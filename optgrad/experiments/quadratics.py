"""The stochastic quadratic problems of Balles & Hennig, section 2.4 and figure 2."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from optgrad.core import checks
from optgrad.experiments.function_problems import EXCESS, keys_of_steps
from optgrad.experiments.problems import Problem

SPECTRA = ("uniform", "clustered")
_LARGE_SHARE = 0.1  # of the eigenvalues of a clustered spectrum


def noisy_quadratic(
    *,
    batch_size: int = 1,
    dimension: int = 100,
    spectrum: str = "uniform",
    rotated: bool = True,
    noise: float = 0.1,
    seed: int = 0,
) -> Problem:
    r"""Quadratic of which every example has its own minimizer.

    .. math::
      \ell(\theta, x) = \tfrac12 (\theta - x)^\top Q (\theta - x),
      \qquad x \sim \mathcal N(0, \nu^2 I)

    so that the expected loss is ½θᵀQθ + ½ν² tr Q and the gradient of an example is N(Qθ, ν²QQ).
    Every step has fresh examples; a run starts at θ₀ ~ N(0, I) by its seed (the paper does not
    say where it starts).

    Args:
      batch_size: B ≥ 1 examples a step.
      dimension: d ≥ 1.
      spectrum: eigenvalues of Q: ``"uniform"`` in [0.1, 1.1], or ``"clustered"``: 90 % uniform in
        [0, 1] and 10 % in [30, 60].
      rotated: whether the eigenvectors are random; otherwise they are the axes.
      noise: ν ≥ 0.
      seed: of Q, which is the same in all runs.

    Returns:
      The problem; its metrics: ``loss``, the expected loss; ``excess``, the same less what no θ can
      change, ½θᵀQθ, by which it is judged; ``distance`` = ‖θ‖.

    Raises:
      TypeError, ValueError: for an argument outside its range.

    Examples:
      >>> problem = noisy_quadratic(dimension=20, noise=0.0)
      >>> metrics = problem.evaluate(jnp.zeros(20), problem.data, "test", 0)
      >>> float(metrics["excess"]), float(metrics["loss"])
      (0.0, 0.0)

    References:
      L. Balles and P. Hennig, "Dissecting Adam", 2018, section 2.4 and figure 2.
    """
    checks.check_count("batch_size", batch_size, 1)
    checks.check_in_range("noise", noise, 0.0, high_open=True)
    checks.check_one_of("rotated", rotated, (True, False))
    exact = hessian_factor(dimension, spectrum, rotated=rotated, seed=seed)
    floor = 0.5 * noise**2 * float(np.sum(exact**2))  # tr Q = ‖F‖²

    def times_factor(x: chex.Array) -> chex.Array:
        return jnp.dot(x, jnp.asarray(exact.T, x.dtype), precision=jax.lax.Precision.HIGHEST)

    def batch(data: Any, key: chex.PRNGKey) -> chex.Array:
        """Fx for every example."""
        return times_factor(noise * jax.random.normal(key, (batch_size, dimension), float))

    def outputs(params: chex.Array, batch: Any) -> chex.Array:
        return times_factor(params)

    def out_loss(z: chex.Array, batch: chex.Array) -> chex.Array:
        return 0.5 * jnp.mean(jnp.sum((z - batch) ** 2, axis=-1))

    def example_loss(params: chex.Array, example: chex.Array) -> chex.Array:
        return out_loss(times_factor(params), example[None])

    def evaluate(
        params: chex.Array, data: Any, split: str, index: chex.Numeric
    ) -> dict[str, chex.Array]:
        excess = 0.5 * jnp.sum(times_factor(params) ** 2)
        return {
            "loss": excess + floor,
            "excess": excess,
            "distance": jnp.linalg.norm(params),
            "count": jnp.ones(()),
        }

    basis = "rotated" if rotated else "axis-aligned"
    return Problem(
        name=f"{basis} quadratic, {spectrum}, d = {dimension}, ν = {noise:g}",
        data=None,
        init=lambda key: jax.random.normal(key, (dimension,), float),
        batches=keys_of_steps,
        batch=batch,
        loss=lambda params, batch: out_loss(times_factor(params), batch),
        example_loss=example_loss,
        splits={"test": 1},
        evaluate=evaluate,
        outputs=outputs,
        out_loss=out_loss,
        residuals=lambda params, batch: (times_factor(params) - batch) / len(batch) ** 0.5,
        score=EXCESS,
    )


def hessian_factor(
    dimension: int, spectrum: str = "uniform", *, rotated: bool = True, seed: int = 0
) -> npt.NDArray[np.float64]:
    """F (d, d) with Q = FᵀF = RΛRᵀ; R is uniformly distributed over the orthogonal matrices.

    Examples:
      >>> factor = hessian_factor(3, rotated=False)
      >>> bool(np.all(factor == np.diag(np.diag(factor))))
      True
    """
    checks.check_count("dimension", dimension, 1)
    checks.check_count("seed", seed, 0)
    generator = np.random.default_rng(seed)
    roots = np.sqrt(eigenvalues(dimension, spectrum, generator))
    if not rotated:
        return np.diag(roots)
    return np.asarray(roots[:, None] * random_rotation(dimension, generator).T)


def random_rotation(dimension: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """A matrix that is uniformly distributed over the orthogonal ones (Haar), shape (d, d)."""
    q, r = np.linalg.qr(generator.normal(size=(dimension, dimension)))
    return np.asarray(q * np.sign(np.diag(r)))  # without it, QR's signs are not uniform


def eigenvalues(
    dimension: int, spectrum: str, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The eigenvalues of Q, shape (d,)."""
    checks.check_one_of("spectrum", spectrum, SPECTRA)
    if spectrum == "uniform":
        return generator.uniform(0.1, 1.1, dimension)
    large = round(_LARGE_SHARE * dimension)
    small = generator.uniform(0.0, 1.0, dimension - large)
    return np.concatenate([small, generator.uniform(30.0, 60.0, large)])

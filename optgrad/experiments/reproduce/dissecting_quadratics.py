"""SGD and sign descent on stochastic quadratics, each with its exactly optimal step size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from optgrad.experiments import quadratics
from optgrad.experiments.reproduce import dissecting_signs as signs

Array = npt.NDArray[Any]
SPECTRA = {"well-conditioned": "uniform", "ill-conditioned": "clustered"}
BASES = ("rotated", "axis-aligned")
NOISES = (0.0, 0.1, 4.0)
METHODS = ("SGD", "SSD")


class Quadratics(NamedTuple):
    """L(θ) = ½ (θ − x*)ᵀQ(θ − x*) with x* = 0, and a start, by seed; leading axis S."""

    matrix: Array  # Q, (S, d, d)
    start: Array  # θ₀, (S, d)
    eigenvalues: Array  # (S, d)


def random_problems(spectrum: str, basis: str, dimension: int, seeds: int) -> Quadratics:
    """Random problems; both bases of a seed have the same eigenvalues and L(θ₀)."""
    drawn = [_quadratic(spectrum, basis, dimension, seed) for seed in range(seeds)]
    return Quadratics(*(np.stack(column) for column in zip(*drawn, strict=True)))


def _quadratic(spectrum: str, basis: str, dimension: int, seed: int) -> tuple[Array, Array, Array]:
    generator = np.random.default_rng(seed)
    start = generator.standard_normal(dimension)
    eigenvalues = quadratics.eigenvalues(dimension, SPECTRA[spectrum], generator)
    if basis == "axis-aligned":
        return np.diag(eigenvalues), start, eigenvalues
    vectors = quadratics.random_rotation(dimension, generator)
    return (vectors * eigenvalues) @ vectors.T, vectors @ start, eigenvalues


# Expectations of one step -----------------------------------------------------------------------


class Expected(NamedTuple):
    """What decides about a direction z: the optimal step is −slope/curvature."""

    slope: Any  # ∇LᵀE[z]
    curvature: Any  # E[zᵀQz]

    @property
    def step_size(self) -> Any:
        """α* of eq. 10; 0 at the minimum."""
        return jnp.where(self.curvature > 0, -self.slope / self.curvature, 0.0)

    @property
    def improvement(self) -> Any:
        """The expected decrease I(z) of eq. 11."""
        return jnp.where(self.curvature > 0, self.slope**2 / (2 * self.curvature), 0.0)


def expected_sgd(matrix: Any, gradient: Any, noise: float) -> Expected:
    """For z = g ~ N(∇L, ν²QQ): E[gᵀQg] = ∇LᵀQ∇L + ν² tr(QQQ)."""
    curvature = gradient @ matrix @ gradient + noise**2 * jnp.sum((matrix @ matrix) * matrix)
    return Expected(gradient @ gradient, curvature)


class Pairs(NamedTuple):
    """The pairs i < j of coordinates whose noise is correlated."""

    rows: Any
    columns: Any
    rule: signs.Quadrature


def correlated_pairs(matrix: Any) -> Pairs:
    """All pairs, with the correlations of the covariance QQ."""
    covariance = matrix @ matrix
    deviation = jnp.sqrt(jnp.diag(covariance))
    rows, columns = np.triu_indices(matrix.shape[-1], 1)
    correlation = covariance[rows, columns] / (deviation[rows] * deviation[columns])
    return Pairs(rows, columns, signs.quadrature(correlation))


def expected_ssd(matrix: Any, gradient: Any, noise: Any, pairs: Pairs | None) -> Expected:
    """For z = sign(g): E[s_i s_j] by the bivariate normal orthant probability.

    Args:
      matrix: Q.
      gradient: ∇L.
      noise: ν > 0.
      pairs: those of `correlated_pairs`; None for a diagonal Q, where there are none.
    """
    h = gradient / (noise * jnp.sqrt(jnp.sum(matrix * matrix, axis=-1)))
    mean = signs.expected_sign(h)
    curvature = mean @ matrix @ mean + jnp.sum(jnp.diag(matrix) * (1 - mean**2))
    if pairs is not None:
        i, j = pairs.rows, pairs.columns
        curvature += 2 * jnp.sum(matrix[i, j] * signs.sign_covariance(h[i], h[j], pairs.rule))
    return Expected(gradient @ mean, curvature)


def certain_ssd(matrix: Any, gradient: Any) -> Expected:
    """For z = sign(∇L), without noise."""
    certain = jnp.sign(gradient)
    return Expected(gradient @ certain, certain @ matrix @ certain)


# Runs -------------------------------------------------------------------------------------------


def descend(problem: Quadratics, noise: float, length: int, *, diagonal: bool) -> Array:
    """L(θ_t) − L(x*) of both methods from t = 0, shape (S, 2, length + 1), on the same noise."""
    kind = "certain" if not noise else "diagonal" if diagonal else "full"
    seeds = jnp.arange(len(problem.start))
    return np.asarray(_descend(problem.matrix, problem.start, seeds, noise, length, kind))


@functools.partial(jax.jit, static_argnames=("length", "kind"))
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None, None))
def _descend(  # noqa: PLR0917  vmap takes positions
    matrix: Any, start: Any, seed: Any, noise: Any, length: int, kind: str
) -> Any:
    pairs = correlated_pairs(matrix) if kind == "full" else None

    def step(params: Any, t: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), t)
        drawn = noise * jax.random.normal(key, start.shape, start.dtype)
        gradients = params @ matrix
        noisy = gradients - drawn @ matrix
        sgd = expected_sgd(matrix, gradients[0], noise)
        ssd = (
            certain_ssd(matrix, gradients[1])
            if kind == "certain"
            else expected_ssd(matrix, gradients[1], noise, pairs)
        )
        steps = jnp.stack([sgd.step_size * noisy[0], ssd.step_size * jnp.sign(noisy[1])])
        return params + steps, loss(params + steps)

    def loss(params: Any) -> Any:
        return 0.5 * jnp.sum(params * (params @ matrix), axis=-1)

    both = jnp.stack([start, start])
    _, values = jax.lax.scan(step, both, jnp.arange(length))
    return jnp.concatenate([loss(both)[None], values]).T


# One step: closed forms and simulation ----------------------------------------------------------


def improvements(problem: Quadratics, noise: float, samples: int) -> dict[str, Array]:
    """Expected decreases of one step from the starts: closed forms and simulation, each (S,)."""
    seeds = jnp.arange(len(problem.start))
    found = _improvements(problem.matrix, problem.start, seeds, noise, samples)
    return {name: np.asarray(values) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames=("samples",))
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def _improvements(matrix: Any, start: Any, seed: Any, noise: Any, samples: int) -> Any:
    gradient = matrix @ start
    sgd = expected_sgd(matrix, gradient, noise)
    ssd = expected_ssd(matrix, gradient, noise, correlated_pairs(matrix))
    drawn = jax.random.normal(jax.random.key(seed), (samples, len(start)), start.dtype)
    g = gradient - noise * drawn @ matrix

    def decrease(z: Any, step_size: Any) -> tuple[Any, Any]:
        """Mean and standard error over the samples; L is exact to second order."""
        change = -step_size * z @ gradient - 0.5 * step_size**2 * jnp.sum(z * (z @ matrix), -1)
        return jnp.mean(change), jnp.std(change) / np.sqrt(samples)

    simulated = {"sgd": decrease(g, sgd.step_size), "ssd": decrease(jnp.sign(g), ssd.step_size)}
    return {
        "sgd": sgd.improvement,
        "sgd_simulated": simulated["sgd"][0],
        "sgd_error": simulated["sgd"][1],
        "ssd": ssd.improvement,
        "ssd_simulated": simulated["ssd"][0],
        "ssd_error": simulated["ssd"][1],
        "ssd_bound": ssd.slope**2 / (2 * jnp.sum(jnp.abs(matrix))),
    }

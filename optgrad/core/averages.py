r"""Exponentially weighted means, variances and covariances of pytrees, without cancellation.

With weights :math:`w_i = (1-\beta)\beta^{t-i}` and their sum :math:`s_t = \sum_i w_i`, the
normalised mean and the normalised central second moments of samples :math:`x_i, y_i` are

.. math::
  m_t = \frac{1}{s_t}\sum_i w_i x_i, \qquad
  c_t = \frac{1}{s_t}\sum_i w_i (x_i - m_t)(y_i - n_t).

They equal the bias-corrected raw averages and their combinations
(:math:`c = \overline{xy}/s - \bar x\bar y/s^2`), but are carried in the central form

.. math::
  s &\leftarrow \beta s + (1-\beta), \quad \kappa = (1-\beta)/s \\
  m &\leftarrow m + \kappa (x - m) \\
  c &\leftarrow (1-\kappa)\,c + \frac{\kappa}{1-\kappa}\,(x - m)(y - n)
      \quad\text{(with the new means)}

which never subtracts two large numbers: a variance is non-negative by construction, in every
precision. The moments are written through the *new* means, so that XLA can update both in place.
Update the means first. (The price is paid by decays that nobody uses: for β between 0 and 0.01 the
new mean is nearly the sample, and a moment has a relative error of about eps/β.)

Here :math:`s_t = 1-\beta^t`. With a decay that changes from step to step the current one enters
these formulas; every κ lies in (0, 1], so mean and moments remain those of one set of weights that
sum to 1. Initial statistics that count as a full prior have :math:`s = 1` and κ = 1 − β throughout.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optgrad.core import leafwise

# What a record says of a method whose vectors are averages.
LOW_PRECISION = (
    "averages: by state_dtype, which rounds to nearest, for decays up to 0.99; by "
    "low_precision_state for any decay"
)


class SampleWeights(NamedTuple):
    """How much one new sample counts; scalars of the widest float type in use."""

    total: chex.Array  # s = 1 − βᵗ in (0, 1]: sum of all weights so far, shape ()
    new: chex.Array  # κ in (0, 1]: weight of the new sample in the normalised mean, shape ()
    old: chex.Array  # 1 − κ, shape ()
    deviation: chex.Array  # κ/(1 − κ), weight of (x − new mean)²; 0 at the first sample, shape ()


def scalar_dtype() -> Any:
    """The type of the scalars that drive a step: float32, or float64 where jax has it enabled."""
    return jnp.result_type(float)


def sample_weights(count: chex.Array, decay: chex.Numeric) -> SampleWeights:
    """Weights of the sample number ``count``.

    Args:
      count: t ≥ 1, the number of samples including the new one.
      decay: β in [0, 1), a number or a traced scalar.

    Returns:
      The coefficients of the recursions above. At the first sample κ is 1 and 1 − κ is 0, exactly;
      neither is ever formed by a subtraction that cancels. A decay that rounds to 1 in that type
      gives all samples the same weight, κ = 1/t.

    Examples:
      >>> second = sample_weights(jnp.array(2), 0.9)
      >>> print(f"{second.total:.4f} {second.new:.4f} {second.old:.4f}")
      0.1900 0.5263 0.4737
    """
    dtype = scalar_dtype()
    tiny = np.finfo(dtype).tiny  # β = 0 is a decay like another, but has no logarithm
    if isinstance(decay, jax.Array):
        log_beta = jnp.log(jnp.maximum(decay.astype(dtype), tiny))
    else:  # in double precision, where 1 − β and log β agree however close β is to 1
        log_beta = jnp.asarray(np.log(max(float(decay), float(tiny))), dtype)
    beta, fresh = jnp.asarray(decay, dtype), jnp.asarray(1 - decay, dtype)
    past = -beta * jnp.expm1((count - 1) * log_beta)  # β(1 − βᵗ⁻¹), 0 at the first sample
    # A decay that rounds to 1 is the limit in which all samples count the same and s is 0.
    is_uniform = fresh == 0
    past = jnp.where(is_uniform, (count - 1).astype(dtype), past)
    weights = _weights(past, jnp.where(is_uniform, 1.0, fresh))
    return weights._replace(total=jnp.where(is_uniform, 0.0, weights.total))


def constant_sample_weights(decay: chex.Numeric) -> SampleWeights:
    """Weights of any sample where the initial statistics are a full prior: s = 1, κ = 1 − β."""
    dtype = scalar_dtype()
    return _weights(jnp.asarray(decay, dtype), jnp.asarray(1 - decay, dtype))


def _weights(past: chex.Array, fresh: chex.Array) -> SampleWeights:
    total = past + fresh
    # A past below the unit roundoff counts as none: its coefficient would enlarge the rounding of
    # x − m, which is 0 in exact arithmetic.
    has_past = past > np.finfo(total.dtype).eps * total
    deviation = jnp.where(has_past, fresh / jnp.where(has_past, past, 1.0), 0.0)
    return SampleWeights(total, fresh / total, past / total, deviation)


def zeros_like_average(tree: chex.ArrayTree, dtype: Any | None = None) -> chex.ArrayTree:
    """A zero average for every leaf: float32 for low-precision leaves unless ``dtype`` says else.

    Examples:
      >>> zeros_like_average(jnp.ones(3, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype or average_dtype(x)), tree)


def full_like_average(
    tree: chex.ArrayTree, value: chex.Numeric, dtype: Any | None = None
) -> chex.ArrayTree:
    """A vector of equal entries, in the types of `zeros_like_average`.

    Examples:
      >>> print(full_like_average(jnp.ones(2, jnp.bfloat16), 0.5))
      [0.5 0.5]
    """
    zeros = zeros_like_average(tree, dtype)
    return jax.tree.map(lambda zero: zero + jnp.asarray(value, zero.dtype), zeros)


def average_dtype(x: Any) -> Any:
    """The type in which averages of ``x`` are kept: its own, but at least float32."""
    dtype = jnp.result_type(x)
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_narrow else jnp.promote_types(dtype, jnp.float32)


def widest_dtype(*leaves: Any) -> Any:
    """The widest type in which averages of any of these are kept: at least float32."""
    return functools.reduce(jnp.promote_types, map(average_dtype, leaves), jnp.dtype(jnp.float32))


def update_mean(
    mean: chex.ArrayTree, sample: chex.ArrayTree, weights: SampleWeights
) -> chex.ArrayTree:
    """Normalised mean after one more sample; leaf by leaf, in at least float32.

    Args:
      mean: m, the mean of the samples so far.
      sample: x, a tree of the same structure and shapes.
      weights: from `sample_weights`.

    Returns:
      m + κ(x − m), with the types of ``mean``.
    """

    def update(m: chex.Array, x: chex.Array) -> chex.Array:
        dtype = average_dtype(m)
        wide, x = m.astype(dtype), jnp.asarray(x, dtype)
        new, old = weights.new.astype(dtype), weights.old.astype(dtype)
        # From whichever end is nearer: with κ = 1 the mean is x whatever came before.
        mean = jnp.where(new > 0.5, x - old * (x - wide), wide + new * (x - wide))
        return mean.astype(m.dtype)

    return leafwise.tree_map(update, mean, sample)


def update_variance(
    variance: chex.ArrayTree,
    sample: chex.ArrayTree,
    new_mean: chex.ArrayTree,
    weights: SampleWeights,
) -> chex.ArrayTree:
    """Normalised central second moment after one more sample, from the *new* mean.

    Args:
      variance: v ≥ 0, of the samples so far.
      sample: x.
      new_mean: the mean that already contains x, from `update_mean`.
      weights: from `sample_weights`, the same as for the mean.

    Returns:
      (1−κ)v + κ/(1−κ)·(x − m)², never negative, with the types of ``variance``.
    """
    return update_covariance(variance, sample, new_mean, sample, new_mean, weights)


def update_covariance(  # noqa: PLR0917  the order of the formula: c, x, m, y, n
    covariance: chex.ArrayTree,
    sample_x: chex.ArrayTree,
    new_mean_x: chex.ArrayTree,
    sample_y: chex.ArrayTree,
    new_mean_y: chex.ArrayTree,
    weights: SampleWeights,
) -> chex.ArrayTree:
    """Normalised central co-moment after one more pair of samples, from the *new* means.

    Args:
      covariance: c, of the pairs so far.
      sample_x: x.
      new_mean_x: the mean that already contains x.
      sample_y: y.
      new_mean_y: the mean that already contains y.
      weights: from `sample_weights`, the same as for the means.

    Returns:
      (1−κ)c + κ/(1−κ)·(x − m)(y − n), with the types of ``covariance``.
    """

    def update(
        c: chex.Array, x: chex.Array, m: chex.Array, y: chex.Array, n: chex.Array
    ) -> chex.Array:
        dtype = average_dtype(c)
        deviation_x = jnp.asarray(x, dtype) - m.astype(dtype)
        deviation_y = jnp.asarray(y, dtype) - n.astype(dtype)
        old, new = weights.old.astype(dtype), weights.deviation.astype(dtype)
        fresh = new * (deviation_x * deviation_y)
        return (_times(old, c.astype(dtype)) + fresh).astype(c.dtype)

    return leafwise.tree_map(update, covariance, sample_x, new_mean_x, sample_y, new_mean_y)


def _times(weight: chex.Array, past: chex.Array) -> chex.Array:
    """The product; a past of weight 0 is forgotten even if it has overflowed."""
    return jnp.where(weight > 0, weight * past, 0.0)


def update_sum(
    total: chex.ArrayTree, sample: chex.ArrayTree, decay: chex.Numeric
) -> chex.ArrayTree:
    """Exponentially decaying sum after one more sample: decay·total + x (a momentum term).

    Args:
      total: the sum so far.
      sample: x, a tree of the same structure and shapes.
      decay: weight kept, in [0, 1].

    Returns:
      The new sum with the types of ``total``, computed in at least float32.
    """

    def update(s: chex.Array, x: chex.Array) -> chex.Array:
        dtype = average_dtype(s)
        kept = _times(jnp.asarray(decay, dtype), s.astype(dtype))
        return (kept + jnp.asarray(x, dtype)).astype(s.dtype)

    return leafwise.tree_map(update, total, sample)

"""The inverse of the covariance of a stream of vectors, its diagonal."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, shards, transforms, trees
from optgrad.core import diagnostics as summaries


class DiagonalState(NamedTuple):
    """Averages of every coordinate."""

    count: chex.Array  # number of updates, int32, shape ()
    mean: optax.Updates | None  # of the vectors, if the covariance is centred, like the parameters
    variance: optax.Updates  # c, central or raw second moments, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """``variance_geomean``, ``variance_min`` and ``variance_max`` of the coordinates."""
        found = summaries.summarize(self.variance)._asdict()
        return {f"variance_{name}": value for name, value in found.items()}


def scale_by_inverse_diag_covariance(
    decay: float | optax.Schedule = 0.99,
    damping: float | optax.Schedule = 1.0,
    *,
    centered: bool = False,
    relative: bool = True,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The diagonal version of `scale_by_tonga`: coordinates shrunk by their variance.

    .. math::
      v_i = \frac{g_i}{1 + c_i/\lambda}, \qquad
      c_i = \overline{g_i^2} \quad\text{or}\quad \overline{(g_i - \bar g_i)^2}

    With c the covariance of the minibatch gradient around the true one, and λ = σ² the variance of
    the true gradient's own coordinates, it is the posterior mean of the true gradient. (In the
    slides c is that of single examples and λ is nσ²; a stream of minibatch gradients has it divided
    by n already.) It never enlarges a coordinate. The averages are exponential, with bias
    correction. A coordinate that is not finite does not move, and is forgotten.

    Args:
      decay: in [0, 1), of the averages.
      damping: λ > 0, as a multiple of the mean of all :math:`c_i` or, unless ``relative``, as it
        is.
      centered: whether the mean is subtracted; the first step has no variance then. Uncentred,
        consistent gradients are shrunk like noise.
      relative: whether ``damping`` is a multiple, which makes the update as large as the gradient,
        whatever its scale.
      state_dtype: floating-point type of the averages; default the parameter's, but at least
        float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size, or two if
      centred.

    Raises:
      ValueError: if an argument is outside its range.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> transformation = optgrad.scale_by_inverse_diag_covariance(damping=1.0, relative=False)
      >>> state = transformation.init(jnp.zeros(2))
      >>> print(transformation.update(jnp.array([1.0, 3.0]), state)[0])
      [0.5 0.3]

    References:
      N. Le Roux, A. Fitzgibbon, "A fast natural Newton method", 2010; J. Duda, "Improving
      convergence of stochastic gradient descent" (slides), TONGA.
    """
    checks.check_in_range("decay", decay, 0.0, 1.0, high_open=True)
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)
    checks.check_one_of("centered", centered, (False, True))
    checks.check_one_of("relative", relative, (False, True))
    checks.check_float_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> DiagonalState:
        zeros = averages.zeros_like_average(params, state_dtype)
        mean = averages.zeros_like_average(params, state_dtype) if centered else None
        return DiagonalState(jnp.zeros((), jnp.int32), mean, zeros)

    def update(
        updates: optax.Updates,
        state: DiagonalState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, DiagonalState]:
        del extra
        scale, gamma = (transforms.hyperparameter_at(x, state.count) for x in (damping, decay))
        count = optax.safe_increment(state.count)
        new = _with_sample(state._replace(count=count), updates, gamma)
        if relative:
            scale = scale * _mean(new.variance)
        found = jax.tree.map(lambda g, c: _shrunk_entry(g, c, scale), updates, new.variance)
        return transforms.cast_like(found, updates if params is None else params), new

    return transforms.transformation(init, update)


def _with_sample(past: DiagonalState, x: optax.Updates, decay: chex.Numeric) -> DiagonalState:
    """The averages after one more sample; those of coordinates that are not finite stay."""
    weights = averages.sample_weights(past.count, decay)
    mean = past.mean
    if mean is None:
        squares = jax.tree.map(lambda g: jnp.square(trees.wide(g)), x)
        variance = averages.update_mean(past.variance, squares, weights)
    else:
        mean = _finite_or(averages.update_mean(mean, x, weights), mean)
        variance = averages.update_variance(past.variance, x, mean, weights)
    return DiagonalState(past.count, mean, _finite_or(variance, past.variance))


def _finite_or(new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda x, y: jnp.where(jnp.isfinite(x), x, y), new, old)


def _mean(tree: chex.ArrayTree) -> chex.Array:
    """Of all entries, shape (); 0 of none."""
    dtype = averages.scalar_dtype()
    number = max(trees.size(tree), 1)  # each entry is divided: the sum of squares may overflow
    sums = [jnp.sum(x.astype(dtype) / number) for x in jax.tree.leaves(tree)]
    return shards.total(sums) if sums else jnp.zeros((), dtype)


def _shrunk_entry(g: chex.Array, c: chex.Array, damping: chex.Numeric) -> chex.Array:
    c = trees.wide(c)
    scale = jnp.asarray(damping, c.dtype)
    total = c + scale
    known = (total > 0) & jnp.isfinite(total)
    share = jnp.where(known, scale / jnp.where(known, total, 1.0), 1.0)
    return jnp.where(jnp.isfinite(g), share * trees.wide(g), 0.0)

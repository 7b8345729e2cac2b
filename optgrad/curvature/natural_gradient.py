"""Natural gradient with the empirical Fisher matrix of the batch."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, linalg, transforms, trees
from optgrad.curvature import empirical_fisher, example_gradients, trial
from optgrad.registry import Method, Tunable, register

SOLVERS = ("dual", "primal")


class NaturalGradientState(NamedTuple):
    """Counters; and the Fisher matrix, where it is averaged."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # directions that were not finite, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    damping: chex.Array  # λ of the last step, shape ()
    trace: chex.Array  # of the last batch's Fisher matrix, shape ()
    fisher: chex.Array | None  # F, average of the batches', shape (D, D), with solver="primal"

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled.

        Returns:
          ``damping``; ``fisher_trace``, mean squared length of the examples' gradients;
          ``gradient_equivalents`` and ``rejected_steps``.
        """
        return {
            "damping": self.damping,
            "fisher_trace": self.trace,
            "gradient_equivalents": self.cost,
            "rejected_steps": self.rejected,
        }


def scale_by_natural_gradient(
    damping: float | optax.Schedule = 0.1,
    *,
    solver: str = "dual",
    decay: float | optax.Schedule = 0.95,
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `natural_gradient`, (F + λI)⁻¹g.

    Args:
      damping: as for `natural_gradient`.
      solver: as for `natural_gradient`.
      decay: as for `natural_gradient`.
      max_size: as for `natural_gradient`.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)
    checks.check_one_of("solver", solver, SOLVERS)
    checks.check_in_range("decay", decay, 0.0, 1.0, high_open=True)
    checks.check_count("max_size", max_size, 1)

    def init(params: optax.Params) -> NaturalGradientState:
        fisher = None
        if solver == "primal":
            if (size := trees.size(params)) > max_size:
                raise ValueError(
                    f"params has {size} entries; accepted: at most max_size = {max_size}, since "
                    f'the state holds a matrix of {size} × {size} (solver="dual" has no such limit)'
                )
            fisher = jnp.zeros((size, size), averages.scalar_dtype())
        return NaturalGradientState(
            count=trial.zero_count(),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
            damping=trial.scalar(0.0),
            trace=trial.scalar(0.0),
            fisher=fisher,
        )

    def update(
        updates: optax.Updates,
        state: NaturalGradientState,
        params: optax.Params | None = None,
        *,
        per_example_grads: optax.Updates | None = None,
        kfac_stats: Any | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        del extra
        count = optax.safe_increment(state.count)
        like = updates if params is None else params
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=count)
        batch = example_gradients.examples(updates, per_example_grads, kfac_stats)
        shift = transforms.hyperparameter_at(damping, state.count)
        if solver == "dual":
            found = empirical_fisher.solve_dual(batch, updates, shift)
        else:
            rate = transforms.hyperparameter_at(decay, state.count)
            weights = averages.sample_weights(count - state.rejected, rate)
            found = empirical_fisher.solve_primal(batch, updates, shift, state.fisher, weights)
        finite = found.finite
        new = NaturalGradientState(
            count,
            trial.counted_unless(finite, state.rejected),
            state.cost + (_STORED_COST if per_example_grads is not None else _LAYERED_COST),
            jnp.where(finite, found.damping, state.damping),
            jnp.where(finite, found.trace, state.trace),
            linalg.where(finite, found.fisher, state.fisher),
        )
        return transforms.cast_like(found.vector, like), new

    return transforms.transformation(init, update)


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    damping: float | optax.Schedule = 0.1,
    *,
    solver: str = "dual",
    decay: float | optax.Schedule = 0.95,
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient with the Fisher matrix of the batch's own gradients.

    .. math::
      \theta \leftarrow \theta - \alpha\,(F + \lambda I)^{-1} g, \qquad
      F = \frac1n\sum_{i=1}^n g_ig_i^\top = \frac1n G^\top G

    Dual, :math:`K = GG^\top/n + \lambda I` of size n × n is factorised instead of F: with
    :math:`g = G^\top b + r` for a multiple b of (1/n, …, 1/n),

    .. math::
      (F+\lambda I)^{-1}g = G^\top K^{-1}b
        + \frac1\lambda\Bigl(r - \frac1n G^\top K^{-1}Gr\Bigr)

    where the second part (Woodbury's formula, which loses digits for small λ) is left out if r is
    rounding: if g is the mean of the :math:`g_i`, or a multiple of it. So the gradient may be
    clipped, and have weight decay added to it. Primal, F is averaged over batches and
    factorised as it is, for few parameters.

    ``update`` takes one of two extra arguments. ``per_example_grads`` are the gradients of the n
    examples, with a leading batch axis on every leaf: n × D numbers, which on a network of 300,000
    parameters cost 15 gradients to compute. ``kfac_stats``, from `optgrad.layer_statistics`, holds
    what each layer saw, :math:`K_{ij} = \lambda\delta_{ij} + \frac1n\sum_l (a_i\cdot a_j + 1)
    (s_i\cdot s_j)`, at the cost of about one gradient; all parameters must belong to layers then.
    With gradients of the data's own labels F is the *empirical* Fisher matrix. With labels that are
    sampled from the model it estimates the Fisher matrix itself, of which `hessian_free` is the
    exact form.

    It shines where gradients of examples are correlated across parameters and λ is not small. The
    empirical Fisher matrix is no curvature: it vanishes with the residuals, and directions in which
    examples disagree are taken for steep ones. On a digits network (64-32-10, batch 256) the best
    setting, λ = 0.1 with learning rate 0.3, reaches a loss of 0.026 in 3000 gradient equivalents,
    SGD 0.024; with λ = 0.001 it stalls at 0.12.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      damping: λ > 0, in units of squared gradients. It is never less than the rounding of F or K.
      solver: ``"dual"``, n × n, without memory of earlier batches; or ``"primal"``, D × D.
      decay: in [0, 1), of the primal average of F; with bias correction.
      max_size: largest number of parameters that ``solver="primal"`` accepts.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds scalars only if dual, and D vectors if
      primal. Directions that are not finite are zero and counted in the state's field
      ``rejected``.

    Raises:
      ValueError: if an argument is outside its range; in ``init`` for more than ``max_size``
        parameters if primal; by ``update``, if both extra arguments are missing, do not fit the
        gradient, or leave out parameters.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.natural_gradient(1.0, damping=0.5)
      >>> grads = jnp.array([[1.0, 0.0], [1.0, 2.0]])  # two examples: F = [[1, 1], [1, 2]]
      >>> updates, _ = optimizer.update(
      ...     grads.mean(0), optimizer.init(jnp.zeros(2)), per_example_grads=grads)
      >>> print(updates.round(4))
      [-0.5455 -0.1818]

    References:
      S. Amari, "Natural gradient works efficiently in learning", 1998; J. Duda, "Improving
      convergence of stochastic gradient descent" (slides), natural gradient; F. Kunstner,
      L. Balles, P. Hennig, "Limitations of the empirical Fisher approximation for natural gradient
      descent", 2019.

    Deviations from the slides: damping, without which F of n < D examples is singular.
    """
    direction = scale_by_natural_gradient(damping, solver=solver, decay=decay, max_size=max_size)
    return transforms.with_learning_rate(direction, learning_rate)


_STORED_COST, _LAYERED_COST = 3.0, 2.0  # the gradient, and those of the examples in other ways


register(
    Method(
        name="natural_gradient",
        factory=natural_gradient,
        scale_by=scale_by_natural_gradient,
        family="curvature",
        title="Natural gradient (empirical Fisher matrix)",
        reference='S. Amari, "Natural gradient works efficiently in learning", 1998',
        equation="natural gradient: θ ← θ − α·(F + λI)⁻¹g, F = GᵀG/n, by GGᵀ/n + λI",
        needs=frozenset({"per_example_grads", "kfac_stats"}),
        static_args=("solver", "max_size"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.3, "damping": 0.3},
        state_size=0,
        cost=_STORED_COST,
    )
)

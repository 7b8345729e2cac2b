"""Natural Newton: Newton directions, shrunk along their own covariance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import optax

from optgrad.core import checks, diagnostics, linalg, transforms
from optgrad.curvature import covariance as covariances
from optgrad.curvature import trial
from optgrad.curvature.damped_newton import scale_by_damped_newton
from optgrad.curvature.inverse_diag_covariance import scale_by_inverse_diag_covariance
from optgrad.curvature.lanczos_saddle_free import scale_by_lanczos_saddle_free
from optgrad.curvature.tonga import scale_by_tonga
from optgrad.curvature.truncated_newton import scale_by_truncated_newton
from optgrad.registry import Method, Tunable, register

INNER = ("lanczos", "cg", "hessian")
COVARIANCES = ("low_rank", "diagonal")


class FastNaturalNewtonState(NamedTuple):
    """The states of the Newton direction and of the covariance of these directions."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # directions that were not finite, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    inner: Any  # of the Newton direction
    covariance: Any  # of `scale_by_tonga` or `scale_by_inverse_diag_covariance`

    def diagnostics(self) -> dict[str, chex.Array]:
        """What the covariance and the Newton direction model, and the counters of both together.

        Returns:
          The entries of `scale_by_tonga` or `scale_by_inverse_diag_covariance` as
          ``covariance_<name>``, all others of the Newton direction, ``gradient_equivalents`` and
          ``rejected_steps``.
        """
        found = diagnostics.diagnostics(self.inner)
        for name, value in diagnostics.diagnostics(self.covariance).items():
            found[f"covariance_{name.removeprefix('covariance_')}"] = value
        for name in ("gradient_equivalents", "rejected_steps"):
            found.pop(f"covariance_{name}", None)
        return {**found, "gradient_equivalents": self.cost, "rejected_steps": self.rejected}


def scale_by_fast_natural_newton(
    inner: str = "lanczos",
    *,
    k: int = 10,
    damping: float | optax.Schedule = 0.1,
    covariance: str = "low_rank",
    rank: int = 10,
    period: int = 10,
    gamma: float | optax.Schedule = 0.9,
    shrinkage: float | optax.Schedule = 1.0,
    hvp: str = "exact",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `fast_natural_newton`; it takes that method's arguments but the rate.

    Args:
      inner: as for `fast_natural_newton`, and so are all others.
      k: products per step.
      damping: of the curvature.
      covariance: low rank or diagonal.
      rank: of the covariance.
      period: between eigendecompositions.
      gamma: decay.
      shrinkage: λ.
      hvp: how products are computed.
      seed: of the random part.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    checks.check_one_of("inner", inner, INNER)
    checks.check_one_of("covariance", covariance, COVARIANCES)
    checks.check_in_range("shrinkage", shrinkage, 0.0, low_open=True, high_open=True)
    newton = {
        "lanczos": lambda: scale_by_lanczos_saddle_free(
            k, damping, use_prev=False, hvp=hvp, seed=seed
        ),
        "cg": lambda: scale_by_truncated_newton(k, damping=damping, hvp=hvp),
        "hessian": lambda: scale_by_damped_newton(damping, hvp=hvp),
    }[inner]()
    # Checked in either case: an option should not become wrong by the choice of another.
    shrinking = scale_by_tonga(rank, period, gamma, shrinkage)
    if covariance == "diagonal":
        shrinking = scale_by_inverse_diag_covariance(gamma, shrinkage)

    def init(params: optax.Params) -> FastNaturalNewtonState:
        return FastNaturalNewtonState(
            trial.zero_count(),
            trial.zero_count(),
            trial.scalar(0.0),
            newton.init(params),
            shrinking.init(params),
        )

    def update(
        updates: optax.Updates,
        state: FastNaturalNewtonState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], chex.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, FastNaturalNewtonState]:
        params = transforms.require_params(params)
        direction, inner_state = newton.update(
            updates, state.inner, params, value_fn=value_fn, **extra
        )
        found, shrunk = shrinking.update(direction, state.covariance, params)
        # A direction that was refused is zero, and no sample of the covariance.
        valid = inner_state.rejected == state.inner.rejected
        if covariance == "low_rank":
            valid &= shrunk.rejected == state.covariance.rejected
        found, finite = trial.finite_only(found, params)
        valid &= finite
        new = FastNaturalNewtonState(
            optax.safe_increment(state.count),
            trial.counted_unless(valid, state.rejected),
            state.cost + (inner_state.cost - state.inner.cost),
            inner_state,
            linalg.where(valid, shrunk, state.covariance),
        )
        return trial.taken(valid, found), new

    return transforms.transformation(init, update)


def fast_natural_newton(
    learning_rate: optax.ScalarOrSchedule,
    inner: str = "lanczos",
    *,
    k: int = 10,
    damping: float | optax.Schedule = 0.1,
    covariance: str = "low_rank",
    rank: int = 10,
    period: int = 10,
    gamma: float | optax.Schedule = 0.9,
    shrinkage: float | optax.Schedule = 1.0,
    hvp: str = "exact",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural Newton: Newton directions, shrunk where they vary from batch to batch.

    .. math::
      d = \bar H^{-1} g, \qquad
      \theta \leftarrow \theta - \alpha\,[I + C_d/\lambda]^{-1} d, \qquad
      C_d \leftarrow \gamma C_d + dd^\top

    If the loss is a parabola, the prior of its true gradient is :math:`N(0, \sigma^2H^2)`, and the
    gradient of a batch of n has the covariance C/n, then the posterior mean of the Newton step is
    :math:`[I + H^{-1}CH^{-1}/(n\sigma^2)]^{-1}H^{-1}g`, and :math:`H^{-1}CH^{-1}` is the covariance
    of the Newton directions: the method is `scale_by_tonga`, or its diagonal version, behind any
    Newton direction. Any other pair is a chain, ``optax.chain(scale_by_..., scale_by_tonga(),
    optax.scale(-rate))``.

    With the true H and C it beats its relatives where noise matters: on a noisy quadratic of 20
    dimensions (condition 100, noise of condition 10⁴ in other directions; rates and σ tuned once
    for all four times) the loss after 10, 30, 100, 300 steps is 6.7, 2.8, 0.83, 0.51, against 15,
    3.7, 1.2, 1.1 of SGD, 13, 1.5, 1.3, 1.3 of Newton and 16, 4.2, 1.2, 0.35 of the natural
    gradient. Estimated online the gain is small: with Newton's step at its rate of 0.2 the same
    run ends at 2.7, with this method at three halves of it 2.1, and rates that end lower begin
    slower. The covariance is uncentred and starts from nothing, so that the first, consistent
    directions are taken for noise and damped most. On an easy digits network it loses to SGD per
    gradient, as all methods do whose steps cost ten of them.

    A step costs what its Newton direction costs: 1 + 2k gradient equivalents for ``"lanczos"``, at
    most that for ``"cg"``, 1 + 2D for ``"hessian"``. It is not tried; gradient and ``value_fn``
    should be of one batch.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      inner: the Newton direction, with fixed damping ε: ``"lanczos"``,
        :math:`(|H|+\varepsilon I)^{-1}g` on a Krylov space, which saddles repel
        (`lanczos_saddle_free`); ``"cg"``, conjugate gradients on :math:`H+\varepsilon I` until
        negative curvature (`truncated_newton`); ``"hessian"``, :math:`(H+\varepsilon I)^{-1}g` for
        few parameters (`damped_newton`).
      k: Hessian products per step, at most; not used by ``"hessian"``.
      damping: ε ≥ 0, in units of the curvature.
      covariance: ``"low_rank"`` or ``"diagonal"``.
      rank: principal directions that are kept, if of low rank.
      period: steps between two eigendecompositions, if of low rank.
      gamma: γ in [0, 1), decay of the covariance.
      shrinkage: λ > 0, as a multiple of the mean variance: of tr C/(rank + period), or of the mean
        of the diagonal. Large is plain Newton.
      hvp: how products are computed, ``"exact"``, ``"jvp"``, ``"fd"`` or ``"fdc"``, see `newton`.
      seed: of the random part of Lanczos' start.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters and ``value_fn``.
      Its state holds ``rank + period`` vectors of parameter size, or one if diagonal. Directions
      that are not finite are zero steps, no sample of the covariance, and counted in the state's
      field ``rejected``.

    Raises:
      ValueError: if an argument is outside its range, and in ``update`` without parameters or
        ``value_fn``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 100.0]) * x**2)
      >>> optimizer = optgrad.fast_natural_newton(1.0, k=2, damping=0.0, shrinkage=1e3)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = optimizer.init(params)
      >>> updates, _ = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
      >>> print([f"{u:.2f}" for u in updates])  # nearly Newton's step
      ['-0.99', '-0.99']

    References:
      N. Le Roux, A. Fitzgibbon, "A fast natural Newton method", 2010; J. Duda, "Improving
      convergence of stochastic gradient descent" (slides), which prints the prior
      :math:`N(0,\sigma^2H)` and applies the inverse to g instead of :math:`H^{-1}g`. That formula
      is no better than SGD on the quadratic above.

    Deviations from the slides: the corrected formula; λ is relative to the covariance's size;
    the covariance of Newton directions is uncentred, as in TONGA.
    """
    direction = scale_by_fast_natural_newton(
        inner,
        k=k,
        damping=damping,
        covariance=covariance,
        rank=rank,
        period=period,
        gamma=gamma,
        shrinkage=shrinkage,
        hvp=hvp,
        seed=seed,
    )
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="fast_natural_newton",
        factory=fast_natural_newton,
        scale_by=scale_by_fast_natural_newton,
        family="curvature",
        title="Natural Newton",
        reference=covariances.NATURAL_NEWTON,
        equation="natural Newton: θ ← θ − α·[I + C/λ]⁻¹d, d = H⁻¹g, C the covariance of d",
        needs=frozenset({"params", "value_fn"}),
        static_args=("inner", "k", "covariance", "rank", "period", "hvp", "seed"),
        tunes=Tunable("learning_rate", 1e-3, 1e1),
        test_hyperparams={"learning_rate": 1.0},
        state_size=20,
        cost=21.0,
        low_precision="nothing: its inverse is a difference of what the gradients make",
        wide_state=("covariance.rows", "covariance.weights", "covariance.gram"),
    )
)

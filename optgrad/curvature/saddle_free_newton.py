"""Newton's method with the absolute values of all curvatures."""

import chex
import jax.numpy as jnp
import optax

from optgrad.core import checks, transforms
from optgrad.curvature import dense, saddle_free_steps
from optgrad.registry import Method, Tunable, register


def scale_by_saddle_free_newton(
    damping: float | optax.Schedule = 1e-3,
    *,
    floor: float | optax.Schedule = 1e-12,
    hvp: str = "exact",
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of `saddle_free_newton`, :math:`(|H|+\lambda I)^{-1}g`, with a fixed damping.

    Args:
      damping: as for `saddle_free_newton`.
      floor: as for `saddle_free_newton`.
      hvp: as for `saddle_free_newton`.
      max_size: as for `saddle_free_newton`.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    return dense.dense_newton(_variant(floor), None, damping=damping, hvp=hvp, max_size=max_size)


def saddle_free_newton(
    learning_rate: float | optax.Schedule = 1.0,
    *,
    damping: float | optax.Schedule = 1e-3,
    adaptive: bool = False,
    floor: float | optax.Schedule = 1e-12,
    hvp: str = "exact",
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle-free Newton: every direction is descended, by the size of its curvature.

    .. math::
      \theta \leftarrow \theta - \alpha\,(|H| + \lambda I)^{-1} g, \qquad
      |H| = Q\,\mathrm{diag}(|\lambda_i|)\,Q^\top

    Newton's method with the sign of the negative curvatures turned round: saddles repel it, and
    where H is positive it is Newton's method (one step for a quadratic, 5 and 6 for Rosenbrock's
    function with λ = 0). Near a saddle a step doubles the distance from its stable manifold,
    whatever the curvature: with λ = 0 it leaves :math:`x^2-y^2+y^4/4` in 11 steps from a distance
    of 10⁻², 21 from 10⁻⁶, and as many with a negative curvature 5000 times smaller than the
    positive one. From the manifold itself, where the gradient has no component along the negative
    curvature, it does not escape (`lanczos_saddle_free` with a kick does).

    With ``adaptive`` each step is tried on the batch: one that increases the loss is not taken, and
    λ is multiplied by 4 or divided by 3 where the loss falls by less than ¼ or more than ¾ of what
    the parabola with :math:`|H|` predicts. It must then be the last element of a chain, and
    gradient and ``value_fn`` have to be of one batch.

    A step costs 1 + 2D gradient equivalents, D the number of parameters (1 + D with ``hvp="fd"``),
    one or two values more if adaptive, and an eigendecomposition of D × D, which is not kept.

    Args:
      learning_rate: α ≥ 0.
      damping: λ ≥ 0, in units of the curvature; with ``adaptive`` λ > 0 of the first step.
      adaptive: whether steps are tried and λ follows the gain ratio.
      floor: smallest divisor of any component of the gradient, ≥ 0; it matters where λ = 0 and the
        Hessian is singular.
      hvp: how the columns of the Hessian are computed, ``"exact"``, ``"jvp"``, ``"fd"`` or
        ``"fdc"``, see `newton`.
      max_size: largest number of parameters that is accepted.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters and ``value_fn``;
      ``value`` saves one evaluation if adaptive. Steps that are not finite (or, if adaptive,
      increase the loss) are zero and counted in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, in ``init`` for more than ``max_size``
        parameters, and in ``update`` without parameters or ``value_fn``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4
      >>> optimizer = optgrad.saddle_free_newton(damping=0.0)
      >>> params = jnp.array([1.0, 0.001])
      >>> state = optimizer.init(params)
      >>> gradient = jax.grad(saddle)(params)
      >>> updates, state = optimizer.update(gradient, state, params, value_fn=saddle)
      >>> print((params + updates).round(4))  # twice as far from the line y = 0
      [0.    0.002]

    References:
      Y. Dauphin, R. Pascanu, C. Gulcehre, K. Cho, S. Ganguli, Y. Bengio, "Identifying and attacking
      the saddle point problem in high-dimensional non-convex optimization", 2014; J. Duda,
      "Improving convergence of stochastic gradient descent" (slides), saddle-free Newton.

    Deviations from the slides: a small damping by default, since stochastic gradients have
    components along flat directions.
    """
    return dense.dense_newton(
        _variant(floor),
        learning_rate,
        damping=damping,
        adaptive=adaptive,
        hvp=hvp,
        max_size=max_size,
    )


def _variant(floor: float | optax.Schedule) -> dense.Variant:
    checks.check_in_range("floor", floor, 0.0, high_open=True)

    def divisor(curvatures: chex.Array, damping: chex.Array, count: chex.Array) -> chex.Array:
        least = jnp.asarray(transforms.hyperparameter_at(floor, count), curvatures.dtype)
        return jnp.maximum(jnp.abs(curvatures) + damping, least)

    return dense.Variant(divisor, jnp.abs)


register(
    Method(
        name="saddle_free_newton",
        factory=saddle_free_newton,
        scale_by=scale_by_saddle_free_newton,
        family="curvature",
        title="Saddle-free Newton (whole Hessian)",
        reference=saddle_free_steps.DAUPHIN,
        equation="saddle-free Newton: θ ← θ − α·(|H| + λI)⁻¹g",
        needs=frozenset({"params", "value_fn"}),
        static_args=("adaptive", "hvp", "max_size"),
        tunes=Tunable("damping", 1e-4, 1e2),
        test_hyperparams={"damping": 0.1},
        state_size=lambda _: 0,  # a dense method: the D × D matrices live within a step
        cost=dense.TYPICAL_COST,
    )
)

"""Newton's method with a multiple of the identity added to the Hessian."""

import optax

from optgrad.curvature import dense, trial
from optgrad.registry import Method, Tunable, register

_VARIANT = dense.Variant(
    lambda curvatures, damping, _: curvatures + damping, lambda curvatures: curvatures
)


def scale_by_damped_newton(
    damping: float | optax.Schedule = 1.0, *, hvp: str = "exact", max_size: int = 2000
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of `damped_newton`, :math:`(H+\lambda I)^{-1}g`, with a fixed damping.

    Args:
      damping: as for `damped_newton`.
      hvp: as for `damped_newton`.
      max_size: as for `damped_newton`.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    return dense.dense_newton(_VARIANT, None, damping=damping, hvp=hvp, max_size=max_size)


def damped_newton(
    learning_rate: float | optax.Schedule = 1.0,
    *,
    damping: float | optax.Schedule = 1.0,
    adaptive: bool = False,
    hvp: str = "exact",
    max_size: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Newton: all curvatures are raised by the same λ.

    .. math::
      \theta \leftarrow \theta - \alpha\,(H + \lambda I)^{-1} g

    Between Newton's method (λ = 0) and gradient descent with the step size 1/λ; also one linearly
    implicit Euler step of length 1/λ along the gradient flow. It bounds the step along flat
    directions. A saddle repels it only if λ is larger than the most negative curvature's size: on
    :math:`x^2-y^2+y^4/4`, whose negative curvature is −2, it ends at the saddle with λ = ½ and
    escapes with λ = 3, in 14 steps from a distance of 10⁻² and 21 from 10⁻⁶. A λ that large slows
    every flat valley down, which is the case for `saddle_free_newton`.

    With ``adaptive`` each step is tried on the batch. One that increases the loss is not taken; λ
    is multiplied by 4 where the loss falls by less than a quarter of what the parabola with the
    true Hessian predicts, and divided by 3 where it falls by more than three quarters of it. On
    Rosenbrock's function that needs about 30 steps and the loss never increases. It must then be
    the last element of a chain, and gradient and ``value_fn`` have to be of one batch.

    A step costs 1 + 2D gradient equivalents, D the number of parameters (1 + D with ``hvp="fd"``),
    one or two values more if adaptive, and an eigendecomposition of D × D, which is not kept.

    Args:
      learning_rate: α ≥ 0.
      damping: λ ≥ 0, in units of the curvature; with ``adaptive`` λ > 0 of the first step.
      adaptive: whether steps are tried and λ follows the gain ratio.
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
      >>> loss = lambda x: 2.0 * x[0] ** 2 + 0.5 * x[1] ** 2
      >>> optimizer = optgrad.damped_newton(damping=1.0)
      >>> params = jnp.array([5.0, 2.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
      >>> print((params + updates).round(4))  # 5·(1 − 4/5), 2·(1 − 1/2)
      [1. 1.]

    References:
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), damped Newton. The
      rule of λ is that of K. Levenberg, 1944, and D. Marquardt, 1963, with the gain ratio.
    """
    return dense.dense_newton(
        _VARIANT,
        learning_rate,
        damping=damping,
        adaptive=adaptive,
        hvp=hvp,
        max_size=max_size,
    )


register(
    Method(
        name="damped_newton",
        factory=damped_newton,
        scale_by=scale_by_damped_newton,
        family="curvature",
        title="Damped Newton (whole Hessian)",
        reference=trial.SLIDES,
        equation="damped Newton: θ ← θ − α·(H + λI)⁻¹g",
        needs=frozenset({"params", "value_fn"}),
        static_args=("adaptive", "hvp", "max_size"),
        tunes=Tunable("damping", 1e-3, 1e2),
        test_hyperparams={"damping": 1.0},
        state_size=lambda _: 0,  # a dense method: the D × D matrices live within a step
        cost=dense.TYPICAL_COST,
    )
)

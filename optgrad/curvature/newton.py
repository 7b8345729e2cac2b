"""Newton's method with the whole Hessian."""

import optax

from optgrad.curvature import dense, trial
from optgrad.registry import Method, Tunable, register

_VARIANT = dense.Variant(lambda curvatures, *_: curvatures, lambda curvatures: curvatures)


def scale_by_newton(
    *, hvp: str = "exact", max_size: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """The direction of `newton`, :math:`H^{-1}g`, without a learning rate.

    Args:
      hvp: as for `newton`.
      max_size: as for `newton`.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    return dense.dense_newton(_VARIANT, None, hvp=hvp, max_size=max_size)


def newton(
    learning_rate: float | optax.Schedule = 1.0, *, hvp: str = "exact", max_size: int = 2000
) -> optax.GradientTransformationExtraArgs:
    r"""Newton–Raphson: the step to the stationary point of the local parabola.

    .. math::
      \theta \leftarrow \theta - \alpha\,H^{-1} g
        = \theta - \alpha\,Q\,\mathrm{diag}(1/\lambda_i)\,Q^\top g,
      \qquad H = Q\,\mathrm{diag}(\lambda_i)\,Q^\top

    Near a minimum with a regular Hessian the number of right digits doubles in each step: one step
    for any quadratic, 5 and 6 for Rosenbrock's function from (−1, 0) and (−1.2, 1). That is also
    what goes wrong elsewhere: along negative curvature the step leads uphill, so that every saddle
    attracts (on :math:`x^2-y^2+y^4/4` it ends at the saddle 0 from any start near it), along a flat
    direction it has no bound, and where the Hessian changes within a step it may diverge: logistic
    losses far from their minimum are an example. `saddle_free_newton` cures the first,
    `damped_newton` the second, and with ``adaptive`` either cures the third.

    A step costs 1 + 2D gradient equivalents, D the number of parameters (1 + D with ``hvp="fd"``),
    and the eigendecomposition of a D × D matrix, which is not kept.

    Args:
      learning_rate: α ≥ 0; 1 is Newton's method.
      hvp: how the columns of the Hessian are computed: ``"exact"`` or ``"jvp"`` by forward over
        reverse differentiation, ``"fd"`` or ``"fdc"`` by forward or central differences of
        gradients.
      max_size: largest number of parameters that is accepted.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters and ``value_fn``. It
      divides the incoming updates by the Hessian of ``value_fn``. Where the result is not finite (a
      singular Hessian, a NaN), or ``value`` is given and is not, nothing moves and the state's
      field ``rejected`` counts it.

    Raises:
      ValueError: for an argument outside its range, in ``init`` for more than ``max_size``
        parameters, and in ``update`` without parameters or ``value_fn``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: 5.0 * (x[0] + x[1]) ** 2 + 0.05 * (x[0] - x[1] - 2.0) ** 2
      >>> optimizer = optgrad.newton()
      >>> params = jnp.array([3.0, -2.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
      >>> print((params + updates).round(2))
      [ 1. -1.]

    References:
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), Newton–Raphson.
    """
    return dense.dense_newton(_VARIANT, learning_rate, hvp=hvp, max_size=max_size)


register(
    Method(
        name="newton",
        factory=newton,
        scale_by=scale_by_newton,
        family="curvature",
        title="Newton's method (whole Hessian)",
        reference=trial.SLIDES,
        equation="Newton–Raphson: θ ← θ − α·H⁻¹g",
        needs=frozenset({"params", "value_fn"}),
        static_args=("hvp", "max_size"),
        tunes=Tunable("learning_rate", 1e-2, 1e0),
        test_hyperparams={"learning_rate": 1.0},
        state_size=lambda _: 0,  # a dense method: the D × D matrices live within a step
        cost=dense.TYPICAL_COST,
    )
)

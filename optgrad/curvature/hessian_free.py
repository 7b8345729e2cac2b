"""Hessian-free optimization."""

import optax

from optgrad.core import checks
from optgrad.curvature import newton_cg, newton_equation
from optgrad.registry import Method, Tunable, register


def hessian_free(
    maxiter: int = 50,
    *,
    damping: float | optax.Schedule = 1.0,
    warm: float = 0.0,
    forcing: str | float = 1e-2,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization: damped Gauss–Newton steps by conjugate gradients.

    .. math::
      \theta \leftarrow \theta + d, \qquad (G + \lambda I)\,d \approx -u, \qquad
      G = J^\top L J

    with the Jacobian J of the network's outputs and the Hessian L of the loss in them: the Hessian
    without the curvature of the network, positive semidefinite for a convex loss, and for softmax
    cross-entropy and squared error the Fisher matrix, so that with a constant λ this is the natural
    gradient. The damping follows the ratio ρ of actual to predicted decrease: λ grows by 1.5 if
    ρ < ¼, shrinks by 1.5 if ρ > ¾. Steps that increase the loss are not taken.

    It is `truncated_newton` with mode ``"lm"`` and curvature ``"ggn"``. It shines on deep or
    recurrent networks with large or full batches, and where residuals are small: Rosenbrock's
    function, of two residuals, from (−1.2, 1) in 25 steps and 140 gradient equivalents to 10⁻¹²,
    where mode ``"lm"`` with the Hessian takes 39 and 191 (both λ₀ = 1). On small batches it
    over-fits each of them (digits, batches of 256, after 3000 gradient equivalents: loss 0.033,
    tuned momentum 0.022): keep ``maxiter`` at 10 there, and give the outputs of a larger batch. G
    knows no negative curvature: saddles are left as slowly as by gradient descent.

    A step costs 1 gradient, 2 for each iteration of conjugate gradients, and ⅔ for the two losses.
    Memory: 5 vectors while it solves, none in the state. It tries its steps, and must be the last
    of a chain, with learning rate 1, and with gradient and ``value_fn`` of one batch.

    Args:
      maxiter: most iterations of conjugate gradients, ≥ 1.
      damping: λ > 0, its first value; of a schedule, later values rescale what was learnt.
      warm: share of the previous step, in [0, 1], with which conjugate gradients begin (Martens has
        1, later 0.95); it costs a product and a vector, and did not help here.
      forcing: tolerance of conjugate gradients relative to ‖u‖, in [0, 1), or ``"sqrt"`` for
        :math:`\min(\tfrac12, \sqrt{|u|})`, which saves iterations far from a minimum and takes
        more steps.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters, ``value_fn``,
      ``outputs_fn`` and ``out_loss_fn``; the latter two may belong to a larger batch. Terms
      outside of the network, such as L2, are part of G if the parameters are among the outputs. The
      loss of the batch never increases: bad steps are zero updates, counted in the state's field
      ``rejected``.

    Raises:
      ValueError: for an argument outside its range, and by ``update`` if a function is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> outputs = lambda x: jnp.array([x[0] - 1.0, 10 * (x[1] - x[0] ** 2)])
      >>> half_squares = lambda z: 0.5 * jnp.sum(z**2)
      >>> loss = lambda x: half_squares(outputs(x))
      >>> optimizer = optgrad.hessian_free()
      >>> params = jnp.array([-1.2, 1.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(25):
      ...     updates, state = optimizer.update(
      ...         jax.grad(loss)(params), state, params, value_fn=loss,
      ...         outputs_fn=outputs, out_loss_fn=half_squares)
      ...     params = params + updates
      >>> print([f"{x:.3f}" for x in params])
      ['1.000', '1.000']

    References:
      J. Martens, "Deep learning via Hessian-free optimization", 2010. N. Schraudolph, "Fast
      curvature matrix-vector products for second-order gradient descent", 2002: the products.
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), "truncated Newton".

    Deviations from the paper: a tolerance of the residual in place of the relative progress of the
    model; no preconditioner, no backtracking over earlier iterates of the conjugate
    gradients, no structural damping.
    """
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)
    solver = newton_equation.Solver(maxiter, curvature="ggn", forcing=forcing, warm=warm)
    return newton_cg.guarded(solver, damping)


register(
    Method(
        name="hessian_free",
        factory=hessian_free,
        scale_by=None,
        family="curvature",
        title="Hessian-free optimization",
        reference='J. Martens, "Deep learning via Hessian-free optimization", 2010',
        equation="(G + λI)d = −g by conjugate gradients, λ by the gain ratio",
        needs=frozenset({"params", "value_fn", "outputs_fn", "out_loss_fn"}),
        static_args=("maxiter", "warm", "forcing"),
        tunes=Tunable("damping", 1e-4, 1e2),
        test_hyperparams={"damping": 0.1},
        state_size=0,
        cost=30,
    )
)

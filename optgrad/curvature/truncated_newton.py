"""Truncated Newton: Newton's equation solved by a few conjugate gradients."""

import optax

from optgrad.core import checks, line_search
from optgrad.curvature import newton_cg, newton_equation, trial
from optgrad.registry import Method, Tunable, register


def truncated_newton(
    maxiter: int = 20,
    *,
    mode: str = "trust",
    radius0: float | optax.Schedule = 1.0,
    max_radius: float | optax.Schedule = 1e3,
    damping: float | optax.Schedule | None = None,
    curvature: str = "hessian",
    warm: float = 0.0,
    forcing: str | float = "sqrt",
    hvp: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""Truncated Newton (Newton-CG), in a trust region, with adapted damping, or a line search.

    .. math::
      \theta \leftarrow \theta + d, \qquad (B + \lambda I)\,d \approx -u
      \quad\text{until}\quad |u + (B + \lambda I)\,d| \le \min\bigl(\tfrac12, \sqrt{|u|}\bigr)\,|u|

    with the incoming updates u (the gradient) and B the Hessian or the Gauss–Newton matrix, of
    which only products with vectors are taken. Conjugate gradients stop early far from a minimum
    and end at the first direction of negative curvature. What then becomes of d is the ``mode``:

    - ``"trust"``: :math:`|d| \le \Delta`; along negative curvature the step goes to the boundary
      (Steihaug). With the ratio ρ of actual to predicted decrease, ρ < ¼ sets
      :math:`\Delta = |d|/4`, and ρ > ¾ at the boundary doubles it; steps with ρ ≤ 10⁻⁴ are not
      taken. λ is fixed. The robust choice where the loss is not convex.
    - ``"lm"``: no radius; λ grows by 1.5 if ρ < ¼ and shrinks by 1.5 if ρ > ¾ (Levenberg,
      Marquardt; Martens). Steps that increase the loss are not taken.
    - ``"direction"``: λ is fixed, and a zoom line search follows that never returns a worse point.

    It shines on smooth deterministic losses, also where they are not convex: Rosenbrock's function
    from (−1.2, 1) in 29 steps and 136 gradient equivalents to 10⁻¹² (gradient descent: 32,000), and
    out of a saddle of curvatures 2 and −2, 10⁻⁶ beside its stable manifold, in 6 steps and 22. Mode
    ``"lm"`` takes 114 and 39 steps there (λ₀ = 0.1). On minibatches of an easy task it loses to
    momentum: a step costs 10 to 40 gradients and fits the batch (digits, batches of 256, after 3000
    gradient equivalents: loss 0.029, tuned momentum 0.022). Exactly on the stable manifold of a
    saddle it stays there, like every method that sees gradients and their derivatives alone.

    A step costs 1 gradient, 2 for each iteration of conjugate gradients, and ⅔ for the two losses.
    Memory: 5 vectors while it solves, none in the state. It tries its steps, and must be the last
    of a chain, with learning rate 1, and with gradient and ``value_fn`` of one batch.

    Args:
      maxiter: most iterations of conjugate gradients, ≥ 1.
      mode: ``"trust"``, ``"lm"`` or ``"direction"``.
      radius0: Δ₀ > 0, the first radius; of a schedule, later values rescale what was learnt. Used
        by ``"trust"``.
      max_radius: the largest radius, > 0.
      damping: λ ≥ 0, in mode ``"lm"`` its first value, > 0. Default: 0, in mode ``"lm"`` 1.
      curvature: ``"hessian"``, or ``"ggn"`` for the Gauss–Newton matrix, which needs
        ``outputs_fn`` and ``out_loss_fn``.
      warm: share of the previous step, in [0, 1], with which conjugate gradients begin; it costs a
        product and a vector, and did not help on any problem here.
      forcing: ``"sqrt"`` for the tolerance above, or a number η in [0, 1) for η|u|.
      hvp: how Hessian products are computed: ``"exact"``, ``"jvp"``, ``"fd"`` or ``"fdc"``; the
        last two are differences of gradients.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters and ``value_fn``,
      with mode ``"direction"`` ``value`` and ``grad`` too; ``curvature_fn``, the loss of another
      batch, replaces ``value_fn`` in the Hessian if it is given. The loss of the batch never
      increases: bad steps are zero updates, counted in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, and by ``update`` if a function is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: (x[0] - 1) ** 2 + 50 * (x[0] - x[1]) ** 2
      >>> optimizer = optgrad.truncated_newton(radius0=10.0, forcing=1e-6)
      >>> params = jnp.array([-1.0, 3.0])
      >>> state = optimizer.init(params)
      >>> gradient = jax.grad(loss)(params)
      >>> updates, state = optimizer.update(gradient, state, params, value_fn=loss)
      >>> print([f"{x:.3f}" for x in params + updates])
      ['1.000', '1.000']

    References:
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), "truncated Newton".
      R. Dembo, T. Steihaug, "Truncated-Newton algorithms for large-scale unconstrained
      optimization", 1983: the tolerance. T. Steihaug, "The conjugate gradient method and trust
      regions in large scale optimization", 1983. J. Martens, "Deep learning via Hessian-free
      optimization", 2010: mode ``"lm"``.
    """
    checks.check_one_of("mode", mode, newton_cg.MODES)
    solver = newton_equation.Solver(maxiter, curvature, hvp, forcing, warm)
    if damping is None:
        damping = 1.0 if mode == "lm" else 0.0
    checks.check_in_range("radius0", radius0, 0.0, low_open=True, high_open=True)
    checks.check_in_range("max_radius", max_radius, 0.0, low_open=True, high_open=True)
    checks.check_in_range("damping", damping, 0.0, low_open=mode == "lm", high_open=True)
    if mode == "trust":
        return newton_cg.guarded(solver, damping, radius=radius0, max_radius=max_radius)
    if mode == "lm":
        return newton_cg.guarded(solver, damping)
    return line_search.with_zoom_linesearch(
        newton_cg.direction(solver, damping), max_steps=20, curv_rtol=0.9, initial_guess="one"
    )


def scale_by_truncated_newton(
    maxiter: int = 20,
    *,
    damping: float | optax.Schedule = 0.0,
    curvature: str = "hessian",
    warm: float = 0.0,
    forcing: str | float = "sqrt",
    hvp: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""The truncated Newton direction :math:`d \approx (B + \lambda I)^{-1}u`, without any guard.

    Conjugate gradients end at the first direction of negative curvature with what they have, u
    itself if that is the first. It may point far: follow it by a line search
    (``with_safe_linesearch``), or by a learning rate and clipping.

    Args:
      maxiter: most iterations of conjugate gradients, ≥ 1.
      damping: λ ≥ 0.
      curvature: ``"hessian"`` or ``"ggn"``.
      warm: share of the previous direction, in [0, 1], with which conjugate gradients begin.
      forcing: ``"sqrt"`` or a number in [0, 1), see `truncated_newton`.
      hvp: ``"exact"``, ``"jvp"``, ``"fd"`` or ``"fdc"``.

    Returns:
      A `GradientTransformationExtraArgs` with the extra arguments of `truncated_newton`. A
      direction that is not finite is replaced by zeros, and counted in the field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, and by ``update`` if a function is missing.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> loss = lambda x: x[0] ** 2 + 50 * x[1] ** 2
      >>> direction = optgrad.scale_by_truncated_newton(forcing=1e-6)
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, _ = direction.update(
      ...     jnp.array([2.0, 100.0]), direction.init(params), params, value_fn=loss)
      >>> print([f"{x:.3f}" for x in updates])
      ['1.000', '1.000']
    """
    checks.check_in_range("damping", damping, 0.0, high_open=True)
    return newton_cg.direction(
        newton_equation.Solver(maxiter, curvature, hvp, forcing, warm), damping
    )


register(
    Method(
        name="truncated_newton",
        factory=truncated_newton,
        scale_by=scale_by_truncated_newton,
        family="curvature",
        title="Truncated Newton (Newton-CG) in a trust region",
        reference=trial.SLIDES,
        equation="truncated Newton: (H + λI)d = −g by conjugate gradients, |d| ≤ Δ",
        needs=frozenset({"params", "value_fn"}),
        static_args=("maxiter", "mode", "curvature", "warm", "forcing", "hvp"),
        tunes=Tunable("radius0", 1e-2, 1e2),
        test_hyperparams={"radius0": 1.0},
        state_size=0,
        cost=30,
    )
)

"""Csawg: step sizes from weight differences and squared gradients."""

from typing import Any

import optax

from optgrad.registry import Method, Tunable, register
from optgrad.step_size_planning import phases, windows
from optgrad.step_size_planning.options import make_options


def csawg(
    learning_rate: optax.ScalarOrSchedule,
    window: int = 10,
    *,
    pairing: str = "lagged",
    gradient: str = "fresh",
    layout: str = "auto",
    base: optax.GradientTransformation | None = None,
    verify: bool | str | None = None,
    tolerance: float | optax.Schedule = 1.0,
    abort: float | optax.Schedule = 1e4,
    noise_guard: float | optax.Schedule = 0.0,
    read_back: bool | None = None,
    ring_dtype: Any | None = None,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Csawg: every K steps of SGD, one step that jumps K ahead, with a step size per coordinate.

    .. math::
      w_k &= w_{k-1} - \gamma\,g_k, \qquad g_k = \nabla f(w_{k-1}) \\
      \alpha &= \frac{\sum_s g_s\,(w_s - w_{s+K})}{\sum_s g_s^2}
      \quad\text{coordinate by coordinate, s over the older of two windows of K steps} \\
      w &\leftarrow w - \alpha\odot\nabla f(w) \quad\text{after every window but the first}

    "Component step-size adaptation based on weight difference and squared gradient": α is the step
    size that would have done in one step what K steps did. Where the coordinates of a quadratic
    are independent, α tends to the Newton step 1/λ of each.

    It shines on smooth deterministic problems whose curvature is aligned with the coordinates, with
    γ close to 1/L: on the Rosenbrock function its error after 10,000 gradients is 133 (K = 10) to
    370 (K = 2, where rounding decides) times smaller than gradient descent's. With γ far below 1/L
    small windows diverge without verification (K = 2 on 20 of 20 random quadratics at γL = 0.1). On
    minibatches it is no better than SGD: Σg² is then mostly variance, and α is fitted to noise.

    Args:
      learning_rate: γ ≥ 0 of the ordinary steps; a number, a traced scalar or a schedule (of the
        number of calls).
      window: K ≥ 1 steps; 2 to 10 accelerate most, larger ones are safer.
      pairing: ``"lagged"`` stores a step's end with the gradient at its start, as Algorithm 1 has
        it; ``"matched"`` stores parameters with the gradient at them, as the derivation has it.
        Matched pairs converge to α = 1/λ exactly and to far smaller errors, and diverge from more
        starting points.
      gradient: ``"fresh"`` projects along a gradient of its own; ``"reuse"`` along that of the last
        step, in the same call: no extra evaluation, and better per gradient on the Rosenbrock
        function, but diverges from more starting points.
      layout: what the state stores: ``"pairs"`` (K positions and gradients, 2K + 2 vectors),
        ``"reference"`` (K gradients and distances from the window's start, K + 5), ``"gradients"``
        (K + 5; trusts that plain SGD of a constant rate is applied exactly, which rounding in
        float32 belies: α may run away), or ``"auto"``: the smaller of the first two.
      base: a transformation that gives the positive direction of the ordinary steps, such as
        ``optax.scale_by_adam()``; default the gradient itself.
      verify: ``"loss"`` or True judges each plan by ``value``, ``"gradient_norm"`` by
        :math:`\|g\|`: a plan after which it is worse is taken back, and the windows start anew.
        False trusts every plan. Default True, with ``paper`` False. On minibatches the comparison
        is noisy. Taking back is one more update, repeated once to be exact: what comes behind in a
        chain and shortens it (clipping, a factor) leaves the rest.
      tolerance: κ ≥ 0; a plan stands if the metric after it is at most κ times that before it.
        Use 10 for the gradient norm.
      abort: factor ≥ 0, or infinite, beyond which a plan is taken back within the episode already.
      noise_guard: c ≥ 0; a coordinate is not planned if its numerator is within c roundings of the
        parameters, c·ε·abs(w)·√(KΣg²). 16 keeps a converged float32 run from planning by noise.
      read_back: whether a step's end is read from the parameters of the next call, so that whatever
        follows in a chain is seen, for one vector more. Default True where it can be; with
        ``paper``, ``layout="gradients"`` and ``gradient="reuse"`` updates are taken to be applied
        as they are.
      ring_dtype: type of the stored gradients; default the parameter's, but at least float32.
        bfloat16 halves the memory at no loss that was seen.
      paper: Algorithm 1 as printed: lagged pairs, fresh gradients, no verification.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds, by default, K + 7 vectors of parameter
      size. Its ``update`` needs the parameters and, to verify by the loss, ``value``. A ``value``
      that is not finite makes it skip the step; gradients are not looked at. The state's
      ``evaluations``, ``outer_iterations`` and ``rejected`` count gradients, ordinary steps outside
      of episodes, and plans taken back; ``state.step_sizes`` are the planned step sizes while
      ``state.is_planned``.

    Raises:
      ValueError: if an argument is outside its range or does not go with another, if ``update`` is
        not given the parameters, or not ``value`` where plans are judged by the loss.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> curvature = jnp.array([1.0, 100.0])
      >>> loss = lambda w: 0.5 * jnp.sum(curvature * w**2)
      >>> def final_loss(optimizer, steps=300):
      ...     w, state = jnp.ones(2), optimizer.init(jnp.ones(2))
      ...     update = jax.jit(optimizer.update)
      ...     for _ in range(steps):
      ...         value, grad = jax.value_and_grad(loss)(w)
      ...         updates, state = update(grad, state, w, value=value)
      ...         w = optax.apply_updates(w, updates)
      ...     return loss(w)
      >>> sgd, planned = final_loss(optgrad.create("sgd", learning_rate=9e-3)), final_loss(
      ...     optgrad.csawg(9e-3)
      ... )
      >>> bool(planned < 1e-6 * sgd)
      True

    References:
      H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022, Algorithm 1,
      Eq. (9).

    Deviations from the paper: the text's :math:`w(i) \leftarrow w(i) - \alpha(i) g_k` must
    read :math:`g_k(i)`; a denominator of 0 gives α = 0 in Algorithm 2 too, which otherwise divides
    0 by 0 right after convergence; plans are verified unless ``paper`` is set; a projection that is
    no finite number is not taken. One gradient is consumed per ``update``, so that an episode takes
    one call.
    """
    options = make_options(
        learning_rate=learning_rate,
        window=window,
        projections=1,
        corrections=0,
        pairing=pairing,
        gradient=gradient,
        layout=layout,
        base=base,
        verify=verify,
        tolerance=tolerance,
        abort=abort,
        noise_guard=noise_guard,
        read_back=read_back,
        ring_dtype=ring_dtype,
        paper=paper,
    )
    return phases.plan_steps(options)


register(
    Method(
        name="csawg",
        factory=csawg,
        scale_by=None,
        family="step_size_planning",
        title="Csawg: step-size planning",
        reference=phases.REFERENCE,
        equation="Algorithm 1: every K steps α = Σg(w − w')/Σg², w ← w − α⊙g",
        needs=frozenset({"params", "value"}),
        static_args=phases.STATIC,
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=17,
        low_precision=windows.LOW_PRECISION,
        wide_state=windows.WIDE_STATE,
    )
)

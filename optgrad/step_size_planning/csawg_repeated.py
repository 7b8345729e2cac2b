"""Repeated planning: several jumps along the same step sizes, each corrected by ordinary steps."""

import warnings
from typing import Any

import optax

from optgrad.registry import Method, Tunable, register
from optgrad.step_size_planning import phases, windows
from optgrad.step_size_planning.options import make_options


def csawg_repeated(
    learning_rate: optax.ScalarOrSchedule,
    window: int = 10,
    projections: int = 5,
    corrections: int = 10,
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
    r"""Repeated planning: P jumps along the same step sizes, each corrected by M ordinary steps.

    .. math::
      \alpha = \frac{\sum_s g_s\,(w_s - w_{s+K})}{\sum_s g_s^2}
      \quad\text{after every window of K steps but the first (see } \texttt{csawg}\text{); then} \\
      P \text{ times:}\quad w \leftarrow w - \alpha\odot\nabla f(w), \quad\text{and }
      M \text{ times:}\quad w \leftarrow w - \gamma\nabla f(w)

    The step sizes are a model of what K steps do; using it several times plans far ahead. On the
    Rosenbrock function from (−1, 0), with γ = 0.001, it reaches the minimum exactly, in float64,
    after 465 gradients with K = 10 and 458 with K = 2, where heavy ball needs thousands.

    That is where it shines, and nearly all of it: γ must be close to 1/L (here 0.0008 … 0.0012),
    and K = 5 diverges on the same problem. On randomly rotated quadratics of condition 100, with
    five or twenty dimensions, it diverges from every start without verification. A plan multiplies
    α by P wherever the loss is nearly linear. With verification it is never lost, but falls back to
    SGD there. Minibatch noise is worse: it diverges or equals SGD.

    Args:
      learning_rate: γ ≥ 0 of the ordinary steps; a number, a traced scalar or a schedule (of the
        number of calls).
      window: K ≥ 1 steps.
      projections: P ≥ 1, jumps of an episode.
      corrections: M ≥ 0, ordinary steps after each of them.
      pairing: ``"lagged"`` stores a step's end with the gradient at its start, as Algorithm 1 has
        it; ``"matched"`` stores parameters with the gradient at them, as the derivation has it.
        Matched pairs converge to α = 1/λ exactly and to far smaller errors, and diverge from more
        starting points.
      gradient: ``"fresh"``; ``"reuse"`` is for P = 1 and M = 0 only, see `csawg`.
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
      paper: Algorithm 2 as printed: lagged pairs, fresh gradients, no verification.

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

    Warns:
      UserWarning: if P > 1 and plans are not verified, unless ``paper`` is set.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> loss = lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2
      >>> optimizer = optgrad.csawg_repeated(1e-3)
      >>> w = jnp.array([-1.0, 0.0])
      >>> state = optimizer.init(w)
      >>> update = jax.jit(optimizer.update)
      >>> for _ in range(465):
      ...     value, grad = jax.value_and_grad(loss)(w)
      ...     updates, state = update(grad, state, w, value=value)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < 1e-9)
      True

    References:
      H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022, Algorithm 2.

    Deviations from the paper: the text's :math:`w(i) \leftarrow w(i) - \alpha(i) g_k` must
    read :math:`g_k(i)`; a denominator of 0 gives α = 0 in Algorithm 2 too, which otherwise divides
    0 by 0 right after convergence; plans are verified unless ``paper`` is set; a projection that is
    no finite number is not taken. One gradient is consumed per ``update``, so that an episode takes
    P(1 + M) calls.
    """
    options = make_options(
        learning_rate=learning_rate,
        window=window,
        projections=projections,
        corrections=corrections,
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
    if options.verify is None and projections > 1 and not paper:
        warnings.warn(
            f"projections = {projections} with verify = {verify}: repeated planning diverges on "
            "most problems unless its plans are verified",
            stacklevel=2,
        )
    return phases.plan_steps(options)


register(
    Method(
        name="csawg_repeated",
        factory=csawg_repeated,
        scale_by=None,
        family="step_size_planning",
        title="Repeated step-size planning (Csawg)",
        reference=phases.REFERENCE,
        equation="Algorithm 2: every K steps P times w ← w − α⊙g and M times w ← w − γg",
        needs=frozenset({"params", "value"}),
        static_args=(*phases.STATIC, "projections", "corrections"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=17,
        low_precision=windows.LOW_PRECISION,
        wide_state=windows.WIDE_STATE,
    )
)

"""Nonlinear conjugate gradients."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, line_search, transforms, trees
from optgrad.curvature import trial
from optgrad.registry import Method, Tunable, register

METHODS = ("fr", "pr+", "hs", "dy", "pr-fr")


class ScaleByNonlinearCGState(NamedTuple):
    """The last direction and gradient."""

    count: chex.Array  # number of gradients used, int32, shape ()
    since: chex.Array  # directions since the last one of steepest descent, int32, shape ()
    beta: chex.Array  # β of the last direction, 0 for steepest descent, at least float32, shape ()
    direction: chex.ArrayTree  # the last d, positive, like the parameters, at least float32
    gradient: chex.ArrayTree  # the last g, like the parameters, at least float32
    rejected: chex.Array  # number of gradients that were not finite, int32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """β, directions since steepest descent, gradients refused and used; scalars."""
        return {
            "beta": self.beta,
            "steps_since_restart": self.since,
            "rejected_steps": self.rejected,
            "gradient_equivalents": (self.count + self.rejected).astype(self.beta.dtype),
        }


def scale_by_nonlinear_cg(
    method: str = "pr+",
    *,
    restart_every: int | None = None,
    powell: float | optax.Schedule = 0.2,
) -> optax.GradientTransformationExtraArgs:
    r"""The positive direction d ← g + βd of nonlinear conjugate gradients, without a step size.

    See `nonlinear_cg`. To be followed by a line search: with a fixed rate nothing makes the
    directions conjugate. Its ``update`` needs nothing but gradients. One that is not finite gives a
    zero direction, is counted in ``rejected`` and changes nothing else.

    Args:
      method: which β, as for `nonlinear_cg`.
      restart_every: as for `nonlinear_cg`.
      powell: as for `nonlinear_cg`.

    Raises:
      ValueError, TypeError: if an argument is outside its range.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> transformation = optgrad.scale_by_nonlinear_cg("fr")
      >>> state = transformation.init(jnp.zeros(2))
      >>> for gradient in ([2.0, 0.0], [0.0, 1.0]):
      ...     direction, state = transformation.update(jnp.array(gradient), state)
      >>> print(direction)
      [0.5 1. ]
    """
    checks.check_one_of("method", method, METHODS)
    if restart_every is not None:
        checks.check_count("restart_every", restart_every, 1)
    checks.check_in_range("powell", powell, 0.0, low_open=True, or_infinite=True)

    def init(params: optax.Params) -> ScaleByNonlinearCGState:
        return ScaleByNonlinearCGState(
            trial.zero_count(),
            trial.zero_count(),
            trial.scalar(0.0),
            linalg.zeros_like(params),
            linalg.zeros_like(params),
            trial.zero_count(),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByNonlinearCGState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleByNonlinearCGState]:
        del params, extra
        products = _Products.of(updates, state)
        beta, defined = products.beta(method)
        goes_on = products.may_go_on(beta, transforms.hyperparameter_at(powell, state.count))
        goes_on &= defined  # g₀ and d are 0 before the first step
        if restart_every is not None:
            goes_on &= state.since < restart_every
        beta = jnp.where(goes_on, beta, 0.0)
        last = linalg.where(goes_on, state.direction, linalg.zeros_like(state.direction))
        direction = linalg.axpy(beta, last, updates)
        new = ScaleByNonlinearCGState(
            optax.safe_increment(state.count),
            jnp.where(goes_on, optax.safe_increment(state.since), 1),
            beta,
            direction,
            linalg.widened(updates),
            state.rejected,
        )
        updates, finite = trial.finite_only(direction, updates)
        rejected = trial.counted_unless(finite, state.rejected)
        return updates, linalg.where(finite, new, state)._replace(rejected=rejected)

    return transforms.transformation(init, update)


class _Products(NamedTuple):
    """Inner products of the new gradient g, the last one g₀, y = g − g₀ and the last d > 0."""

    gg: chex.Array
    gy: chex.Array
    gg0: chex.Array
    g0g0: chex.Array
    dg: chex.Array
    dy: chex.Array
    dd: chex.Array

    @classmethod
    def of(cls, gradient: optax.Updates, state: ScaleByNonlinearCGState) -> "_Products":
        g, g0, d = gradient, state.gradient, state.direction
        y = linalg.axpy(-1.0, g0, g)
        pairs = ((g, g), (g, y), (g, g0), (g0, g0), (d, g), (d, y), (d, d))
        return cls(*trees.dots(*pairs))

    def beta(self, method: str) -> tuple[chex.Array, chex.Array]:
        """β, and whether its denominator is positive."""
        # The last step was along −d: −dᵀy is the curvature that it met.
        denominator = -self.dy if method in {"hs", "dy"} else self.g0g0
        defined = denominator > 0
        denominator = jnp.where(defined, denominator, 1.0)
        all_of_it, change = self.gg / denominator, self.gy / denominator
        if method in {"fr", "dy"}:
            return all_of_it, defined
        if method == "hs":
            return change, defined
        if method == "pr+":
            return jnp.maximum(change, 0.0), defined
        return jnp.clip(change, -all_of_it, all_of_it), defined

    def may_go_on(self, beta: chex.Array, powell: chex.Numeric) -> chex.Array:
        """Whether g is nearly orthogonal to g₀, as on a quadratic, and −(g + βd) descends.

        No where a number is not finite, an overflowing β included.
        """
        descent = self.gg + beta * self.dg
        size = self.gg + 2.0 * beta * self.dg + beta * beta * self.dd
        lengths = jnp.sqrt(self.gg) * jnp.sqrt(jnp.maximum(size, 0.0))
        descends = descent > 10.0 * linalg.epsilon() * lengths
        return descends & (jnp.abs(self.gg0) < powell * self.gg)


def nonlinear_cg(
    method: str = "pr+",
    *,
    restart_every: int | None = None,
    powell: float | optax.Schedule = 0.2,
    curv_rtol: float | optax.Schedule = 0.1,
    max_linesearch_steps: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Nonlinear conjugate gradients with a line search (Fletcher–Reeves, Polak–Ribière, …).

    .. math::
      d_t = g_t + \beta_t d_{t-1}, \qquad \theta_{t+1} = \theta_t - \alpha_t d_t, \qquad
      \beta^{FR} = \frac{|g_t|^2}{|g_{t-1}|^2}, \quad
      \beta^{PR} = \frac{g_t\cdot y_t}{|g_{t-1}|^2}, \quad y_t = g_t - g_{t-1}

    with :math:`\alpha_t` from a zoom line search for Wolfe's conditions. On a quadratic with exact
    line searches the directions are conjugate with respect to the Hessian, and as many steps as
    there are different eigenvalues suffice; the method stores two vectors. It begins anew from
    steepest descent (β = 0) where :math:`|g_t\cdot g_{t-1}| \ge` ``powell`` :math:`|g_t|^2`
    (successive gradients are orthogonal on a quadratic), where −d would not descend, and after a
    step that was not taken.

    It shines on deterministic losses of many parameters: a 12-dimensional quadratic of condition
    1000 takes 17 steps (87 gradient equivalents) to 10⁻²⁰ with ``curv_rtol=0.01``, Rosenbrock's
    valley from (−1.2, 1) 29 (293) to 10⁻¹², a saddle missed by 10⁻⁶ is left in 4. The tolerance of
    the line search matters both ways: with the default 0.1 that quadratic takes 108 steps (470),
    while the valley takes 41 (274) and 25 valleys side by side 39 (263) instead of 43 (347). It
    fails on minibatches: each line search fits its batch, and gradients of different batches are
    not orthogonal, so that it restarts and is steepest descent. Nothing here leaves a saddle on
    whose stable manifold the run began.

    A step costs the gradient, one gradient for each evaluation of the search (2 to 6; 20 where one
    fails) and one loss (⅓), about 5 gradient equivalents; the state holds 3 vectors. It tries its
    step: it must be the last of a chain, with ``value``, ``grad`` and ``value_fn`` of one batch,
    and then the loss of that batch never increases.

    Args:
      method: which β: ``"fr"``, Fletcher–Reeves; ``"pr+"``, :math:`\max(\beta^{PR}, 0)`; ``"hs"``,
        Hestenes–Stiefel :math:`g_t\cdot y_t/(-d_{t-1}\cdot y_t)`; ``"dy"``, Dai–Yuan
        :math:`|g_t|^2/(-d_{t-1}\cdot y_t)`; ``"pr-fr"``, :math:`\beta^{PR}` clipped to
        :math:`\pm\beta^{FR}`.
      restart_every: steps from one steepest descent to the next, an integer ≥ 1; None is never.
        Do not restart every D steps for a small D, as textbooks advise: rounding makes that
        quadratic take more than 12 steps, and with restarts every 12 it takes 72.
      powell: in (0, ∞]; ∞ never restarts for it. A schedule counts from the last step that was not
        taken.
      curv_rtol: tolerance of the search, in (0, ∞]: the slope where it ends, relative to the slope
        where it began. 0.01 for deterministic, nearly quadratic losses; from 1 on only a decrease
        is asked for.
      max_linesearch_steps: evaluations in one search, an integer ≥ 1. The search begins with the
        last step size.

    Returns:
      A `GradientTransformationExtraArgs` without learning rate, whose ``update`` needs the
      parameters, ``value``, ``grad`` and ``value_fn``. Steps that would increase the loss, and
      non-finite losses and gradients, are steps not taken, counted in the state's ``rejected``.

    Raises:
      ValueError, TypeError: if an argument is outside its range; by ``update``, if the parameters
        or an extra argument are missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> loss = lambda x: 0.5 * x[0] ** 2 + 10.0 * (x[1] - x[0]) ** 2
      >>> optimizer = optgrad.nonlinear_cg(curv_rtol=0.01)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grad = jax.value_and_grad(loss)(params)
      ...     extra = {"value": value, "grad": grad, "value_fn": loss}
      ...     updates, state = optimizer.update(grad, state, params, **extra)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.array([1.0, 3.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(8):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 1e-8)
      True

    References:
      R. Fletcher, C. Reeves, "Function minimization by conjugate gradients", 1964; E. Polak,
      G. Ribière, "Note sur la convergence de méthodes de directions conjuguées", 1969; M. Powell,
      "Restart procedures for the conjugate gradient method", 1977; Y. LeCun et al., "Efficient
      BackProp", 1998, as in the slides of J. Duda.

    Deviations from the slides: these search "toward −αv" with v = βv − ∇F, which would ascend; the
    step here is along v. The restarts, for which they say "reset sometimes", are Powell's. A step
    that the line search ends with too high a loss is not taken: optax's search returns its last
    trial where its budget ends, in float32 a loss of 3.9·10¹⁹ after −0.8 on that saddle.
    """
    checks.check_in_range("curv_rtol", curv_rtol, 0.0, low_open=True, or_infinite=True)
    checks.check_count("max_linesearch_steps", max_linesearch_steps, 1)
    return line_search.with_zoom_linesearch(
        scale_by_nonlinear_cg(method, restart_every=restart_every, powell=powell),
        max_steps=max_linesearch_steps,
        curv_rtol=curv_rtol,
        initial_guess="keep",
    )


register(
    Method(
        name="nonlinear_cg",
        factory=nonlinear_cg,
        scale_by=scale_by_nonlinear_cg,
        family="curvature",
        title="Nonlinear conjugate gradients (NCG)",
        reference=trial.SLIDES,
        equation="d ← g + βd, β of Fletcher–Reeves, Polak–Ribière …; θ ← θ − αd by a line search",
        needs=frozenset({"params", "value", "grad", "value_fn"}),
        static_args=("method", "restart_every", "max_linesearch_steps"),
        tunes=Tunable("curv_rtol", 1e-3, 1.0),
        test_hyperparams={"curv_rtol": 0.1},
        state_size=3,  # direction, gradient, and the search's gradient at the new point
        cost=5.0,
        low_precision="nothing: conjugacy and differences of gradients need their digits",
        wide_state=("direction.direction", "direction.gradient", "search.grad"),
    )
)

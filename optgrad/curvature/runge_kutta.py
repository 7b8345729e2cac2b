"""Runge–Kutta steps of the gradient flow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles, transforms
from optgrad.curvature import trial
from optgrad.registry import Method, Tunable, register


class Tableau(NamedTuple):
    """Coefficients of an explicit method."""

    stages: tuple[tuple[float, ...], ...]  # row i: where stage i + 2 is evaluated, of the slopes
    weights: tuple[float, ...]  # of the slopes in the step


TABLEAUS = {
    "euler": Tableau((), (1.0,)),
    "midpoint": Tableau(((0.5,),), (0.0, 1.0)),
    "heun": Tableau(((1.0,),), (0.5, 0.5)),
    "rk4": Tableau(
        ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


class RungeKuttaState(NamedTuple):
    """Counters; the method has no memory."""

    count: chex.Array  # number of updates, int32, shape ()
    rejected: chex.Array  # steps that were not finite, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Costs; scalars."""
        return {"rejected_steps": self.rejected, "gradient_equivalents": self.cost}


def runge_kutta(
    learning_rate: float | optax.Schedule = 0.1, *, tableau: str = "rk4"
) -> optax.GradientTransformationExtraArgs:
    r"""Explicit Runge–Kutta step of the gradient flow :math:`\dot\theta = -\nabla F(\theta)`.

    .. math::
      k_1 = u, \qquad k_i = \nabla F\Bigl(\theta - h\sum_{j<i} a_{ij}k_j\Bigr), \qquad
      \theta \leftarrow \theta - h\sum_i b_i k_i

    with the incoming updates u, the gradient, as first slope, and the other slopes on the same
    batch: what precedes in a chain (clipping, weight decay) changes u alone, to which
    ``"midpoint"`` gives no weight of its own. ``"euler"`` is gradient descent, of order 1 in h;
    ``"midpoint"`` and ``"heun"`` are of order 2, ``"rk4"`` of order 4.

    It shines where the path of the flow itself is wanted. As an optimizer it buys accuracy that is
    not needed: on a stiff loss of largest curvature L stability still asks for h < 2/L (Heun,
    midpoint; as for gradient descent) or 2.785/L (RK4), which pays 4 gradients for 1.4 times the
    step: 12,700 steps on Rosenbrock's function, 51,000 gradients (gradient descent: 32,000).

    Cost: one gradient for each slope (1, 2, 2, 4). Memory: one vector for each slope while it
    steps, none in the state.

    Args:
      learning_rate: h ≥ 0, the time step.
      tableau: ``"euler"``, ``"midpoint"``, ``"heun"`` or ``"rk4"``.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters and, except for
      ``"euler"``, ``value_fn``. Steps are not tried; one that is not finite is a zero update,
      counted in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, and by ``update`` if ``value_fn`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: 0.5 * x**2
      >>> optimizer = optgrad.runge_kutta(1.0)
      >>> params = jnp.array(1.0)
      >>> gradient = jax.grad(loss)(params)
      >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params, value_fn=loss)
      >>> print(f"{params + updates:.3f}")  # e⁻¹ = 0.368
      0.375

    References:
      J. Duda, "Improving convergence of stochastic gradient descent" (slides), "There are better
      ODE methods". W. Kutta, "Beitrag zur näherungsweisen Integration totaler
      Differentialgleichungen", 1901: rk4.
    """
    checks.check_one_of("tableau", tableau, TABLEAUS)
    checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    stages, weights = TABLEAUS[tableau]

    def init(params: optax.Params) -> RungeKuttaState:
        del params
        return RungeKuttaState(trial.zero_count(), trial.zero_count(), trial.scalar(0.0))

    def update(
        updates: optax.Updates,
        state: RungeKuttaState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], chex.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, RungeKuttaState]:
        del extra
        params = transforms.require_params(params)
        h = transforms.hyperparameter_at(learning_rate, state.count)
        slopes = [linalg.widened(updates)]
        if stages:
            value_fn = oracles.require_function("value_fn", value_fn)
            gradient = jax.grad(value_fn)
            for row in stages:
                ahead = _displaced(params, h, row, slopes)
                slopes.append(linalg.widened(gradient(ahead)))
        step = linalg.scale(-jnp.asarray(h), _sum(weights, slopes))
        found, finite = trial.finite_only(step, params)
        return found, RungeKuttaState(
            optax.safe_increment(state.count),
            trial.counted_unless(finite, state.rejected),
            state.cost + float(len(weights)),
        )

    return transforms.transformation(init, update)


def _displaced(
    params: optax.Params, h: chex.Numeric, row: tuple[float, ...], slopes: list[Any]
) -> optax.Params:
    """θ − h·Σ aⱼkⱼ, in the parameters' types."""
    step = linalg.scale(-jnp.asarray(h), _sum(row, slopes))
    return transforms.cast_like(linalg.axpy(1.0, params, step), params)


def _sum(weights: tuple[float, ...], slopes: list[Any]) -> Any:
    """Σ aⱼkⱼ of the slopes that have a weight, which need not be finite if they have none."""
    used = [(a, k) for a, k in zip(weights, slopes, strict=True) if a]
    total = linalg.scale(used[0][0], used[0][1])
    for a, k in used[1:]:
        total = linalg.axpy(a, k, total)
    return total


register(
    Method(
        name="runge_kutta",
        factory=runge_kutta,
        scale_by=None,
        family="curvature",
        title="Runge-Kutta step of the gradient flow",
        reference=trial.SLIDES,
        equation="better ODE methods: θ ← θ − h·Σ bᵢkᵢ, kᵢ = ∇F(θ − h·Σ aᵢⱼkⱼ)",
        needs=frozenset({"params", "value_fn"}),
        static_args=("tableau",),
        tunes=Tunable("learning_rate", 1e-3, 1e1),
        test_hyperparams={"learning_rate": 0.5},
        state_size=0,
        cost=4,
    )
)

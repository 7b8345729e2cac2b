"""Saddle-free Newton on a Krylov space."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles, transforms, trees
from optgrad.curvature import krylov, saddle_free_steps, trial
from optgrad.registry import Method, Tunable, register


class LanczosSaddleFreeState(NamedTuple):
    """A damping, the last step, and counters."""

    count: chex.Array  # number of updates, int32, shape ()
    key: chex.PRNGKey  # of the random part of the start, uint32, shape (2,)
    damping: chex.Array  # λ, shape ()
    previous: chex.ArrayTree | None  # last step that was taken, a tree like the parameters
    curvature_min: chex.Array  # smallest Ritz value of the last step, shape ()
    curvature_max: chex.Array  # largest one, shape ()
    rejected: chex.Array  # number of steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Damping, smallest and largest Ritz value, steps not taken, gradient equivalents."""
        return {
            "damping": self.damping,
            "curvature_min": self.curvature_min,
            "curvature_max": self.curvature_max,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def scale_by_lanczos_saddle_free(
    k: int = 10,
    damping: float | optax.Schedule = 0.1,
    *,
    start: str = "mixed",
    mix: float | optax.Schedule = 0.1,
    use_prev: bool = True,
    complement: str = "scaled",
    kick: float | optax.Schedule = 0.0,
    max_norm: float | optax.Schedule | None = None,
    hvp: str = "exact",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `lanczos_saddle_free` with a fixed damping, not tried.

    Args:
      k: as for `lanczos_saddle_free`, and so are all others.
      damping: λ ≥ 0.
      start: of Lanczos' recursion.
      mix: random part of it.
      use_prev: whether the previous step is one of the directions.
      complement: what happens outside of the subspace.
      kick: off stationary points.
      max_norm: largest length of the direction.
      hvp: how products are computed.
      seed: of the random part.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    options = saddle_free_steps.Options(
        k, damping, "fixed", 1, start, mix, use_prev, complement, kick, max_norm, hvp, seed
    )
    return _transformation(None, options)


def lanczos_saddle_free(
    learning_rate: float | optax.Schedule = 1.0,
    *,
    k: int = 10,
    damping: float | optax.Schedule = 0.1,
    damping_mode: str = "search",
    n_search: int = 6,
    start: str = "mixed",
    mix: float | optax.Schedule = 0.1,
    use_prev: bool = True,
    complement: str = "scaled",
    kick: float | optax.Schedule = 0.0,
    max_norm: float | optax.Schedule | None = None,
    hvp: str = "exact",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Approximate saddle-free Newton: curvatures of both signs in a Krylov space.

    .. math::
      V^\top H V = Q\Lambda Q^\top, \qquad
      \theta \leftarrow \theta - \alpha\Bigl(VQ\,(|\Lambda| + \lambda I)^{-1} Q^\top V^\top g
        + \frac{g - VV^\top g}{\max|\Lambda| + \lambda}\Bigr)

    V holds k Lanczos vectors of the Hessian, which find its largest curvatures of either sign
    first, and the previous step. Outside of their space the step is gradient descent with the safe
    step size of the largest curvature.

    Where a loss has saddles, it leaves them however small their negative curvature is: the distance
    from the stable manifold doubles at each step at least, and an ill-conditioned saddle takes as
    many steps as a well-conditioned one (21 from a distance of 10⁻⁶, where gradient descent needs
    46,000). Quadratics of no more than k parameters are solved in 1 or 2 steps. On Rosenbrock's
    function the search takes about 28 steps where Newton's method takes 5. With minibatches it
    loses per gradient: a step of k = 10 costs 25, and on a small network for digits it ended at a
    training loss of 0.027 after 3000 gradient equivalents, where momentum reaches 0.022.

    A step costs 1 gradient, k + 1 Hessian-vector products of 2 gradient equivalents each (k without
    ``use_prev``) and ``n_search`` (``"lm"``: 1) values; one value more without ``value``. Memory is
    k + 2 trees like the parameters, one of which is in the state.

    The modes ``"search"`` and ``"lm"`` try their steps and never increase the loss: the method must
    then be the last element of a chain, with gradient, ``value`` and ``value_fn`` of one batch.

    Args:
      learning_rate: α ≥ 0, times the step that is tried.
      k: number of Lanczos vectors, ≥ 1; no more than there are parameters are used.
      damping: λ > 0, in units of the curvature, of the first step; ``"fixed"``: λ ≥ 0 of all.
      damping_mode: ``"search"`` tries ``n_search`` dampings between λ/1000 and 100λ and takes the
        best (the largest one within the roundings of the best); if none decreases the loss, λ is
        multiplied by 10. ``"lm"`` tries one and multiplies or divides λ by 1.5 where the gain ratio
        is below ¼ or above ¾. ``"fixed"`` tries nothing.
      n_search: dampings to try, ≥ 1.
      start: ``"mixed"`` begins Lanczos' recursion with :math:`g + \text{mix}\,|g|\,r`, r a random
        direction; ``"gradient"`` with g, which cannot find a curvature that is orthogonal to all
        :math:`H^j g`, and never escapes from the stable manifold of a saddle.
      mix: ≥ 0, random part of the start. A zero gradient is replaced by r in any case.
      use_prev: whether the previous step is added to the space (and kept in the state).
      complement: ``"scaled"`` as above; ``"ignore"`` takes no step outside of the space, as in the
        paper.
      kick: ≥ 0, length of a step along the most negative curvature, downhill, where
        :math:`|g| \le 10^{-4}\max|\Lambda|`: from exactly a saddle, or its stable manifold, it
        needs 15 steps with 0.1 where the rounding of the random start alone needs 67.
      max_norm: > 0, largest length of the step before the learning rate; None is no limit.
      hvp: how products are computed, ``"exact"``, ``"jvp"``, ``"fd"`` or ``"fdc"``, see `newton`.
      seed: of the random directions, which are in the state.

    Returns:
      A `GradientTransformationExtraArgs` whose ``update`` needs the parameters and ``value_fn``,
      and takes ``value`` and ``curvature_fn``, the loss of another batch for the curvature. Steps
      that are not finite or not accepted are zero and counted in the state's field ``rejected``.

    Raises:
      ValueError: for an argument outside its range, and in ``update`` without parameters or
        ``value_fn``.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4
      >>> optimizer = optgrad.lanczos_saddle_free(k=2, kick=0.1)
      >>> params = jnp.array([1.0, 0.0])
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(saddle)(params)
      ...     updates, state = optimizer.update(gradient, state, params, value_fn=saddle)
      ...     return params + updates, state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> print(f"{saddle(params):.3f}")  # the minima are at y = ±√2
      -1.000

    References:
      Y. Dauphin, R. Pascanu, C. Gulcehre, K. Cho, S. Ganguli, Y. Bengio, "Identifying and attacking
      the saddle point problem in high-dimensional non-convex optimization", 2014, Algorithm 1; J.
      Duda, "Improving convergence of stochastic gradient descent" (slides).

    Deviations from the paper: the random part of the start, the previous step as one more direction
    (O. Vinyals and D. Povey, "Krylov subspace descent for deep learning", 2012), the step outside
    of the space, ``"lm"`` and the kick. Each is an option; without a random start or a kick the
    method does not leave a stable manifold.
    """
    checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    options = saddle_free_steps.Options(
        k,
        damping,
        damping_mode,
        n_search,
        start,
        mix,
        use_prev,
        complement,
        kick,
        max_norm,
        hvp,
        seed,
    )
    return _transformation(learning_rate, options)


def _transformation(
    learning_rate: float | optax.Schedule | None, options: saddle_free_steps.Options
) -> optax.GradientTransformationExtraArgs:
    """The signed step, or without a learning rate the direction."""
    options.check()

    def init(params: optax.Params) -> LanczosSaddleFreeState:
        count = trial.zero_count()
        return LanczosSaddleFreeState(
            count=count,
            key=jax.random.PRNGKey(options.seed),
            damping=trial.scalar(transforms.hyperparameter_at(options.damping, count)),
            previous=krylov.first_previous(params, options.use_prev),
            curvature_min=trial.scalar(0.0),
            curvature_max=trial.scalar(0.0),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
        )

    def update(
        updates: optax.Updates,
        state: LanczosSaddleFreeState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Any = None,
        curvature_fn: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, LanczosSaddleFreeState]:
        del extra
        params = transforms.require_params(params)
        value_fn = oracles.require_function("value_fn", value_fn)
        count = optax.safe_increment(state.count)
        if not trees.size(params):
            return transforms.cast_like(updates, params), state._replace(count=count)
        curvature_fn = value_fn if curvature_fn is None else curvature_fn
        curvature_fn = oracles.require_function("curvature_fn", curvature_fn)
        product = oracles.hessian_product(curvature_fn, params, options.hvp)
        key, random_key = jax.random.split(state.key)
        rate = -1.0 if learning_rate is None else learning_rate
        rate = trial.scalar(transforms.hyperparameter_at(rate, state.count))
        steps = saddle_free_steps.steps_at(
            options,
            product,
            updates,
            previous=state.previous,
            key=random_key,
            rate=rate,
            count=state.count,
        )
        rows = krylov.rows_of(options.k, params)
        cost = krylov.cost_of(rows, options.use_prev, krylov.product_cost(options.hvp))

        if options.damping_mode == "fixed":
            damping = trial.scalar(transforms.hyperparameter_at(options.damping, state.count))
            found, accepted = trial.finite_only(steps.at(damping).vector, params)
            accepted &= True if value is None else jnp.isfinite(transforms.require_value(value))
            found = trial.taken(accepted, found)
        else:
            searches = options.damping_mode == "search"
            values = (options.n_search if searches else 1) + (value is None)
            cost += oracles.VALUE_COST * values
            value = transforms.require_value(value_fn(params) if value is None else value)
            at = {"damping": state.damping, "value": value}
            if searches:
                adapted = saddle_free_steps.search(
                    value_fn, params, steps, n_search=options.n_search, **at
                )
            else:
                adapted = saddle_free_steps.follow(value_fn, params, steps, **at)
            found, accepted, damping = adapted
            # What is not finite before the step says nothing about the damping.
            known = jnp.isfinite(value) & linalg.all_finite(updates)
            damping = jnp.where(known, damping, state.damping)
        least, most = krylov.ends(steps.model, (state.curvature_min, state.curvature_max))
        new = LanczosSaddleFreeState(
            count=count,
            key=key,
            damping=damping,
            previous=krylov.next_previous(accepted, found, state.previous),
            curvature_min=least,
            curvature_max=most,
            rejected=trial.counted_unless(accepted, state.rejected),
            cost=state.cost + cost,
        )
        return found, new

    return transforms.transformation(init, update)


register(
    Method(
        name="lanczos_saddle_free",
        factory=lanczos_saddle_free,
        scale_by=scale_by_lanczos_saddle_free,
        family="curvature",
        title="Saddle-free Newton on a Krylov space",
        reference=saddle_free_steps.DAUPHIN,
        equation="Algorithm 1: θ ← θ − α·VQ(|Λ| + λI)⁻¹QᵀVᵀg, VᵀHV = QΛQᵀ, V by Lanczos",
        needs=frozenset({"params", "value_fn"}),
        static_args=(
            "k",
            "damping_mode",
            "n_search",
            "start",
            "use_prev",
            "complement",
            "hvp",
            "seed",
        ),
        tunes=Tunable("learning_rate", 1e-2, 1e0),
        test_hyperparams={"learning_rate": 1.0},
        state_size=1,
        cost=1 + 2 * 11 + 7 / 3,
        low_precision="the previous step, by low_precision_state: it only widens the subspace",
    )
)

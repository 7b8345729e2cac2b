"""Descent in a Krylov space of the Hessian by an inner minimisation of the loss itself."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import checks, linalg, oracles, transforms, trees
from optgrad.curvature import few_coordinates, krylov, trial
from optgrad.registry import Method, register

_LEAST_CURVATURE = 1e-4  # share of the largest one, below which coordinates are not stretched more
_LEAST_SCALE = 1e-2  # share of the mean of a diagonal that is added to it


class KrylovSubspaceDescentState(NamedTuple):
    """The last step, and counters."""

    count: chex.Array  # number of updates, int32, shape ()
    previous: chex.ArrayTree | None  # last step that was taken, a tree like the parameters
    evaluations: chex.Array  # of inner gradients in the last step, int32, shape ()
    curvature_min: chex.Array  # smallest Ritz value of the last step, shape ()
    curvature_max: chex.Array  # largest one, shape ()
    rejected: chex.Array  # number of steps that were not taken, int32, shape ()
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """Ritz values, inner gradients of the last step, steps not taken, gradient equivalents."""
        return {
            "curvature_min": self.curvature_min,
            "curvature_max": self.curvature_max,
            "inner_evaluations": self.evaluations,
            "rejected_steps": self.rejected,
            "gradient_equivalents": self.cost,
        }


def krylov_subspace_descent(
    *,
    curvature: str = "hessian",
    k: int = 10,
    inner_steps: int = 8,
    precondition: bool = False,
    whiten: bool = True,
    use_prev: bool = True,
    hvp: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""Krylov subspace descent: the loss itself is minimised in a space of a few directions.

    .. math::
      V = \mathrm{span}\{g, Bg, \dots, B^{k-1}g, \theta - \theta_{\text{old}}\}, \qquad
      \theta \leftarrow \theta + V\alpha^*, \quad
      \alpha^* \approx \mathop{\mathrm{arg\,min}}_\alpha f(\theta + V\alpha)

    The matrix B only chooses the directions, so that neither negative curvature nor a damping
    matters; k + 1 coordinates are minimised by L-BFGS with a line search. They are *whitened*, by
    the square roots of the curvatures' sizes, without which a quadratic of condition 1000 takes
    more than 5 steps instead of 1. Of the inner points the best one is kept.

    It takes the fewest steps of all methods, and steps are dear: Rosenbrock's function takes 4
    steps and about 80 gradient equivalents, the saddle :math:`x^2-y^2+y^4/4` 1 step from a
    distance of 10⁻² and 3 from 10⁻⁶. From the saddle's stable manifold itself it does not escape,
    since all of its directions lie in it. With minibatches it over-fits each batch: on a small
    network for digits it ended at a training loss of 0.030 after 3000 gradient equivalents, where
    momentum reaches 0.022. A larger batch for the curvature or another one for the inner
    minimisation, ``curvature_fn`` and ``inner_fn``, are what the paper uses against it.

    A step costs 1 gradient, k + 1 products of 2 gradient equivalents (k without ``use_prev``), the
    inner gradients (1 or 2 for each inner step, ``inner_evaluations`` of the diagnostics) and one
    or two values. Memory is k + 2 trees like the parameters, one of which is in the state. The
    step is tried on ``value_fn`` and never increases it: the method must be the last element of a
    chain, with gradient, ``value`` and ``value_fn`` of one batch.

    Args:
      curvature: ``"hessian"`` of ``curvature_fn``, or ``"ggn"``, the Gauss–Newton matrix of
        ``outputs_fn`` and ``out_loss_fn``.
      k: number of Krylov vectors, ≥ 1; no more than there are parameters are used.
      inner_steps: steps of L-BFGS, ≥ 1; it ends before where one changes nothing.
      precondition: whether the Krylov space is that of :math:`P^{-1/2}BP^{-1/2}` for the diagonal P
        of ``curvature_diagonal`` (as `optgrad.gauss_newton_diagonal` computes it), raised by 1 % of
        its mean.
      whiten: whether coordinates are scaled by their curvatures.
      use_prev: whether the previous step is added to the space (and kept in the state).
      hvp: how products with the Hessian are computed, ``"exact"``, ``"jvp"``, ``"fd"`` or
        ``"fdc"``, see `newton`.

    Returns:
      A `GradientTransformationExtraArgs` without learning rate. Its ``update`` needs the parameters
      and ``value_fn``, and takes ``value``, ``curvature_fn`` and ``inner_fn``, losses of other
      batches. Steps that are not finite or increase the loss are zero and counted in the state's
      field ``rejected``. Explicit meshes are not supported (the gradient along the directions is
      that of JAX); automatic ones are.

    Raises:
      ValueError: for an argument outside its range, and in ``update`` without parameters, without
        ``value_fn`` or without what ``curvature`` and ``precondition`` ask for.

    Examples:
      >>> import jax, jax.numpy as jnp, optgrad
      >>> loss = lambda x: 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2
      >>> optimizer = optgrad.krylov_subspace_descent(k=2)
      >>> params = jnp.array([-1.2, 1.0])
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, gradient = jax.value_and_grad(loss)(params)
      ...     extra = dict(value=value, value_fn=loss)
      ...     updates, state = optimizer.update(gradient, state, params, **extra)
      ...     return params + updates, state
      >>> for _ in range(6):
      ...     params, state = step(params, state)
      >>> print(params.round(2))
      [1. 1.]

    References:
      O. Vinyals, D. Povey, "Krylov Subspace Descent for Deep Learning", 2012, Algorithm 1; J. Duda,
      "Improving convergence of stochastic gradient descent" (slides).

    Deviations from the paper: coordinates are scaled by the sizes of the projected matrix's
    eigenvalues, which may be negative, instead of its Cholesky factor, and the step is tried.
    """
    checks.check_one_of("curvature", curvature, ("hessian", "ggn"))
    checks.check_count("k", k, 1)
    checks.check_count("inner_steps", inner_steps, 1)
    for name, flag in (("precondition", precondition), ("whiten", whiten), ("use_prev", use_prev)):
        checks.check_one_of(name, flag, (False, True))
    checks.check_one_of("hvp", hvp, oracles.HESSIAN_PRODUCT_COST)

    def init(params: optax.Params) -> KrylovSubspaceDescentState:
        return KrylovSubspaceDescentState(
            count=trial.zero_count(),
            previous=krylov.first_previous(params, use_prev),
            evaluations=trial.zero_count(),
            curvature_min=trial.scalar(0.0),
            curvature_max=trial.scalar(0.0),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
        )

    def update(
        updates: optax.Updates,
        state: KrylovSubspaceDescentState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Any = None,
        curvature_fn: Any = None,
        inner_fn: Any = None,
        outputs_fn: Any = None,
        out_loss_fn: Any = None,
        curvature_diagonal: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, KrylovSubspaceDescentState]:
        del extra
        params = transforms.require_params(params)
        value_fn = oracles.require_function("value_fn", value_fn)
        inner_fn = value_fn if inner_fn is None else oracles.require_function("inner_fn", inner_fn)
        if curvature == "ggn":
            outputs_fn = oracles.require_function("outputs_fn", outputs_fn, _BUILDER)
            out_loss_fn = oracles.require_function("out_loss_fn", out_loss_fn, _BUILDER)
        elif curvature_fn is not None:
            oracles.require_function("curvature_fn", curvature_fn)
        scales = _inverse_roots(params, curvature_diagonal) if precondition else None
        count = optax.safe_increment(state.count)
        if not trees.size(params):
            return transforms.cast_like(updates, params), state._replace(count=count)
        if curvature == "ggn":
            product = oracles.gauss_newton_product(outputs_fn, out_loss_fn, params)
        else:
            fn = value_fn if curvature_fn is None else curvature_fn
            product = oracles.hessian_product(fn, params, hvp)
        rows = krylov.rows_of(k, params)
        model = _model(product, updates, rows, state.previous, scales)
        stretch = _stretch(model) if whiten else jnp.ones_like(model.curvatures)

        def step_to(alpha: chex.Array) -> chex.ArrayTree:
            return model.vector(stretch * alpha)

        def inner(alpha: chex.Array) -> chex.Array:
            moved = transforms.cast_like(step_to(alpha), params)
            return trial.scalar(inner_fn(optax.apply_updates(params, moved)))

        alpha, evaluations = few_coordinates.minimum(
            inner, len(stretch), inner_steps, is_scaled=whiten
        )
        cost = krylov.cost_of(rows, use_prev, krylov.product_cost(hvp, curvature))
        cost += evaluations + oracles.VALUE_COST * (1 if value is not None else 2)
        value = transforms.require_value(value_fn(params) if value is None else value)
        # What the model promises is of no use: the step was chosen by the loss itself.
        tried = trial.attempt(value_fn, params, step_to(alpha), value, jnp.ones_like(value))
        least, most = krylov.ends(model, (state.curvature_min, state.curvature_max))
        new = KrylovSubspaceDescentState(
            count=count,
            previous=krylov.next_previous(tried.accepted, tried.updates, state.previous),
            evaluations=evaluations,
            curvature_min=least,
            curvature_max=most,
            rejected=trial.counted_unless(tried.accepted, state.rejected),
            cost=state.cost + cost,
        )
        return tried.updates, new

    return transforms.transformation(init, update)


_BUILDER = "optgrad.curvature_args(loss_fn, outputs=…, out_loss=…)"


def _model(
    product: linalg.Product,
    gradient: optax.Updates,
    rows: int,
    previous: chex.ArrayTree | None,
    scales: chex.ArrayTree | None,
) -> krylov.Model:
    """The Krylov space; with scales S, directions Sv for the space of S·B·S and Sg."""
    gradient = linalg.widened(gradient)
    if scales is None:
        return krylov.model(product, gradient, rows, previous)

    def scaled(x: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(jnp.multiply, x, scales)

    if previous is not None:
        previous = jax.tree.map(jnp.divide, previous, scales)
    model = krylov.model(lambda v: scaled(product(scaled(v))), scaled(gradient), rows, previous)
    basis = jax.tree.map(lambda v, s: v * s[None], model.basis, scales)
    return model._replace(basis=basis)


def _inverse_roots(params: optax.Params, diagonal: optax.Updates | None) -> chex.ArrayTree:
    """P^−½, with P raised by a share of its mean; ones where that is 0."""
    if diagonal is None:
        raise ValueError(
            "curvature_diagonal = None; accepted: the nonnegative diagonal of the Gauss-Newton "
            "matrix, a tree like the parameters, as optgrad.gauss_newton_diagonal computes it"
        )
    ones = jax.tree.map(jnp.ones_like, linalg.zeros_like(params))
    mean = linalg.dot(linalg.widened(diagonal), ones) / max(trees.size(params), 1)

    def inverse_root(h: chex.Array, one: chex.Array) -> chex.Array:
        raised = h.astype(one.dtype) + (_LEAST_SCALE * mean).astype(one.dtype)
        return jnp.where(mean > 0, jax.lax.rsqrt(jnp.where(mean > 0, raised, one)), one)

    return jax.tree.map(inverse_root, diagonal, ones)


def _stretch(model: krylov.Model) -> chex.Array:
    """1/√|Λ|, so that all curvatures are of size 1; bounded, and ones where there are none."""
    sizes = jnp.maximum(jnp.abs(model.curvatures), _LEAST_CURVATURE * model.size)
    return jax.lax.rsqrt(jnp.where(model.size > 0, sizes, 1.0))


register(
    Method(
        name="krylov_subspace_descent",
        factory=krylov_subspace_descent,
        scale_by=None,
        family="curvature",
        title="Krylov subspace descent",
        reference='O. Vinyals, D. Povey, "Krylov Subspace Descent for Deep Learning", 2012',
        equation="Algorithm 1: θ ← θ + Vα, α = argmin f(θ + Vα), V = span{g, Bg, …, Bᵏ⁻¹g, Δθ}",
        needs=frozenset({"params", "value_fn"}),
        static_args=(
            "curvature",
            "k",
            "inner_steps",
            "precondition",
            "whiten",
            "use_prev",
            "hvp",
        ),
        state_size=1,
        cost=1 + 2 * 11 + 2 * 8,
        low_precision="the previous step, by low_precision_state: it only widens the subspace",
    )
)

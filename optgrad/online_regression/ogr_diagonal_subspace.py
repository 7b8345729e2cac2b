"""Online gradient regression of each coordinate, and of a subspace on top."""

import functools
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, leafwise, linalg, transforms, trees
from optgrad.online_regression import parabola, subspace, subspace_model
from optgrad.online_regression.adaptive_sgd import AdaptiveSGDState, adaptive_sgd
from optgrad.online_regression.ogr_diagonal import OGRDiagonalState, ogr_diagonal
from optgrad.registry import Method, Tunable, register

_DEFAULT_D = 10


class OGRDiagonalSubspaceState(NamedTuple):
    """One parabola for each coordinate, and a paraboloid in d directions."""

    diagonal: OGRDiagonalState | AdaptiveSGDState  # of the coordinates, with all means
    basis: subspace.Basis  # V, the d directions
    model: subspace_model.Model  # covariances of positions and gradients along them
    curvatures: chex.Array  # λ in the subspace, ascending, shape (d,)
    energy_inside: chex.Array  # ‖Vg‖²/‖g‖², shape ()
    basis_overlap: chex.Array  # ‖V_new Vᵀ‖²/d, shape ()
    orthonormality_error: chex.Array  # largest |VVᵀ − 1| when last measured, shape ()

    def diagnostics(self) -> dict[str, chex.Array]:
        """What is modelled.

        Returns:
          The scalars of the diagonal model, named ``diagonal_…``; and of the subspace
          ``curvatures``, shape (d,), ``curvature_min``, ``curvature_max``, ``energy_inside``,
          ``basis_overlap`` and ``orthonormality_error`` as of `ogr_subspace`.
        """
        diagonal = {f"diagonal_{name}": x for name, x in self.diagonal.diagnostics().items()}
        return diagonal | {
            "curvatures": self.curvatures,
            "curvature_min": self.curvatures[0],
            "curvature_max": self.curvatures[-1],
            "energy_inside": self.energy_inside,
            "basis_overlap": self.basis_overlap,
            "orthonormality_error": self.orthonormality_error,
        }


def ogr_diagonal_subspace(
    mix: float | optax.Schedule = 0.4,
    alpha: float | optax.Schedule | None = None,
    beta: float | optax.Schedule | None = None,
    lr_max: float | optax.Schedule | None = None,
    *,
    d: int | None = None,
    basis: str | None = None,
    basis_rate: float | optax.Schedule | None = None,
    correlation_one: bool = False,
    ridge: float | optax.Schedule | None = None,
    warmup_steps: int | None = None,
    seed: int = 0,
    state_dtype: Any | None = None,
    paper: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Online gradient regression per coordinate and in a subspace (dsOGR, cdsOGR).

    .. math::
      \theta \leftarrow \theta + u + w\,V^T(y - Vu), \qquad
      u = -\min(\alpha/|\lambda_i|,\, lr_{max})\,m_i, \qquad
      y = -\min(\alpha/|H|,\, lr_{max})\,Vm

    The step u of `ogr_diagonal` everywhere, and within d directions V a mixture of it, 1 − w, and
    of the step y of `ogr_subspace`, w. It adds to the diagonal model the curvatures that are not
    along coordinates, without a learning rate for what is outside of the subspace. It shines on
    rotated narrow valleys; where noise dominates the subspace adds little but its cost.

    Args:
      mix: w in [0, 1], weight of the subspace's step (0.3 to 0.5 in the notebooks); 0 is
        `ogr_diagonal`.
      alpha: α > 0, confidence in both models; default 0.5, paper 1/1.5.
      beta: β in (0, 1), decay of the statistics and of the momentum; default 0.9, paper 0.5 (and
        0.4 for the momentum).
      lr_max: largest step size in (0, ∞); default 0.3, paper 0.1.
      d: number of directions, at most the number of parameters; default 10, or as many as there
        are parameters.
      basis: ``"pca"`` or ``"push"``, as of `ogr_subspace`; default ``"pca"``, paper ``"push"``.
      basis_rate: ρ in [0, 1] of PCA, default 0.02; or Γ ≥ 0 of push, default 0.1, paper 0.25.
      correlation_one: cdsOGR: curvatures without sign from ratios of spreads, of `adaptive_sgd`
        for the coordinates and of the geometric mean in the subspace.
      ridge: r ≥ 0, added to the variances of positions, relative to their mean; default 1e-3,
        paper 0.
      warmup_steps: number of first steps with the diagonal model alone; default 10, paper 0.
      seed: of the random directions of ``"push"``.
      state_dtype: type of the averages and the basis; default the parameter's, but at least
        float32.
      paper: the notebooks' settings, as of `ogr_diagonal` and `ogr_subspace`.

    Returns:
      A `GradientTransformationExtraArgs` without learning rate, whose state holds d + 4 vectors of
      parameter size (one more with ``paper``).

    Raises:
      ValueError: for a hyperparameter outside its range, for ``correlation_one`` with ``paper``, in
        ``init`` if ``d`` exceeds the number of parameters, and in ``update`` if ``params`` is None.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> valley = lambda x: 5.0 * (x[0] + x[1]) ** 2 + 0.05 * (x[0] - x[1]) ** 2
      >>> losses = []
      >>> for mix in (0.0, 0.4):
      ...     optimizer = optgrad.ogr_diagonal_subspace(mix, lr_max=1.0)
      ...     theta = jnp.array([1.0, 0.5])
      ...     state = optimizer.init(theta)
      ...     update = jax.jit(optimizer.update)
      ...     for _ in range(100):
      ...         updates, state = update(jax.grad(valley)(theta), state, theta)
      ...         theta = optax.apply_updates(theta, updates)
      ...     losses.append(valley(theta))
      >>> bool(losses[1] < losses[0])
      True

    References:
      J. Duda, "Improving SGD convergence by online linear regression of gradients in multiple
      statistically relevant directions", 2019, and the author's notebooks of 2022–23 (dsOGR).

    Deviations from the paper: by default covariances turn with the basis, which is independent of
    the gradient that it projects; ``ridge`` and warm-up are guards.
    """
    checks.check_in_range("mix", mix, 0.0, 1.0)
    if paper and correlation_one:
        raise ValueError(
            "correlation_one = True with paper = True; accepted: one of them (the notebooks have "
            "no such variant of this method)"
        )
    alpha, beta, lr_max, kind, basis_rate, ridge = _resolve(
        paper, alpha=alpha, beta=beta, lr_max=lr_max, basis=basis, rate=basis_rate, ridge=ridge
    )
    common: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "lr_max": lr_max,
        "state_dtype": state_dtype,
    }
    diagonal = (
        adaptive_sgd(**common, momentum=True, skip_zero_gradients=False)
        if correlation_one
        else ogr_diagonal(**common, skip_zero_gradients=False, paper=paper)
    )
    first = (0 if paper else 10) if warmup_steps is None else warmup_steps
    checks.check_count("warmup_steps", first, 0)
    if d is not None:
        checks.check_count("d", d, 1)

    def init(params: optax.Params) -> OGRDiagonalSubspaceState:
        n = subspace.number_of_directions(params, d, _DEFAULT_D)
        random = functools.partial(subspace.random_basis, seed=seed)
        start = random if kind == "push" else subspace.init_basis
        zero = jnp.zeros((), averages.scalar_dtype())
        return OGRDiagonalSubspaceState(
            diagonal=diagonal.init(params),
            basis=start(params, n, state_dtype),
            model=subspace_model.init_model(n, correlation_one, prior=1.0 if paper else 0.0),
            curvatures=jnp.zeros(n, zero.dtype),
            energy_inside=zero,
            basis_overlap=zero + 1.0,
            orthonormality_error=jnp.copy(zero),
        )

    def update(
        updates: optax.Updates,
        state: OGRDiagonalSubspaceState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OGRDiagonalSubspaceState]:
        del extra
        params = transforms.require_params(params)
        at = functools.partial(_at, count=state.diagonal.count)
        plain, moved = diagonal.update(updates, state.diagonal, params)
        if not trees.size(params):
            return plain, state._replace(diagonal=moved)
        total = averages.sample_weights(moved.count, at(beta)).total
        total = jnp.ones_like(total) if paper else total  # of the momentum's weights
        weights = averages.constant_sample_weights(at(beta))
        basis, error = subspace.maintained(state.basis, state.orthonormality_error, moved.count)
        square = linalg.dot(updates, updates)

        def follow(basis: subspace.Basis) -> tuple[Any, Any]:
            inside = subspace.coordinates(basis, updates)
            found = subspace.residual(basis, updates, inside, square)
            return found, subspace.follow(kind, basis, found, at(basis_rate))

        if paper:  # the basis already contains the new gradient
            found, change = follow(basis)
            basis, _ = subspace.move(basis, updates, found, change)
        means = state.diagonal if paper else moved
        inside, model = subspace_model.sample_with_means(
            basis,
            state.model,
            (means.position.stored, means.mean_gradient),
            (params, updates),
            weights,
            notebook=paper,
        )
        momentum = subspace.coordinates(basis, _momentum(moved)) / total
        y, curvatures = subspace_model.step_inside(
            model,
            subspace_model.Coordinates(inside, momentum),
            full=True,
            ridge=at(ridge),
            rule="momentum",
            alpha=at(alpha),
            lr_max=at(lr_max),
            epsilon=None,
        )
        weight = jnp.where(moved.count <= first, 0.0, at(mix))
        difference = weight * (y - subspace.coordinates(basis, plain))
        difference = jnp.where(jnp.arange(y.shape[0]) < basis.filled, difference, 0.0)
        w = subspace.row_coordinates(basis, difference)
        if paper:
            correction = subspace.combine_one(w, basis)
        else:
            found, change = follow(basis)
            model = subspace_model.transport_model(model, subspace.transport(change))
            basis, (correction,) = subspace.move(basis, updates, found, change, w)
        steps = leafwise.tree_map(lambda u, x: trees.wide(u) + x, plain, correction)
        new = OGRDiagonalSubspaceState(
            diagonal=moved,
            basis=basis,
            model=model,
            curvatures=curvatures,
            energy_inside=subspace.energy_fraction(inside, square, state.energy_inside),
            basis_overlap=subspace.overlap(change),
            orthonormality_error=error,
        )
        steps = subspace.after(steps, basis)
        return transforms.cast_like(steps, params), transforms.cast_like(new, state)

    return transforms.transformation(init, update)


def _at(value: Any, count: chex.Array) -> chex.Array:
    return transforms.hyperparameter_at(value, count)


def _momentum(state: OGRDiagonalState | AdaptiveSGDState) -> optax.Updates:
    """The momentum of the diagonal step, without its bias correction."""
    own = getattr(state, "momentum", None)
    return state.mean_gradient if own is None else own


def _resolve(paper: bool, **given: Any) -> tuple[Any, ...]:
    """alpha, beta, lr_max, basis, its rate and ridge, of the preset where None, checked."""
    push = (given["basis"] or ("push" if paper else "pca")) == "push"
    preset = {
        "alpha": 1 / 1.5 if paper else 0.5,
        "beta": 0.5 if paper else 0.9,
        "lr_max": 0.1 if paper else 0.3,
        "basis": "push" if paper else "pca",
        "rate": (0.25 if paper else 0.1) if push else 0.02,
        "ridge": 0.0 if paper else 1e-3,
    }
    values = {name: x if given[name] is None else given[name] for name, x in preset.items()}
    checks.check_in_range("lr_max", values["lr_max"], 0.0, low_open=True, high_open=True)
    checks.check_one_of("basis", values["basis"], subspace.BASES)
    most = float("inf") if push else 1.0
    checks.check_in_range("basis_rate", values["rate"], 0.0, most, high_open=push)
    checks.check_in_range("ridge", values["ridge"], 0.0, high_open=True)
    return tuple(values.values())


register(
    Method(
        name="ogr_diagonal_subspace",
        factory=ogr_diagonal_subspace,
        scale_by=None,
        family="online_regression",
        title="Online gradient regression per coordinate and in a subspace (dsOGR)",
        reference=parabola.FOLLOW_UP,
        equation="dsOGR of the author's notebooks: θ ← θ + u + w·Vᵀ(y − Vu), u of dOGR, y of sOGR",
        needs=frozenset({"params"}),
        static_args=(
            "d",
            "basis",
            "correlation_one",
            "warmup_steps",
            "seed",
            "state_dtype",
            "paper",
        ),
        tunes=Tunable("lr_max", 1e-3, 1e1),
        test_hyperparams={"lr_max": 0.3},
        state_size=14,
        low_precision=subspace.LOW_PRECISION,
        wide_state=(
            "diagonal.position.stored",
            "diagonal.position.previous",
            "model.paraboloid",
            "basis.rotation",
            "basis.energy",
            "curvatures",
        ),
    )
)

"""What a review found at the limits: α = 0, spikes, overflow, limits that are infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.online_regression import parabola

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

SUBSPACE = ("ogr_subspace", "ogr_diagonal_subspace")


def run(optimizer, steps=40, spike=None, size=6):
    """Parameters after steps on a quadratic, with one gradient of another size at step 20."""
    curvatures = jnp.linspace(1.0, 2.0, size)

    def step(carry, t):
        params, state = carry
        gradient = params * curvatures
        if spike is not None:
            gradient = jnp.where(t == 20, spike, gradient)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.full(size, 3.0)
    (params, _), _ = jax.jit(
        lambda: jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
    )()
    return np.asarray(params)


@pytest.mark.parametrize("name", SUBSPACE)
@pytest.mark.parametrize("step", ["regression", "momentum"])
def test_confidence_of_zero(name, step):
    """Schedules of α that begin or end with 0 give no 0/0."""
    options = {"step": step} if name == "ogr_subspace" else {}
    for schedule in (optax.cosine_decay_schedule(0.5, 20), optax.linear_schedule(0.0, 0.5, 20)):
        assert np.isfinite(run(optgrad.create(name, alpha=schedule, **options))).all()


@pytest.mark.parametrize("spike", [1e4, 1e6, 1e15])
def test_spike_with_correlation_one(spike):
    """Rounding of turned second moments below 0, and their products beyond the largest float."""
    assert np.isfinite(run(optgrad.ogr_subspace(correlation_one=True), 60, spike)).all()


@pytest.mark.parametrize("name", SUBSPACE)
def test_spike_whose_square_overflows(name):
    params = run(optgrad.create(name), 60, 1e20)
    assert np.isfinite(params).all()


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e12, 1e22])
def test_geometric_mean_of_any_size(size):
    """√(σg²/σθ²) along the axes, whatever the units of positions and gradients."""
    positions, gradients = jnp.diag(jnp.array([1.0, 4.0])) * size, jnp.eye(2) * 100 * size
    found = parabola.hessian(positions, positions, gradients, estimator="geometric_mean")
    np.testing.assert_allclose(found, jnp.diag(jnp.array([10.0, 5.0])), rtol=1e-5)


@pytest.mark.parametrize("name", ["ogr1d", "ogr1dc", "ogr1ds"])
def test_tanh_needs_a_scale(name):
    with pytest.raises(ValueError, match=r"negative_curvature = 'tanh' with lr_max = inf"):
        optgrad.create(name, eta=0.1, negative_curvature="tanh", lr_max=np.inf)


def test_initial_step_of_a_warm_up():
    """With α(0) = 0 the initial spread is finite, and the method learns."""
    optimizer = optgrad.adaptive_sgd(optax.linear_schedule(0.0, 0.5, 20), initial_step=0.1)
    state = optimizer.init(jnp.ones(2))
    assert np.isfinite(state.position_variance).all()
    assert np.abs(run(optimizer, 300)).max() < 0.5


@pytest.mark.parametrize(
    "name", [m.name for m in optgrad.methods("online_regression") if m.name != "ogr_full"]
)
def test_state_dtype_is_a_float(name):
    for dtype in ("int32", "foo"):
        with pytest.raises(ValueError, match=f"state_dtype = '{dtype}'"):
            optgrad.create(
                name, **optgrad.get_method(name).test_hyperparams | {"state_dtype": dtype}
            )


@pytest.mark.parametrize("name", ["ogr1d", "ogr1dc", "ogr1ds", "ogr_full", "ogr_subspace"])
def test_no_bound_on_the_step(name):
    """ε = ∞ switches the clipping off."""
    hyperparams = optgrad.get_method(name).test_hyperparams
    unbounded = run(optgrad.create(name, **hyperparams | {"epsilon": np.float32(np.inf)}))
    large = run(optgrad.create(name, **hyperparams | {"epsilon": 1e6}))
    np.testing.assert_array_equal(unbounded, large)


def test_printed_preset_has_no_correlation_one():
    with pytest.raises(ValueError, match="correlation_one = True with paper = True"):
        optgrad.ogr_diagonal_subspace(paper=True, correlation_one=True)


@pytest.mark.parametrize(
    "name", ["adaptive_sgd_c", "ogr_diagonal", "ogr_full", "ogr_diagonal_subspace", "ogr_subspace"]
)
def test_parameters_edited_outside(name):
    """A jump that the method did not make is one more sample: it stays finite and recovers."""
    hyperparams = optgrad.get_method(name).test_hyperparams
    optimizer = optgrad.create(name, **hyperparams)
    curvatures = jnp.linspace(1.0, 2.0, 6)

    def step(carry, t):
        params, state = carry
        params = jnp.where(t == 30, params + 1.0, params)
        updates, state = optimizer.update(params * curvatures, state, params)
        return (optax.apply_updates(params, updates), state), jnp.linalg.norm(params)

    start = jnp.ones(6)
    _, norms = jax.jit(
        lambda: jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(400))
    )()
    assert np.isfinite(norms).all()
    assert norms[30] > 1.0
    assert norms[-1] < 0.2 * norms[30]

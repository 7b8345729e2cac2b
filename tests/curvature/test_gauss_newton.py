"""Gauss–Newton and Levenberg–Marquardt: against NumPy and SciPy, options, limits, numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import optgrad
from optgrad.experiments.reproduce.survey_toys import TOYS, solve

from . import rosenbrocks

START = np.array([0.1, -1.2, 2.0, 1.0])

# --- the algorithm in NumPy ---------------------------------------------------------------------


class Box:
    """Levenberg–Marquardt on the two Rosenbrock functions, by dense algebra."""

    def __init__(self, damping, rule, scaling):
        self.damping, self.rule, self.scaling = damping, rule, scaling
        self.growth, self.rejected = 2.0, 0

    def step(self, z):
        g, matrix = rosenbrocks.gradient(z), rosenbrocks.gauss_newton(z)
        diagonal = np.diag(np.diag(matrix)) if self.scaling == "marquardt" else np.eye(4)
        d = -np.linalg.solve(matrix + self.damping * diagonal, g)
        predicted = -(g @ d + 0.5 * d @ matrix @ d)
        ratio = (rosenbrocks.value(z) - rosenbrocks.value(z + d)) / predicted
        if self.rule == "nielsen" and ratio > 0:
            self.damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
            self.growth = 2.0
        elif self.rule == "nielsen":
            self.damping *= self.growth
            self.growth *= 2
        elif self.rule == "marquardt":
            self.damping *= 0.1 if ratio > 0 else 10.0
        self.rejected += ratio <= 0
        return z + d if ratio > 0 else z

    def run(self, steps):
        path = [START]
        for _ in range(steps):
            path.append(self.step(path[-1]))
        return np.array(path)


@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("rule", ["nielsen", "marquardt", "fixed"])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_levenberg_marquardt_follows_the_algorithm(x64, solver, rule, scaling):
    box = Box(0.02, rule, scaling)
    steps = 8 if rule == "marquardt" else 12  # it is at the solution then
    expected = box.run(steps)
    optimizer = optgrad.levenberg_marquardt(
        0.02, solver=solver, rule=rule, scaling=scaling, tolerance=1e-14
    )
    path, values, states = rosenbrocks.run(optimizer, steps, START)
    np.testing.assert_allclose(path, expected, rtol=1e-8, atol=1e-10)
    assert np.all(np.diff(values) <= 0)
    assert states.rejected[-1] == box.rejected
    assert box.rejected > 0
    np.testing.assert_allclose(states.scale[-1] * 0.02, box.damping, rtol=1e-7)
    np.testing.assert_allclose(states.growth[-1], box.growth)
    each = {"dense": 4.0, "cg": 4.0 if scaling == "marquardt" else 0.0}[solver]
    spent = np.sum(1 + each + 2 * states.iterations + 1 / 3)
    np.testing.assert_allclose(states.cost[-1], spent, rtol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_gauss_newton_follows_the_algorithm(x64, solver):
    optimizer = optgrad.gauss_newton(0.3, solver=solver, tolerance=1e-14)
    path, _, _ = rosenbrocks.run(optimizer, 12, START)
    expected = [START]
    for _ in range(12):
        z = expected[-1]
        step = np.linalg.solve(rosenbrocks.gauss_newton(z), rosenbrocks.gradient(z))
        expected.append(z - 0.3 * step)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-10)


# --- outside oracles ----------------------------------------------------------------------------


def decay_data():
    """A sum of two exponentials with noise: residuals that do not vanish."""
    t = np.linspace(0.0, 4.0, 40)
    noise = 0.01 * np.random.default_rng(0).standard_normal(40)
    return t, 2.0 * np.exp(-0.6 * t) + 1.0 * np.exp(-2.5 * t) + noise


def decay_residuals(theta):
    t, y = decay_data()
    return theta[0] * jnp.exp(-theta[1] * t) + theta[2] * jnp.exp(-theta[3] * t) - y


@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_fit_equals_scipy(x64, solver, scaling):
    start = np.array([1.0, 0.3, 0.5, 4.0])
    expected = scipy.optimize.least_squares(
        decay_residuals, start, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    optimizer = optgrad.levenberg_marquardt(
        solver=solver, scaling=scaling, tolerance=1e-10, maxiter=50
    )

    def body(carry, _):
        theta, state = carry
        grad = jax.grad(lambda p: 0.5 * jnp.sum(decay_residuals(p) ** 2))(theta)
        updates, state = optimizer.update(grad, state, theta, residual_fn=decay_residuals)
        return (theta + updates, state), None

    theta = jnp.asarray(start)
    run = jax.jit(lambda *carry: jax.lax.scan(body, carry, None, length=60)[0])
    theta, _ = run(theta, optimizer.init(theta))
    np.testing.assert_allclose(theta, expected.x, rtol=1e-5)
    reached = 0.5 * np.sum(np.asarray(decay_residuals(theta)) ** 2)
    np.testing.assert_allclose(reached, expected.cost, rtol=1e-10)


def ill_conditioned(exponent, rows=20, size=6):
    """A matrix of condition 10^exponent."""
    generator = np.random.default_rng(1)
    left, _ = np.linalg.qr(generator.standard_normal((rows, size)))
    right, _ = np.linalg.qr(generator.standard_normal((size, size)))
    return left @ np.diag(np.logspace(0, -exponent, size)) @ right.T


@pytest.mark.parametrize("exponent", [4, 6, 7])
def test_condition_is_not_squared(x64, exponent):
    """The least-squares solution, where the normal equations have lost digits or definiteness."""
    matrix = ill_conditioned(exponent)
    solution = np.arange(1.0, 7.0)
    target = matrix @ solution
    residual_fn = lambda x: jnp.asarray(matrix) @ x - target  # noqa: E731
    params = jnp.zeros(6)
    grad = jnp.asarray(matrix.T @ (matrix @ np.zeros(6) - target))
    optimizer = optgrad.gauss_newton(solver="dense")
    updates, _ = optimizer.update(grad, optimizer.init(params), params, residual_fn=residual_fn)
    error = np.linalg.norm(updates - solution) / np.linalg.norm(solution)
    # The right-hand side itself is rounded: κ²·eps is what its rounding alone may do.
    assert error < 10.0 ** (2 * exponent) * 1e-16
    # The equation is solved to working precision in the norm in which it is posed.
    image = matrix @ np.asarray(updates)
    assert np.linalg.norm(image - target) / np.linalg.norm(target) < 10.0**exponent * 1e-15


# --- the specification's numbers ----------------------------------------------------------------

# Steps and gradient equivalents by the specification; half more is allowed.
NUMBERS = [
    ("lm_dense", "Q", 4, 53),
    ("lm_dense", "R1", 19, 63),
    ("lm_dense", "R2", 21, 70),
    ("gn_cg", "Q", 1, 37),
    ("gn_cg", "R1", 2, 18),
    ("gn_cg", "R2", 2, 18),
    ("gn_dense", "Q", 1, 37),
    ("gn_dense", "R1", 2, 18),
    ("gn_dense", "R2", 2, 18),
]
SETTINGS = {
    "lm_dense": optgrad.levenberg_marquardt(solver="dense"),
    "lm_cg": optgrad.levenberg_marquardt(tolerance=1e-10),
    "gn_cg": optgrad.gauss_newton(tolerance=1e-12),
    "gn_dense": optgrad.gauss_newton(solver="dense"),
}


@pytest.mark.parametrize(("setting", "toy", "steps", "cost"), NUMBERS)
def test_numbers(x64, setting, toy, steps, cost):
    check_numbers(setting, toy, steps, cost)


@pytest.mark.slow  # as many programs again
@pytest.mark.parametrize(
    ("setting", "toy", "steps", "cost"), [row for row in NUMBERS if row[0] != "gn_cg"]
)
def test_numbers_in_float32(setting, toy, steps, cost):
    """To the coarser target; not with a tolerance of 1e-12, which is for float64."""
    # One step more for what the first one leaves in float32.
    check_numbers(setting, toy, max(steps, 2), max(cost, 2 * 13))


def check_numbers(setting, toy, steps, cost):
    found = solve(TOYS[toy], SETTINGS[setting], 60)
    assert found.steps is not None
    assert found.steps <= 1.5 * steps
    assert found.cost <= 1.5 * cost
    assert found.increases == 0 or setting.startswith("gn")


@pytest.mark.parametrize(("toy", "steps"), [("Q", 4), ("R1", 19), ("R2", 21)])
def test_conjugate_gradients_take_the_dense_steps(x64, toy, steps):
    dense, cg = (solve(TOYS[toy], SETTINGS[key], 60) for key in ("lm_dense", "lm_cg"))
    assert dense.steps == cg.steps <= 1.5 * steps
    assert cg.increases == 0


# --- options ------------------------------------------------------------------------------------


def linear(matrix, target):
    return lambda x: jnp.asarray(matrix) @ x - jnp.asarray(target)


@pytest.mark.parametrize("solver", ["cg", "dense"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 0.05])
def test_residual_scale(x64, solver, scale):
    """Of the loss s·Σr²: one step solves a linear problem, and the gain ratio is 1."""
    matrix, target = ill_conditioned(1), np.arange(20.0)
    loss = lambda x: scale * jnp.sum(linear(matrix, target)(x) ** 2)  # noqa: E731
    params = jnp.ones(6)
    optimizer = optgrad.levenberg_marquardt(
        1e-10, solver=solver, residual_scale=scale, tolerance=1e-12
    )
    updates, state = optimizer.update(
        jax.grad(loss)(params), optimizer.init(params), params, residual_fn=linear(matrix, target)
    )
    expected = np.linalg.lstsq(matrix, target, rcond=None)[0]
    np.testing.assert_allclose(params + updates, expected, rtol=1e-6)
    np.testing.assert_allclose(state.ratio, 1.0, rtol=1e-6)


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_marquardt_does_not_depend_on_units(x64, solver):
    """A parameter in other units takes the same step in those; with the identity it does not."""
    steps = {}
    for scaling in ("identity", "marquardt"):
        for units in (1.0, 1e3):
            matrix = ill_conditioned(1) * np.array([units, 1, 1, 1, 1, 1])
            optimizer = optgrad.levenberg_marquardt(
                0.5, solver=solver, scaling=scaling, tolerance=1e-13
            )
            params = jnp.zeros(6)
            grad = jnp.asarray(matrix.T @ -np.ones(20))
            updates, _ = optimizer.update(
                grad, optimizer.init(params), params, residual_fn=linear(matrix, np.ones(20))
            )
            steps[scaling, units] = np.asarray(updates) * np.array([units, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(steps["marquardt", 1.0], steps["marquardt", 1e3], rtol=1e-7)
    assert np.max(np.abs(steps["identity", 1.0] - steps["identity", 1e3])) > 1e-3


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_marquardt_with_a_useless_parameter(x64, solver):
    """One on which no residual depends: its damping is raised above 0."""
    matrix = ill_conditioned(1)
    matrix[:, 2] = 0.0
    optimizer = optgrad.levenberg_marquardt(0.5, solver=solver, scaling="marquardt")
    params = jnp.zeros(6)
    grad = jnp.asarray(matrix.T @ -np.ones(20))
    updates, state = optimizer.update(
        grad, optimizer.init(params), params, residual_fn=linear(matrix, np.ones(20))
    )
    assert np.all(np.isfinite(updates))
    assert updates[2] == 0
    assert np.any(updates)
    assert state.rejected == 0


def test_tolerance_and_maxiter(x64):
    matrix = ill_conditioned(1)
    params, grad = jnp.zeros(6), jnp.asarray(matrix.T @ -np.ones(20))
    counts = []
    for arguments in ({"tolerance": 0.3}, {"tolerance": 1e-8}, {"tolerance": 0.0, "maxiter": 3}):
        optimizer = optgrad.scale_by_gauss_newton(**arguments)
        updates, state = optimizer.update(
            grad, optimizer.init(params), params, residual_fn=linear(matrix, np.ones(20))
        )
        counts.append(int(state.iterations))
        left = np.linalg.norm(matrix.T @ (matrix @ updates) - grad) / np.linalg.norm(grad)
        assert left <= arguments["tolerance"] or "maxiter" in arguments
    assert counts[0] < counts[1]
    assert counts[2] == 3


def test_shortest_solution(x64):
    """Fewer residuals than parameters: conjugate gradients find the one of least norm."""
    matrix, target = ill_conditioned(1).T, np.arange(6.0)  # 6 × 20
    params, grad = jnp.zeros(20), jnp.asarray(matrix.T @ -target)
    optimizer = optgrad.gauss_newton(tolerance=1e-10)
    residual_fn = linear(matrix, target)
    updates, _ = optimizer.update(grad, optimizer.init(params), params, residual_fn=residual_fn)
    np.testing.assert_allclose(updates, np.linalg.pinv(matrix) @ target, rtol=1e-6)


@pytest.mark.parametrize("rows", [4, 2])  # also fewer than columns
def test_singular_jacobian(rows):
    """The dense solution takes no step, and damping makes it regular."""
    matrix, target = np.ones((rows, 3), np.float32), np.arange(rows, dtype=np.float32) - 1
    params, grad = jnp.zeros(3), jnp.asarray(matrix.T @ -target)
    residual_fn = linear(matrix, target)
    for optimizer, moves in (
        (optgrad.gauss_newton(solver="dense"), False),
        (optgrad.levenberg_marquardt(0.1, solver="dense"), True),
    ):
        update = jax.jit(lambda g, s, p, o=optimizer: o.update(g, s, p, residual_fn=residual_fn))
        updates, state = update(grad, optimizer.init(params), params)
        assert np.any(updates) == moves
        assert counters(state) == (not moves)


# --- limits -------------------------------------------------------------------------------------


@pytest.fixture(params=["lm_cg", "lm_dense", "gn_cg", "gn_dense"])
def optimizer(request):
    return SETTINGS[request.param]


def counters(state):
    found = optgrad.diagnostics(state)
    return int(found["rejected_steps"])


def test_zero_gradient(optimizer):
    params = jnp.ones(2)
    residual_fn = lambda p: jnp.stack([p[0] + p[1], p[0] - p[1], p[0]])  # noqa: E731
    updates, state = optimizer.update(
        jnp.zeros(2), optimizer.init(params), params, residual_fn=residual_fn
    )
    assert not np.any(updates)
    assert counters(state) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "residuals", "jacobian"])
def test_what_is_not_finite(optimizer, where, bad):
    params = jnp.array([1.0, 2.0])

    def residual_fn(p):
        if where == "residuals":
            return bad * p
        if where == "jacobian":
            return p + jnp.sqrt(p - params)  # a slope of ∞ here
        return p

    gradient = jnp.array([1.0, bad]) if where == "gradient" else params
    before = optimizer.init(params)
    updates, state = optimizer.update(gradient, before, params, residual_fn=residual_fn)
    assert not np.any(updates)
    assert counters(state) == 1
    if hasattr(state, "growth") and where != "jacobian":
        np.testing.assert_array_equal([state.scale, state.growth], [before.scale, before.growth])


def test_damping_recovers_from_walls(x64):
    """Where residuals are NaN ahead the damping grows until the step is short enough."""

    def residual_fn(p):
        return jnp.where(p < 0.5, jnp.nan, p)

    optimizer = optgrad.levenberg_marquardt(1e-6)

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params, residual_fn=residual_fn)
        return (params + updates, state), None

    params = jnp.array([1.0])
    run = jax.jit(lambda *carry: jax.lax.scan(body, carry, None, length=60)[0])
    params, state = run(params, optimizer.init(params))
    assert 0 < state.rejected < 60
    assert 0.5 <= params[0] < 0.8


def test_damping_stays_in_its_range(x64):
    """It neither vanishes on a linear problem nor overflows where nothing helps."""
    params = jnp.array([1.0, 2.0])
    for optimizer, residual_fn, end in (
        (optgrad.levenberg_marquardt(1.0), lambda p: p + 1e3, 1e-12),
        (optgrad.levenberg_marquardt(1.0), lambda p: jnp.where(p == params, p, 1e3), 1e12),
    ):

        def body(state, _, optimizer=optimizer, residual_fn=residual_fn):
            return optimizer.update(params, state, params, residual_fn=residual_fn)[1], None

        run = jax.jit(lambda s, body=body: jax.lax.scan(body, s, None, length=100)[0])
        state = run(optimizer.init(params))
        np.testing.assert_allclose(state.damping, end)
        assert np.all(np.isfinite([state.scale, state.growth]))


def test_bfloat16():
    for optimizer in (
        optgrad.levenberg_marquardt(),
        optgrad.levenberg_marquardt(solver="dense", scaling="marquardt"),
    ):
        path, values, states = rosenbrocks.run(optimizer, 15, dtype=jnp.bfloat16)
        assert path.dtype == jnp.bfloat16
        assert np.all(np.diff(values.astype(np.float64)) <= 0)
        assert values[-1] < 0.2 * values[0]
        assert states.damping.dtype == jnp.float32


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_vmap_equals_loop(x64, solver):
    optimizer = optgrad.levenberg_marquardt(solver=solver, tolerance=1e-10)
    starts = np.stack([START, rosenbrocks.START])

    def run(z):
        def body(carry, _):
            params, state = carry
            given = rosenbrocks.extras(params)
            updates, state = optimizer.update(given["grad"], state, params, **given)
            return (optax.apply_updates(params, updates), state), None

        params = rosenbrocks.tree(z)
        return jax.lax.scan(body, (params, optimizer.init(params)), None, length=8)[0][0]

    together = rosenbrocks.vector(jax.jit(jax.vmap(run))(jnp.asarray(starts)))
    for row, start in zip(together, starts, strict=True):
        expected = rosenbrocks.run(optimizer, 8, start)[0][-1]
        np.testing.assert_allclose(row, expected, rtol=1e-8, atol=1e-8)


# --- hyperparameters ----------------------------------------------------------------------------


def test_schedules(x64):
    """A damping's later values rescale what was learnt; a learning rate's are used."""
    params = jnp.array([1.0, 2.0])
    optimizer = optgrad.levenberg_marquardt(lambda count: 10.0**count, rule="fixed")
    state = optimizer.init(params)
    for damping in (1.0, 10.0, 100.0):
        updates, state = optimizer.update(params, state, params, residual_fn=lambda p: p)
        np.testing.assert_allclose(state.damping, damping)
        np.testing.assert_allclose(updates, -params / (1 + damping))
    optimizer = optgrad.gauss_newton(lambda count: 0.5**count)
    state = optimizer.init(params)
    for rate in (1.0, 0.5):
        updates, state = optimizer.update(params, state, params, residual_fn=lambda p: p)
        np.testing.assert_allclose(updates, -rate * params)


def test_diagnostics():
    params = jnp.array([1.0, 2.0])
    optimizer = optgrad.levenberg_marquardt(0.5)
    _, state = optimizer.update(params, optimizer.init(params), params, residual_fn=lambda p: p)
    found = {key: float(x) for key, x in optgrad.diagnostics(state).items()}
    np.testing.assert_allclose(found.pop("gradient_equivalents"), 1 + 2 + 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(found.pop("gain_ratio"), 1.0, rtol=1e-6)
    assert found == {"damping": 0.5, "cg_iterations": 1, "rejected_steps": 0}


def test_too_many_parameters():
    for factory in (optgrad.gauss_newton, optgrad.levenberg_marquardt):
        with pytest.raises(ValueError, match=r"params has 3 entries.*at most max_size = 2"):
            factory(solver="dense", max_size=2).init(jnp.zeros(3))
        factory(max_size=2).init(jnp.zeros(3))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("gauss_newton", {"learning_rate": -1.0}, "learning_rate = -1.0"),
        ("gauss_newton", {"solver": "qr"}, "solver = 'qr'"),
        ("gauss_newton", {"maxiter": 0}, "maxiter = 0"),
        ("gauss_newton", {"tolerance": 1.0}, "tolerance = 1.0"),
        ("gauss_newton", {"residual_scale": 0.0}, "residual_scale = 0.0"),
        ("gauss_newton", {"max_size": 0}, "max_size = 0"),
        ("levenberg_marquardt", {"damping": 0.0}, "damping = 0.0"),
        ("levenberg_marquardt", {"scaling": "unit"}, "scaling = 'unit'"),
        ("levenberg_marquardt", {"rule": "neilsen"}, "did you mean 'nielsen'"),
    ],
)
def test_wrong_arguments(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optgrad, factory)(**arguments)


def test_missing_extras():
    w = jnp.ones(2)
    for optimizer in (optgrad.gauss_newton(), optgrad.levenberg_marquardt()):
        with pytest.raises(ValueError, match=r"residual_fn = None.*residual=\.\.\."):
            optimizer.update(w, optimizer.init(w), w)
        with pytest.raises(ValueError, match="params = None"):
            optimizer.update(w, optimizer.init(w), residual_fn=jnp.sin)

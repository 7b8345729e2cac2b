"""Runge–Kutta and implicit Euler: order, stability, proximal points, limits, numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.optimize

import optgrad
from optgrad.experiments.reproduce.survey_toys import TOYS, solve

from . import rosenbrocks

TABLEAUS = ("euler", "midpoint", "heun", "rk4")


def slope(z):
    return -rosenbrocks.gradient(z)


def by_hand(tableau, z, h):
    """One step of the gradient flow, each method as it is printed in textbooks."""
    k1 = slope(z)
    if tableau == "euler":
        return z + h * k1
    if tableau == "midpoint":
        return z + h * slope(z + h / 2 * k1)
    if tableau == "heun":
        return z + h / 2 * (k1 + slope(z + h * k1))
    k2 = slope(z + h / 2 * k1)
    k3 = slope(z + h / 2 * k2)
    k4 = slope(z + h * k3)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize("tableau", TABLEAUS)
def test_runge_kutta_follows_the_textbook(x64, tableau):
    optimizer = optgrad.runge_kutta(5e-4, tableau=tableau)
    path, values, states = rosenbrocks.run(optimizer, 40)
    expected = [rosenbrocks.START]
    for _ in range(40):
        expected.append(by_hand(tableau, expected[-1], 5e-4))
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-10)
    assert values[-1] < values[0]
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[tableau]
    np.testing.assert_allclose(states.cost, stages * np.arange(1, 41))


MATRIX = np.array([[2.0, 0.6], [0.6, 0.5]])


def quadratic(p):
    return 0.5 * p @ jnp.asarray(MATRIX, p.dtype) @ p


def travel(optimizer, steps, start, loss=quadratic):
    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (params + updates, state), None

    params = jnp.asarray(start)
    run = jax.jit(lambda *carry: jax.lax.scan(body, carry, None, length=steps)[0])
    params, state = run(params, optimizer.init(params))
    return np.asarray(params), state


@pytest.mark.parametrize(
    ("tableau", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_order(x64, tableau, order):
    """The error at time 1 falls by 2^order when the step is halved."""
    start = np.array([1.0, -2.0])
    exact = scipy.linalg.expm(-MATRIX) @ start
    errors = [
        np.linalg.norm(travel(optgrad.runge_kutta(1 / n, tableau=tableau), n, start)[0] - exact)
        for n in (16, 32)
    ]
    assert 0.93 * order < np.log2(errors[0] / errors[1]) < 1.1 * order


@pytest.mark.parametrize(
    ("tableau", "limit"), [("euler", 2.0), ("midpoint", 2.0), ("heun", 2.0), ("rk4", 2.785)]
)
def test_stability(x64, tableau, limit):
    """The largest stable step times the largest curvature: RK4 buys 1.4 times Heun's."""
    largest = np.linalg.eigvalsh(MATRIX)[-1]
    for factor, shrinks in ((0.99, True), (1.01, False)):
        h = factor * limit / largest
        end, _ = travel(optgrad.runge_kutta(h, tableau=tableau), 2000, [1.0, -2.0])
        assert (np.linalg.norm(end) < 1e-3) == shrinks


def test_updates_are_the_first_slope(x64):
    """What comes in need not be the gradient, and counts in every stage that uses it."""
    params, given = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    optimizer = optgrad.runge_kutta(0.1, tableau="heun")
    updates, _ = optimizer.update(given, optimizer.init(params), params, value_fn=quadratic)
    second = MATRIX @ (np.asarray(params) - 0.1 * np.asarray(given))
    np.testing.assert_allclose(updates, -0.05 * (np.asarray(given) + second), rtol=1e-12)


def test_learning_rate_schedule(x64):
    end, _ = travel(optgrad.runge_kutta(lambda count: 0.1 * (count + 1)), 2, [1.0, -2.0])
    middle, _ = travel(optgrad.runge_kutta(0.1), 1, [1.0, -2.0])
    expected, _ = travel(optgrad.runge_kutta(0.2), 1, middle)
    np.testing.assert_allclose(end, expected, rtol=1e-12)


# --- implicit Euler -----------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.1, 10.0, 1e4])
def test_proximal_point_of_a_quadratic(x64, h):
    """y = (I + hH)⁻¹θ, whatever the step."""
    start = np.array([1.0, -2.0])
    end, state = travel(optgrad.implicit_euler(h, forcing=1e-12, tolerance=1e-9), 1, start)
    np.testing.assert_allclose(end, np.linalg.solve(np.eye(2) + h * MATRIX, start), rtol=1e-9)
    assert state.newton_iterations == 1
    assert state.residual < 1e-9 * h
    # The incoming gradient, one for the residual, products, and two values of φ.
    np.testing.assert_allclose(state.cost, 2 + 2 * state.iterations + 2 / 3)


@pytest.mark.parametrize("h", [1e-3, 0.1])
def test_proximal_point_equals_scipy(x64, h):
    """Where φ is convex its minimum is the one that SciPy finds."""
    optimizer = optgrad.implicit_euler(h, 30, forcing=1e-8, tolerance=1e-10)
    path, _, states = rosenbrocks.run(optimizer, 2)
    z = rosenbrocks.START
    for t in range(2):
        found = scipy.optimize.minimize(
            lambda y, z=z: rosenbrocks.value(y) + np.sum((y - z) ** 2) / (2 * h),
            z,
            jac=lambda y, z=z: rosenbrocks.gradient(y) + (y - z) / h,
            hess=lambda y: rosenbrocks.hessian(y) + np.eye(4) / h,
            method="trust-exact",
            options={"gtol": 1e-11},
        )
        np.testing.assert_allclose(path[t + 1], found.x, rtol=1e-7)
        actual = np.linalg.norm(path[t + 1] - z + h * rosenbrocks.gradient(path[t + 1]))
        np.testing.assert_allclose(states.residual[t], actual, rtol=1e-5, atol=1e-14)
        z = path[t + 1]


def newton(z, h, iterations, tolerance=1e-3):
    """Newton's method with exact solutions and halving, on φ."""
    y, first = z, np.linalg.norm(rosenbrocks.gradient(z))
    phi = lambda y: rosenbrocks.value(y) + np.sum((y - z) ** 2) / (2 * h)  # noqa: E731
    halvings = 0
    for _ in range(iterations):
        g = rosenbrocks.gradient(y) + (y - z) / h
        if np.linalg.norm(g) <= tolerance * first:
            break
        d = -np.linalg.solve(rosenbrocks.hessian(y) + np.eye(4) / h, g)
        t = 1.0
        while phi(y + t * d) > phi(y) + 1e-4 * t * (g @ d):
            t, halvings = t / 2, halvings + 1
        y = y + t * d
    return y, halvings


@pytest.mark.parametrize("iterations", [1, 3])
def test_implicit_euler_follows_the_algorithm(x64, iterations):
    """From a start where every matrix H + I/h on the way is positive definite."""
    start, h = np.array([-1.2, 1.5, 1.0, 0.5]), 100.0
    expected, halvings = [start], 0
    for _ in range(8):
        y, more = newton(expected[-1], h, iterations)
        expected.append(y)
        halvings += more
    optimizer = optgrad.implicit_euler(h, iterations, forcing=1e-13)
    path, values, _ = rosenbrocks.run(optimizer, 8, start)
    np.testing.assert_allclose(path, expected, rtol=1e-8)
    assert np.all(np.diff(values) <= 0)
    assert halvings > 0


def test_one_iteration_is_damped_newton(x64):
    """With damping 1/h, where no step has to be halved."""
    start = np.array([1.1, 0.9, 1.2, 0.8])
    optimizer = optgrad.implicit_euler(0.01, 1, forcing=1e-13)
    path, _, states = rosenbrocks.run(optimizer, 5, start)
    z, expected = start, [start]
    for _ in range(5):
        z = z - np.linalg.solve(rosenbrocks.hessian(z) + 100 * np.eye(4), rosenbrocks.gradient(z))
        expected.append(z)
    np.testing.assert_allclose(path, expected, rtol=1e-9)
    assert np.all(states.newton_iterations == 1)


def test_updates_enter_the_first_iteration(x64):
    params, given = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    optimizer = optgrad.implicit_euler(2.0, 1, forcing=1e-12)
    updates, _ = optimizer.update(given, optimizer.init(params), params, value_fn=quadratic)
    expected = -np.linalg.solve(MATRIX + 0.5 * np.eye(2), given)
    np.testing.assert_allclose(updates, expected, rtol=1e-9)


def test_h_times_negative_curvature(x64):
    """φ is not convex: conjugate gradients end at −∇φ, halved until φ decreases."""
    params = {"x": jnp.array(0.1)}
    loss = TOYS["S2"].fn

    def fn(p):
        return loss({"x": jnp.array(0.0), "y": p["x"]})

    optimizer = optgrad.implicit_euler(100.0)
    values = [fn(params)]
    state = optimizer.init(params)
    update = jax.jit(lambda s, p: optimizer.update(jax.grad(fn)(p), s, p, value_fn=fn))
    for _ in range(8):
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
        values.append(fn(params))
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(values[-1], -1.0, rtol=1e-6)


@pytest.mark.parametrize("hvp", ["jvp", "fd", "fdc"])
def test_products(x64, hvp):
    end, _ = travel(optgrad.implicit_euler(3.0, hvp=hvp, forcing=1e-6), 1, [1.0, -2.0])
    expected = np.linalg.solve(np.eye(2) + 3 * MATRIX, [1.0, -2.0])
    np.testing.assert_allclose(end, expected, rtol=1e-5)


def test_backtracks():
    """None: a step that increases φ is given up at once."""
    params = jnp.array([0.1])
    loss = lambda p: jnp.sum(jnp.sqrt(1 + p * p)) * 10 + jnp.sum(p**4)  # noqa: E731
    far = jnp.array([3e3])
    for backtracks, moves in ((0, False), (20, True)):
        optimizer = optgrad.implicit_euler(1e6, 1, backtracks=backtracks)
        updates, state = optimizer.update(far, optimizer.init(params), params, value_fn=loss)
        assert np.any(updates) == moves
        assert state.rejected == (not moves)


# --- the specification's numbers ----------------------------------------------------------------

# Steps by the specification; half more is allowed.
NUMBERS = [
    ("Q", 10.0, 3, 10, 870),
    ("S2", 10.0, 3, 4, 76),
    ("S6", 10.0, 3, 7, 131),
    ("R1", 100.0, 3, 8, 186),
    ("R2", 100.0, 3, 9, 209),
    ("Q", 1e4, 1, 3, 107),
    ("S2", 10.0, 1, 8, 50),
    ("S6", 10.0, 1, 22, 122),
    ("R1", 1.0, 1, 46, 322),
    ("R2", 1.0, 1, 47, 329),
]


@pytest.mark.parametrize(("toy", "h", "iterations", "steps", "cost"), NUMBERS)
def test_numbers(x64, toy, h, iterations, steps, cost):
    check_numbers(toy, h, iterations, steps, cost)


@pytest.mark.slow  # as many programs again
@pytest.mark.parametrize(("toy", "h", "iterations", "steps", "cost"), NUMBERS)
def test_numbers_in_float32(toy, h, iterations, steps, cost):
    check_numbers(toy, h, iterations, steps, cost)


def check_numbers(toy, h, iterations, steps, cost):
    found = solve(TOYS[toy], optgrad.implicit_euler(h, iterations), 100)
    assert found.steps is not None
    assert found.steps <= 1.5 * steps
    assert found.cost <= 1.5 * cost
    assert found.increases == 0


def test_runge_kutta_on_rosenbrock(x64):
    """The largest stable step of a few: 12737 steps by the specification."""
    found = solve(TOYS["R1"], optgrad.runge_kutta(2.75 / 1001.6), 15000)
    assert found.steps is not None
    assert found.steps == pytest.approx(12737, rel=0.2)
    np.testing.assert_allclose(found.cost, 4 * found.steps)


# --- limits -------------------------------------------------------------------------------------

OPTIMIZERS = {
    **{tableau: optgrad.runge_kutta(0.1, tableau=tableau) for tableau in TABLEAUS},
    "implicit": optgrad.implicit_euler(0.1),
}


@pytest.fixture(params=list(OPTIMIZERS))
def name(request):
    return request.param


def test_zero_gradient(name):
    params = jnp.zeros(2)
    optimizer = OPTIMIZERS[name]
    updates, state = optimizer.update(params, optimizer.init(params), params, value_fn=quadratic)
    assert not np.any(updates)
    assert (state.count, state.rejected) == (1, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_loss_that_is_not_finite(name, bad):
    params = jnp.array([1.0, 2.0])
    optimizer = OPTIMIZERS[name]
    updates, state = optimizer.update(
        params, optimizer.init(params), params, value_fn=lambda p: bad * jnp.sum(p * p)
    )
    assert np.any(updates) == (name == "euler")  # which does not look at the loss
    assert (state.count, state.rejected) == (1, name != "euler")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradient_that_is_not_finite(name, bad):
    params = jnp.array([1.0, 2.0])
    optimizer = OPTIMIZERS[name]
    updates, state = optimizer.update(
        jnp.array([1.0, bad]), optimizer.init(params), params, value_fn=quadratic
    )
    assert not np.any(updates)
    assert (state.count, state.rejected) == (1, 1)


def test_walls():
    """A loss that is not finite where Newton's step leads: it is halved."""

    def loss(p):
        return jnp.where(jnp.any(p < 0.5), jnp.nan, 0.5 * jnp.sum(p * p))

    end, state = travel(optgrad.implicit_euler(100.0), 20, [1.0, 2.0], loss)
    assert np.all(end >= 0.5)
    assert np.sum(end**2) < 4.0
    assert np.isfinite(state.residual)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types(name, dtype):
    h = 1e-4 if name != "implicit" else 1.0
    optimizer = (
        optgrad.implicit_euler(h) if name == "implicit" else optgrad.runge_kutta(h, tableau=name)
    )
    path, values, states = rosenbrocks.run(optimizer, 20, dtype=dtype)
    assert path.dtype == dtype
    assert states.cost.dtype == jnp.float32
    if name == "implicit":
        assert np.all(np.diff(values.astype(np.float64)) <= 0)
    assert values[-1] < values[0]


def test_vmap_equals_loop(x64):
    starts = jnp.array([[1.0, -2.0], [0.3, 5.0], [-1.0, 0.1]])

    def loss(p):
        return jnp.sum(p**4) + quadratic(p)

    def run(params):
        optimizer = optgrad.implicit_euler(1.0)
        return optimizer.update(
            jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss
        )

    together = jax.jit(jax.vmap(run))(starts)
    for i, start in enumerate(starts):
        alone = jax.jit(run)(start)
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-10, atol=1e-12),
            together,
            alone,
        )


def test_diagnostics():
    _, state = travel(optgrad.implicit_euler(1.0), 1, [1.0, -2.0])
    found = optgrad.diagnostics(state)
    assert set(found) == {
        "residual",
        "newton_iterations",
        "cg_iterations",
        "rejected_steps",
        "gradient_equivalents",
    }
    assert all(np.shape(x) == () for x in found.values())
    _, state = travel(optgrad.runge_kutta(0.1), 3, [1.0, -2.0])
    assert optgrad.diagnostics(state) == {"rejected_steps": 0, "gradient_equivalents": 12}


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("runge_kutta", {"learning_rate": -1.0}, "learning_rate = -1.0"),
        ("runge_kutta", {"tableau": "rk5"}, "tableau = 'rk5' .* did you mean 'rk4'"),
        ("implicit_euler", {"learning_rate": 0.0}, "learning_rate = 0.0"),
        ("implicit_euler", {"iterations": 0}, "iterations = 0"),
        ("implicit_euler", {"maxiter": 0}, "maxiter = 0"),
        ("implicit_euler", {"forcing": 1.5}, "forcing = 1.5"),
        ("implicit_euler", {"tolerance": 1.0}, "tolerance = 1.0"),
        ("implicit_euler", {"backtracks": -1}, "backtracks = -1"),
        ("implicit_euler", {"hvp": "exactly"}, "hvp = 'exactly'"),
    ],
)
def test_wrong_arguments(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optgrad, factory)(**arguments)


def test_missing_extras(name):
    w, optimizer = jnp.ones(2), OPTIMIZERS[name]
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(w, optimizer.init(w), value_fn=quadratic)
    if name == "euler":  # needs no other slope
        optimizer.update(w, optimizer.init(w), w)
        return
    with pytest.raises(ValueError, match=r"value_fn = None; accepted: a function"):
        optimizer.update(w, optimizer.init(w), w)

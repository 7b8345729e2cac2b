"""Krylov subspace descent: its subspace and the minimum in it against NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optgrad
from optgrad.curvature import few_coordinates
from optgrad.experiments.reproduce.survey_toys import TOYS, solve

SIZE = 8
AXES, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
START = np.linspace(-1.0, 1.3, SIZE)
CONVEX = AXES @ np.diag(np.logspace(0, 2, SIZE)) @ AXES.T
SADDLE = AXES @ np.diag([-2.0, -0.3, 0.0, 0.2, 0.5, 1.0, 4.0, 20.0]) @ AXES.T


def tree(x, dtype=None):
    return {"b": jnp.asarray(x[:2], dtype), "w": jnp.asarray(x[2:], dtype).reshape(2, 3)}


def flat(params):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def loss_of(matrix, quartic):
    """½xᵀAx + ¼q·Σx⁴ on trees."""

    def loss_fn(params):
        x = jnp.concatenate([jnp.ravel(p) for p in jax.tree.leaves(params)])
        bent = jnp.sum(jnp.matmul(matrix.astype(x.dtype), x, precision="highest") * x)
        return bent / 2 + 0.25 * quartic * jnp.sum(x**4)

    return loss_fn


class Numpy:
    """The same function and its derivatives."""

    def __init__(self, matrix, quartic):
        self.matrix, self.quartic = matrix, quartic

    def loss(self, x):
        return x @ self.matrix @ x / 2 + 0.25 * self.quartic * np.sum(x**4)

    def gradient(self, x):
        return self.matrix @ x + self.quartic * x**3

    def hessian(self, x):
        return self.matrix + np.diag(3 * self.quartic * x**2)


def krylov_basis(matrix, g, k, previous=None):
    """Orthonormal rows that span {g, Hg, …, Hᵏ⁻¹g, previous}, by QR of the Krylov vectors."""
    vectors = [g / np.linalg.norm(g)]
    for _ in range(min(k, len(g)) - 1):
        w = matrix @ vectors[-1]
        for _ in range(2):
            w = w - sum((v @ w) * v for v in vectors)
        vectors.append(w / np.linalg.norm(w))
    if previous is not None and np.any(previous):
        vectors.append(previous)
    return np.linalg.qr(np.array(vectors).T)[0].T


def minimum(problem, x, V, steps=100):
    """The minimum of a convex function in x + span V, by Newton's method in its coordinates."""
    alpha = np.zeros(len(V))
    for _ in range(steps):
        y = x + V.T @ alpha
        alpha -= np.linalg.solve(V @ problem.hessian(y) @ V.T, V @ problem.gradient(y))
    return x + V.T @ alpha


def compiled(optimizer, fn, **extras):
    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(fn)(params)
        updates, state = optimizer.update(grad, state, params, value=value, value_fn=fn, **extras)
        return jax.tree.map(jnp.add, params, updates), state

    return optimizer.init, step


@pytest.mark.parametrize("use_prev", [True, False])
def test_minimum_in_the_subspace(x64, use_prev):
    """With enough inner steps it is the minimum in the span of the Krylov and the last step."""
    problem = Numpy(CONVEX, 3.0)
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=25, use_prev=use_prev)
    init, step = compiled(optimizer, loss_of(CONVEX, 3.0))
    params, x, previous = tree(START), START, None
    state = init(params)
    for _ in range(4):
        params, state = step(params, state)
        V = krylov_basis(problem.hessian(x), problem.gradient(x), 3, previous)
        expected = minimum(problem, x, V)
        np.testing.assert_allclose(flat(params), expected, atol=1e-6)
        ritz = np.linalg.eigvalsh(V @ problem.hessian(x) @ V.T)
        np.testing.assert_allclose(state.curvature_max, ritz[-1], rtol=1e-8)
        x_before, x = x, flat(params)
        if use_prev:
            previous = x - x_before
            np.testing.assert_allclose(flat(state.previous), previous, atol=1e-10)
    assert (state.previous is None) == (not use_prev)
    assert (state.count, state.rejected) == (4, 0)


def test_is_conjugate_gradients_on_a_quadratic(x64):
    """k vectors without the previous step are k iterations of CG."""
    x, b = np.zeros(SIZE), -CONVEX @ START
    r, p = b.copy(), b.copy()
    for _ in range(4):
        alpha = r @ r / (p @ CONVEX @ p)
        x, new = x + alpha * p, r - alpha * CONVEX @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    optimizer = optgrad.krylov_subspace_descent(k=4, inner_steps=20, use_prev=False)
    init, step = compiled(optimizer, loss_of(CONVEX, 0.0))
    moved, _ = step(tree(START), init(tree(START)))
    np.testing.assert_allclose(flat(moved) - START, x, atol=1e-7)


@pytest.mark.parametrize("k", [pytest.param(SIZE, marks=pytest.mark.slow), 50])
def test_quadratic_in_one_step(x64, k):
    """Acceptance test 2, and more vectors than parameters."""
    init, step = compiled(optgrad.krylov_subspace_descent(k=k), loss_of(CONVEX, 0.0))
    moved, state = step(tree(START), init(tree(START)))
    np.testing.assert_allclose(flat(moved), 0.0, atol=1e-10)
    np.testing.assert_allclose(state.curvature_max, 100.0, rtol=1e-8)


def test_without_whitening(x64):
    """A quadratic of condition 1000 takes more than five steps instead of one."""
    optimizer = optgrad.krylov_subspace_descent(k=12, whiten=False)
    assert solve(TOYS["Q"], optimizer, 5).steps is None


def test_curvature_of_another_batch(x64):
    """``curvature_fn`` chooses the space; the step is the minimum of ``value_fn`` in it."""
    problem, other = Numpy(CONVEX, 0.0), Numpy(SADDLE, 0.0)
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=20)
    extras = {"curvature_fn": loss_of(SADDLE, 0.0)}
    init, step = compiled(optimizer, loss_of(CONVEX, 0.0), **extras)
    moved, _ = step(tree(START), init(tree(START)))
    V = krylov_basis(other.matrix, problem.gradient(START), 3)
    np.testing.assert_allclose(flat(moved), minimum(problem, START, V, 1), atol=1e-6)


def test_inner_minimisation_on_another_batch(x64):
    """The minimum of ``inner_fn``, which is taken only if it does not increase ``value_fn``."""
    problem, inner = Numpy(CONVEX, 0.0), Numpy(CONVEX + 3 * np.eye(SIZE), 0.0)
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=20)
    extras = {"inner_fn": loss_of(inner.matrix, 0.0)}
    init, step = compiled(optimizer, loss_of(CONVEX, 0.0), **extras)
    moved, state = step(tree(START), init(tree(START)))
    V = krylov_basis(problem.matrix, problem.gradient(START), 3)
    np.testing.assert_allclose(flat(moved), minimum(inner, START, V, 1), atol=1e-6)
    assert state.rejected == 0
    extras = {"inner_fn": lambda p: -loss_of(CONVEX, 0.0)(p) + loss_of(0 * CONVEX, 1.0)(p)}
    init, step = compiled(optimizer, loss_of(CONVEX, 0.0), **extras)
    before = init(tree(START))
    moved, state = step(tree(START), before)
    np.testing.assert_array_equal(flat(moved), START)
    assert state.rejected == 1
    assert not np.any(flat(state.previous))


def test_gauss_newton_matrix(x64):
    """The space is that of JᵀLJ."""
    problem = Numpy(SADDLE, 1.0)
    root = np.diag(np.linspace(0.5, 2.0, SIZE))

    def outputs_fn(params):
        x = jnp.concatenate([jnp.ravel(p) for p in jax.tree.leaves(params)])
        return jnp.tanh(x)

    def out_loss_fn(z):
        return 0.5 * jnp.sum((jnp.asarray(root) @ z) ** 2)

    J = np.diag(1 - np.tanh(START) ** 2)
    matrix = J @ root.T @ root @ J
    optimizer = optgrad.krylov_subspace_descent(k=3, curvature="ggn")
    extras = {"outputs_fn": outputs_fn, "out_loss_fn": out_loss_fn}
    init, step = compiled(optimizer, loss_of(SADDLE, 1.0), **extras)
    moved, state = step(tree(START), init(tree(START)))
    V = krylov_basis(matrix, problem.gradient(START), 3)
    d = flat(moved) - START
    np.testing.assert_allclose(V.T @ (V @ d), d, atol=1e-10)
    ritz = np.linalg.eigvalsh(V @ matrix @ V.T)
    np.testing.assert_allclose(state.curvature_max, ritz[-1], rtol=1e-8)
    assert problem.loss(flat(moved)) < problem.loss(START)


def test_preconditioner(x64):
    """The space of P⁻¹B and P⁻¹g, and of the previous step as it is."""
    problem = Numpy(CONVEX, 3.0)
    diagonal = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    P = diagonal + 0.01 * diagonal.mean()
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=25, precondition=True)
    extras = {"curvature_diagonal": tree(diagonal)}
    init, step = compiled(optimizer, loss_of(CONVEX, 3.0), **extras)
    params, x, previous = tree(START), START, None
    state = init(params)
    for _ in range(3):
        params, state = step(params, state)
        g, H = problem.gradient(x), problem.hessian(x)
        vectors = [g / P]
        vectors += [H @ vectors[0] / P]
        vectors += [H @ vectors[1] / P]
        vectors += [] if previous is None else [previous]
        vectors = [v / np.linalg.norm(v) for v in vectors]
        V = np.linalg.qr(np.array(vectors).T)[0].T
        np.testing.assert_allclose(flat(params), minimum(problem, x, V), atol=1e-6)
        previous, x = flat(params) - x, flat(params)
    extras = {"curvature_diagonal": tree(np.zeros(SIZE))}  # no scale known: none is changed
    init, step = compiled(optimizer, loss_of(CONVEX, 3.0), **extras)
    moved, _ = step(tree(START), init(tree(START)))
    V = krylov_basis(problem.hessian(START), problem.gradient(START), 3)
    np.testing.assert_allclose(flat(moved), minimum(problem, START, V), atol=1e-6)


@pytest.mark.parametrize(
    ("hvp", "cost"),
    [
        ("exact", 2),
        ("fd", 1),
        pytest.param("jvp", 2, marks=pytest.mark.slow),
        pytest.param("fdc", 2, marks=pytest.mark.slow),
    ],
)
def test_products(x64, hvp, cost):
    """All four ways lead to the minimum in the subspace; the cost is that of all evaluations."""
    problem = Numpy(CONVEX, 3.0)
    optimizer = optgrad.krylov_subspace_descent(k=2, hvp=hvp, inner_steps=12)
    init, step = compiled(optimizer, loss_of(CONVEX, 3.0))
    moved, state = step(tree(START), init(tree(START)))
    V = krylov_basis(problem.hessian(START), problem.gradient(START), 2)
    np.testing.assert_allclose(flat(moved), minimum(problem, START, V), atol=1e-3)
    assert 2 < state.evaluations <= 1 + 12 * 8
    assert state.cost == pytest.approx(1 + 3 * cost + int(state.evaluations) + 1 / 3)


@functools.cache
def saddle_update():
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=4)
    loss_fn = loss_of(SADDLE, 0.1)

    @jax.jit
    def update(grad, state, params, value, factor):
        return optimizer.update(
            grad, state, params, value=value, value_fn=lambda p: factor * loss_fn(p)
        )

    return optimizer.init, update


@pytest.mark.parametrize("case", ["gradient nan", "gradient inf", "value nan", "value_fn nan"])
def test_what_is_not_finite(case):
    """No step, counted, and the next one is taken."""
    bad = jnp.float32(jnp.inf if "inf" in case else jnp.nan)
    init, update = saddle_update()
    params = tree(START, jnp.float32)
    value, grad = jax.value_and_grad(loss_of(SADDLE, 0.1))(params)
    spoilt = {**grad, "b": grad["b"].at[0].set(bad)} if "gradient" in case else grad
    updates, state = update(
        spoilt,
        init(params),
        params,
        bad if case == "value nan" else value,
        bad if case == "value_fn nan" else jnp.float32(1.0),
    )
    assert not np.any(flat(updates))
    assert (state.count, state.rejected) == (1, 1)
    assert not np.any(flat(state.previous))
    assert np.isfinite([state.curvature_min, state.curvature_max, state.cost]).all()
    updates, state = update(grad, state, params, value, jnp.float32(1.0))
    assert np.any(flat(updates))
    assert (state.count, state.rejected) == (2, 1)


def test_zero_gradient():
    init, update = saddle_update()
    zero = tree(np.zeros(SIZE), jnp.float32)
    updates, state = update(zero, init(zero), zero, jnp.float32(0.0), jnp.float32(1.0))
    assert not np.any(flat(updates))
    assert state.rejected == 0
    assert state.evaluations == 1


def test_no_parameters():
    optimizer = optgrad.krylov_subspace_descent()
    for params in ({}, {"a": jnp.zeros((0, 2)), "b": None}):
        state = optimizer.init(params)
        updates, state = optimizer.update(params, state, params, value_fn=lambda _: 0.0)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert state.count == 1


def test_never_increases():
    """From many starts in float32, at once; the saddle at 0 holds none of them."""
    generator = np.random.default_rng(0)
    starts = jax.vmap(tree)(jnp.asarray(3 * generator.standard_normal((8, SIZE)), jnp.float32))
    init, update = saddle_update()
    loss_fn = loss_of(SADDLE, 0.1)

    def run(params):
        def body(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(loss_fn)(params)
            updates, state = update(grad, state, params, value, jnp.float32(1.0))
            return (jax.tree.map(jnp.add, params, updates), state), value

        return jax.lax.scan(body, (params, init(params)), length=25)[1]

    values = np.asarray(jax.jit(jax.vmap(run))(starts))
    assert np.all(np.diff(values, axis=1) <= 1e-6 * np.abs(values[:, 1:]))
    assert np.all(values[:, -1] < -5)


def test_bfloat16():
    """The small algebra and the previous step are float32."""
    params = tree(START, jnp.bfloat16)
    loss_fn = loss_of(SADDLE, 0.1)
    init, step = compiled(optgrad.krylov_subspace_descent(k=3, inner_steps=4), loss_fn)
    state, values = init(params), []
    for _ in range(4):
        values.append(float(loss_fn(params)))
        params, state = step(params, state)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.previous)} == {jnp.dtype("float32")}
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 5


def test_value_is_optional():
    params = tree(START, jnp.float32)
    loss_fn = loss_of(SADDLE, 0.1)
    value, grad = jax.value_and_grad(loss_fn)(params)
    optimizer = optgrad.krylov_subspace_descent(k=3, inner_steps=4)
    given = saddle_update()[1](grad, optimizer.init(params), params, value, jnp.float32(1.0))
    update = jax.jit(functools.partial(optimizer.update, value_fn=loss_fn))
    without = update(grad, optimizer.init(params), params)
    np.testing.assert_allclose(flat(without[0]), flat(given[0]), rtol=1e-3, atol=1e-4)
    spent = [float(state.cost) - int(state.evaluations) for _, state in (given, without)]
    np.testing.assert_allclose(spent, [9 + 1 / 3, 9 + 2 / 3], rtol=1e-5)


def test_sharded():
    """Eight devices of an automatic mesh: the numbers of one, no all-gather."""
    mesh = Mesh(np.array(jax.devices("cpu")[:8]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"b": jnp.linspace(-1.0, 1.0, 8), "w": jnp.linspace(1.5, -1.3, 16)}

    def fn(p):
        return sum(jnp.sum((1 + jnp.arange(x.size)) * x**2 + 0.1 * x**4) for x in p.values())

    init, step = compiled(optgrad.krylov_subspace_descent(k=4, inner_steps=3), fn)
    expected = step(*step(params, init(params)))
    placed = jax.device_put(params, sharding)
    state = init(placed)
    compiled_step = step.lower(placed, state).compile()
    found = compiled_step(*compiled_step(placed, state))
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    for tree_ in (state.previous, found[0], found[1].previous):
        assert all(x.sharding.is_equivalent_to(sharding, 1) for x in jax.tree.leaves(tree_))
    assert "all-gather" not in compiled_step.as_text()


def test_diagnostics():
    init, update = saddle_update()
    params = tree(START, jnp.float32)
    value, grad = jax.value_and_grad(loss_of(SADDLE, 0.1))(params)
    _, state = update(grad, init(params), params, value, jnp.float32(1.0))
    found = {key: float(x) for key, x in optgrad.diagnostics(state).items()}
    problem = Numpy(SADDLE, 0.1)
    V = krylov_basis(problem.hessian(START), problem.gradient(START), 3)
    ritz = np.linalg.eigvalsh(V @ problem.hessian(START) @ V.T)
    expected = {
        "curvature_min": min(ritz[0], 0.0),  # the row of no previous step has none
        "curvature_max": ritz[-1],
        "inner_evaluations": int(state.evaluations),
        "rejected_steps": 0,
        "gradient_equivalents": 9 + 1 / 3 + int(state.evaluations),
    }
    assert found == pytest.approx(expected, rel=1e-3)


# --- the inner minimisation -------------------------------------------------------------------


def test_minimum_of_few_coordinates(x64):
    """Rosenbrock's function; a start without a gradient; what is NaN everywhere."""

    def rosenbrock(x):
        y = x + jnp.array([-1.2, 1.0])
        return 100 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2

    best, evaluations = few_coordinates.minimum(rosenbrock, 2, 60)
    np.testing.assert_allclose(best, [2.2, 0.0], atol=1e-6)
    assert 20 < evaluations < 200
    best, evaluations = few_coordinates.minimum(lambda x: jnp.sum(x**2), 2, 5)
    np.testing.assert_array_equal(best, 0.0)
    assert evaluations == 1
    best, _ = few_coordinates.minimum(lambda x: jnp.nan * jnp.sum(x + 1), 2, 5)
    np.testing.assert_array_equal(best, 0.0)


def test_best_point_is_kept(x64):
    """However the last line search ended: never a point above the start."""

    def trap(x):
        """Falls towards a wall."""
        return jnp.where(x[0] < 0.3, -x[0], 1e3 + x[0] ** 2)

    for steps in (1, 3):
        best, _ = few_coordinates.minimum(trap, 1, steps)
        assert trap(best) <= trap(jnp.zeros(1))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"inner_steps": 0}, "inner_steps = 0"),
        ({"curvature": "fisher"}, "curvature = 'fisher'"),
        ({"precondition": "yes"}, "precondition = 'yes'"),
        ({"whiten": None}, "whiten = None"),
        ({"use_prev": 2}, "use_prev = 2"),
        ({"hvp": "fdd"}, "hvp = 'fdd'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.krylov_subspace_descent(**arguments)


def test_missing_extras():
    optimizer, w = optgrad.krylov_subspace_descent(), jnp.ones(3)
    state = optimizer.init(w)
    with pytest.raises(ValueError, match=r"value_fn = None; .*optgrad\.curvature_args"):
        optimizer.update(w, state, w)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(w, state, value_fn=jnp.sum)
    for name in ("curvature_fn", "inner_fn"):
        with pytest.raises(TypeError, match=f"{name} = 'no'"):
            optimizer.update(w, state, w, value_fn=jnp.sum, **{name: "no"})
    optimizer = optgrad.krylov_subspace_descent(curvature="ggn")
    extras = {"outputs_fn": lambda p: p, "out_loss_fn": jnp.sum}
    for missing in extras:
        given = {name: fn for name, fn in extras.items() if name != missing}
        with pytest.raises(ValueError, match=rf"{missing} = None; .*outputs="):
            optimizer.update(w, state, w, value_fn=jnp.sum, **given)
    optimizer = optgrad.krylov_subspace_descent(precondition=True)
    with pytest.raises(ValueError, match=r"curvature_diagonal = None; .*gauss_newton_diagonal"):
        optimizer.update(w, state, w, value_fn=jnp.sum)


# --- the specification's numbers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "steps", "cost"),
    [
        ("Q", 1, 87),
        pytest.param("S2", 1, 43, marks=pytest.mark.slow),
        pytest.param("S6", 3, 227, marks=pytest.mark.slow),
        pytest.param("I", 3, 227, marks=pytest.mark.slow),
        pytest.param("R1", 4, 131, marks=pytest.mark.slow),
        pytest.param("R2", 4, 135, marks=pytest.mark.slow),
    ],
)
def test_toys(x64, toy, steps, cost):
    """Steps and gradient equivalents of the specification, with half as many again, both types."""
    optimizer = optgrad.krylov_subspace_descent(k=12 if toy == "Q" else 2)
    for dtype in (jnp.float64, jnp.float32):
        solved = solve(TOYS[toy], optimizer, 20, dtype=dtype)
        assert solved.steps is not None
        assert solved.steps <= 1.5 * steps
        assert solved.cost <= 1.5 * cost
        assert solved.increases == 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_stable_manifold_is_not_left(x64, dtype):
    solved = solve(TOYS["S0"], optgrad.krylov_subspace_descent(k=2), 30, dtype=jnp.dtype(dtype))
    assert solved.steps is None
    assert solved.params["y"] == 0

"""BFGS against a transcription, the secant equation, scipy and the table."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.experiments.reproduce import survey_toys

from . import searches

module = importlib.import_module("optgrad.curvature.bfgs")  # the package's name is the factory


def updated(inverse, s, y):
    """The formula with its two factors, in the order of section 1 of the specification."""
    rho, one = s @ y, np.eye(len(s))
    left = one - np.outer(s, y) / rho
    return left @ inverse @ (one - np.outer(y, s) / rho) + np.outer(s, s) / rho


class Box:
    """Transcription of section 5.7 of the specification."""

    def __init__(self):
        self.inverse = self.x = self.g = None
        self.pairs = self.skipped = 0

    def learn(self, x, g):
        s, y = x - self.x, g - self.g
        eps = np.finfo(float).eps
        enough = s @ y > max(1e-8, 10 * eps) * np.linalg.norm(s) * np.linalg.norm(y)
        moved = np.linalg.norm(s) > 10 * eps * np.linalg.norm(x)
        if not (enough and moved and s @ y > 1e3 * np.finfo(float).tiny):
            self.skipped += 1
            return
        if self.inverse is None:
            self.inverse = s @ y / (y @ y) * np.eye(len(s))
        self.inverse = updated(self.inverse, s, y)
        self.pairs += 1

    def __call__(self, x, g):
        if self.x is not None:
            self.learn(x, g)
        self.x, self.g = x, g
        return g * min(1, 1 / np.linalg.norm(g)) if self.inverse is None else self.inverse @ g


def random_pairs(seed=0, size=8):
    """A positive definite inverse, and a pair of positive curvature."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((size, size))
    s, y = generator.standard_normal((2, size))
    return root @ root.T + np.eye(size), s, y * np.sign(s @ y)


def transform(optimizer, xs, gs):
    """Directions and states of a run that is handed these points and gradients."""
    state = optimizer.init(xs[0])
    update, every = jax.jit(optimizer.update), []
    for x, g in zip(xs, gs, strict=True):
        direction, state = update(g, state, x)
        every.append((direction, state))
    return every


# --- the matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_secant_equation(x64, seed):
    """H⁻¹y = s, symmetric and positive definite; the slide's swapped factors violate it."""
    inverse, s, y = random_pairs(seed)
    found = np.asarray(module.inverse_update(*map(jnp.asarray, (inverse, s, y, s @ y))))
    np.testing.assert_allclose(found, updated(inverse, s, y), rtol=1e-10, atol=1e-10)
    scale = np.linalg.norm(found) * np.linalg.norm(y)
    assert np.linalg.norm(found @ y - s) < 1e-14 * scale
    assert np.linalg.norm(found - found.T) <= 1e-15 * np.linalg.norm(found)
    assert np.min(np.linalg.eigvalsh(found)) > 0

    rho, one = s @ y, np.eye(len(s))
    left = one - np.outer(y, s) / rho
    printed = left @ inverse @ (one - np.outer(s, y) / rho) + np.outer(s, s) / rho
    assert np.linalg.norm(printed @ y - s) > 0.1 * np.linalg.norm(s)


def test_directions_follow_the_box(x64):
    """Along a path of random steps on a nonlinear function, with pairs of negative curvature."""
    generator = np.random.default_rng(3)
    points = np.cumsum(generator.standard_normal((40, 12)), axis=0)
    gradients = points + 6.0 * np.sin(points)
    box = Box()
    expected = np.array([box(x, g) for x, g in zip(points, gradients, strict=True)])
    found, state = searches.directions(optgrad.scale_by_bfgs(), gradients, points)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10 * np.max(np.abs(expected)))
    np.testing.assert_allclose(state.inverse_hessian, box.inverse, rtol=1e-8, atol=1e-10)
    assert (state.pairs, state.skipped) == (box.pairs, box.skipped)
    assert box.pairs > 10
    assert box.skipped > 3
    assert (state.count, state.rejected) == (40, 0)


def test_exact_on_a_quadratic(x64):
    """After D independent steps with exact line searches the model is the inverse Hessian."""
    generator = np.random.default_rng(0)
    root = generator.standard_normal((5, 5))
    hessian = root @ root.T + np.eye(5)
    transformation = optgrad.scale_by_bfgs()
    x = generator.standard_normal(5)
    state = transformation.init(jnp.asarray(x))
    for _ in range(6):
        g = hessian @ x
        direction, state = transformation.update(jnp.asarray(g), state, jnp.asarray(x))
        d = np.asarray(direction)
        x = x - (d @ g) / (d @ hessian @ d) * d
    np.testing.assert_allclose(state.inverse_hessian, np.linalg.inv(hessian), rtol=1e-6, atol=1e-8)


# --- the guards ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.3, 20.0])
def test_first_step(size):
    """The gradient, of length 1 at most."""
    g = jnp.array([size, 0.0])
    ((direction, state),) = transform(optgrad.scale_by_bfgs(), g[None], g[None])
    np.testing.assert_allclose(direction, [min(size, 1.0), 0.0], rtol=1e-6)
    assert (state.pairs, state.skipped) == (0, 0)


GUARDS = {  # pairs (s, y) that are left out, around x = (1, 1)
    "negative curvature": ([0.5, 0.0], [-0.5, 0.1]),
    "nearly orthogonal": ([0.5, 0.0], [1e-7, 1.0]),
    "no step": ([1e-7, 0.0], [1e-7, 0.0]),
    "denormal": ([1e-5, 0.0], [1e-31, 0.0]),
    "not finite": ([1e-5, 0.0], [1e-30, 1e-26]),
}


@pytest.mark.parametrize("guard", list(GUARDS))
def test_pairs_left_out(guard):
    """In float32; the model is that of the pairs before."""
    s, y = (np.float32(part) for part in GUARDS[guard])
    x, g = np.float32([[0.0, 0.0], [1.0, 1.0]]), np.float32([[-1.0, -2.0], [1e-3, 0.0]])
    if guard in ("denormal", "not finite"):
        g[1] = 0.0  # small differences of gradients need small gradients
        x[1] = 1e-2
    every = transform(
        optgrad.scale_by_bfgs(), np.append(x, [x[1] + s], 0), np.append(g, [g[1] + y], 0)
    )
    (_, before), (direction, after) = every[1:]
    assert (before.pairs, before.skipped) == (1, 0)
    assert (after.pairs, after.skipped) == (1, 1)
    np.testing.assert_array_equal(after.inverse_hessian, before.inverse_hessian)
    assert np.all(np.isfinite(direction))
    # The same pair, of a size and direction that is of use, is taken.
    good = transform(
        optgrad.scale_by_bfgs(), np.append(x, [x[1] + 0.5], 0), np.append(g, [g[1] + 0.5], 0)
    )
    assert (good[2][1].pairs, good[2][1].skipped) == (2, 0)


def test_model_that_does_not_descend():
    """It is given up: a step like the first one."""
    transformation = optgrad.scale_by_bfgs()
    x, g = jnp.ones(2), jnp.array([3.0, 4.0])
    state = transformation.init(x)._replace(
        inverse_hessian=jnp.diag(jnp.array([1.0, -1.0])),
        count=jnp.int32(5),
        pairs=jnp.int32(4),
        params=x,
        gradient=g,
    )
    direction, after = transformation.update(g, state, x)
    np.testing.assert_allclose(direction, g / 5.0, rtol=1e-6)
    np.testing.assert_array_equal(after.inverse_hessian, np.eye(2))
    assert (after.pairs, after.skipped) == (0, 1)
    direction, after = transformation.update(0 * g, state, x)  # a minimum is no such case
    np.testing.assert_array_equal(direction, 0.0)
    assert after.pairs == 4


def test_no_nan_at_convergence_in_float32():
    """200 steps at the minimum; without the guards NaN."""
    run = searches.compiled(optgrad.bfgs(curv_rtol=0.1), searches.rosenbrock, 200)
    values, params, state = run(jnp.array([-1.2, 1.0, 0.3]))
    assert np.all(np.isfinite(state.direction.inverse_hessian))
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(params[-1], 1.0, atol=1e-4)


def test_gradients_that_are_not_finite(x64):
    """A zero direction, counted; the model stays."""
    xs = np.random.default_rng(0).standard_normal((6, 3))
    gs = xs * [1.0, 2.0, 3.0]
    spoilt = np.insert(gs, 3, [1.0, np.nan, 1.0], axis=0)
    every = transform(optgrad.scale_by_bfgs(), np.insert(xs, 3, xs[3], axis=0), spoilt)
    np.testing.assert_array_equal(every[3][0], 0.0)
    assert every[3][1].rejected == 1
    expected = transform(optgrad.scale_by_bfgs(), xs, gs)
    np.testing.assert_array_equal(every[-1][0], expected[-1][0])
    assert optgrad.diagnostics(every[-1][1])["gradient_equivalents"] == 7


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_gradients_of_any_size(size):
    points = np.float32(np.cumsum(searches.random_gradients(5), axis=0))
    found, state = searches.directions(optgrad.scale_by_bfgs(), np.float32(size) * points, points)
    assert np.all(np.isfinite(found))
    assert np.all(np.isfinite(state.inverse_hessian))
    assert state.rejected == 0


def test_too_many_parameters():
    with pytest.raises(ValueError, match=r"params has 12 entries; .* max_size = 11.*lbfgs"):
        optgrad.bfgs(max_size=11).init(jnp.zeros((3, 4)))
    optgrad.bfgs(max_size=12).init(jnp.zeros((3, 4)))


# --- with the line search --------------------------------------------------------------------


def test_trajectory(x64):
    """The box, optax's search, and the guard, in a Python loop."""
    value_fn, params = searches.rosenbrock, np.array([-1.2, 1.0, 0.3])
    search = optax.scale_by_zoom_linesearch(20, curv_rtol=0.9, initial_guess_strategy="one")
    value_and_grad = jax.jit(jax.value_and_grad(value_fn))

    @jax.jit
    def trial(d, state, params):
        value, grad = value_and_grad(params)
        return search.update(-d, state, params, value=value, grad=grad, value_fn=value_fn)

    box, expected = Box(), []
    state = search.init(jnp.asarray(params))
    for _ in range(25):
        value, grad = value_and_grad(params)
        update, state = trial(box(params, np.asarray(grad)), state, params)
        assert value_fn(params + update) <= value  # no guard acts on the way
        params = params + np.asarray(update)
        expected.append(params)
    run = searches.compiled(optgrad.bfgs(), value_fn, 25)
    found = run(jnp.array([-1.2, 1.0, 0.3]))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found[:15], expected[:15], rtol=1e-10)


def test_like_scipy(x64):
    searches.assert_like_scipy(optgrad.bfgs(), "BFGS", 150)


def test_options_of_the_search(x64):
    """One trial of the step size 1; a tolerance that is a schedule."""
    optimizer = optgrad.bfgs(max_linesearch_steps=1)
    _, params, state = searches.compiled(optimizer, lambda x: 0.05 * jnp.sum(x * x), 2)(jnp.ones(2))
    np.testing.assert_allclose(params[0], 0.9)
    np.testing.assert_allclose(params[1], 0.0, atol=1e-12)  # H⁻¹ = 10·I
    np.testing.assert_allclose(state.cost, 2 * (1 + 1 + 1 / 3))
    start = jnp.array([-1.2, 1.0, 0.3])
    loose, changing = (
        searches.compiled(optgrad.bfgs(curv_rtol=tolerance), searches.rosenbrock, 10)(start)[1]
        for tolerance in (0.9, lambda count: jnp.where(count < 5, 0.9, 1e-3))
    )
    np.testing.assert_allclose(changing[:5], loose[:5], rtol=1e-12)
    assert not np.allclose(changing[5:7], loose[5:7], rtol=1e-3)


def test_diagnostics():
    run = searches.compiled(optgrad.bfgs(), lambda x: 2.0 * jnp.sum(x**2), 3, diagnose=True)
    found = run(jnp.array([1.0, 2.0]))[2]
    np.testing.assert_allclose(found["pairs"][:2], [0, 1])
    np.testing.assert_allclose(found["inverse_curvature_mean"][1], 0.25, rtol=1e-5)
    assert found.keys() >= {"skipped_pairs", "rejected_steps", "gradient_equivalents", "step_size"}


# --- the specification's table ---------------------------------------------------------------

# (toy, curv_rtol, steps, gradient equivalents)
GOLDEN = [
    ("Q", 0.1, 17, 101),
    ("S2", 0.1, 4, 24),
    ("S6", 0.1, 4, 30),
    ("I", 0.1, 8, 89),
    ("R1", 0.1, 23, 92),
    ("R2", 0.1, 24, 96),
    ("Q", 0.9, 62, 124),
    ("R2", 0.9, 39, 88),
]
FAST = {("Q", 0.1, "float64"), ("R2", 0.9, "float64"), ("R2", 0.1, "float32")}


@pytest.mark.parametrize(
    ("toy", "curv_rtol", "steps", "cost", "dtype"),
    [
        pytest.param(*row, dtype, marks=() if (*row[:2], dtype) in FAST else pytest.mark.slow)
        for row in GOLDEN
        for dtype in ("float64", "float32")
    ],
)
def test_table(toy, curv_rtol, steps, cost, dtype, request):
    """The quadratic with curv_rtol 0.1 within 20 steps: acceptance test 2."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    searches.assert_solves(optgrad.bfgs(curv_rtol=curv_rtol), toy, steps, cost, dtype)
    if (toy, curv_rtol) == ("Q", 0.1):
        optimizer = optgrad.bfgs(curv_rtol=curv_rtol)
        assert survey_toys.solve(survey_toys.TOYS["Q"], optimizer, 20, dtype=dtype).steps <= 20


# --- what it has to stand --------------------------------------------------------------------


def test_stays_on_the_saddle(x64):
    searches.assert_stays_on_the_saddle(optgrad.bfgs())


def test_non_finite_numbers():
    searches.assert_stands_non_finite_numbers(optgrad.bfgs())


def test_zero_gradients():
    searches.assert_stands_zero_gradients(optgrad.bfgs())


def test_negative_curvature():
    searches.assert_descends_negative_curvature(optgrad.bfgs())


def test_narrow_parameters():
    searches.assert_narrow_parameters(optgrad.bfgs())


def test_mapped_runs(x64):
    searches.assert_mapped_is_the_loop(optgrad.bfgs(), 1e-8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"curv_rtol": -1.0}, ValueError, "curv_rtol = -1.0"),
        ({"max_linesearch_steps": 0}, ValueError, "max_linesearch_steps = 0"),
        ({"max_size": 0.5}, TypeError, "max_size = 0.5"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        optgrad.bfgs(**options)


def test_missing_params():
    transformation = optgrad.scale_by_bfgs()
    with pytest.raises(ValueError, match="params = None"):
        transformation.update(jnp.ones(2), transformation.init(jnp.ones(2)))

"""Newton's method, damped and saddle-free, with the whole Hessian, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad.experiments.reproduce.survey_toys import TOYS, solve

NAMES = ("newton", "damped_newton", "saddle_free_newton")
ADAPTIVE = NAMES[1:]

# --- a double well in every direction, coupled -------------------------------------------------

COUPLING = 0.3 * np.array([[0, 1, -1, 0], [1, 0, 2, 1], [-1, 2, 0, -1], [0, 1, -1, 0]])
WELLS = np.array([1.0, 2.0, -1.0, 0.5])
START = np.array([0.3, -1.7, 0.8, 1.1])


def loss(x):
    """¼Σx⁴ − ½Σax² + ½xᵀBx."""
    return np.sum(x**4) / 4 - WELLS @ x**2 / 2 + x @ COUPLING @ x / 2


def gradient(x):
    return x**3 - WELLS * x + COUPLING @ x


def hessian(x):
    return np.diag(3 * x**2 - WELLS) + COUPLING


def tree(x, dtype=None):
    return {"b": jnp.asarray(x[0], dtype), "w": jnp.asarray(x[1:], dtype).reshape(1, 3)}


def flat(params):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def loss_fn(params):
    x = jnp.concatenate([jnp.ravel(p) for p in jax.tree.leaves(params)])
    bent = jnp.sum(jnp.matmul(COUPLING.astype(x.dtype), x, precision="highest") * x)
    return jnp.sum(x**4) / 4 - jnp.sum(WELLS.astype(x.dtype) * x**2) / 2 + bent / 2


class Box:
    """Transcription of section 5.1 of the specification."""

    def __init__(self, name, rate, damping, adaptive, floor=1e-12):
        self.name, self.rate, self.damping = name, rate, damping
        self.adaptive, self.floor = adaptive, floor
        self.rejected = 0

    def direction(self, g, H):
        values, Q = np.linalg.eigh(H)
        divisor = {
            "newton": values,
            "damped_newton": values + self.damping,
            "saddle_free_newton": np.maximum(np.abs(values) + self.damping, self.floor),
        }[self.name]
        return Q @ ((Q.T @ g) / divisor)

    def __call__(self, x):
        g, H = gradient(x), hessian(x)
        d = -self.rate * self.direction(g, H)
        if not self.adaptive:
            return x + d
        if self.name == "saddle_free_newton":
            values, Q = np.linalg.eigh(H)
            H = Q @ np.diag(np.abs(values)) @ Q.T
        predicted = -(g @ d + d @ H @ d / 2)
        ratio = (loss(x) - loss(x + d)) / predicted if predicted > 0 else -1.0
        self.damping *= 4 if ratio < 0.25 else 1 / 3 if ratio > 0.75 else 1
        if loss(x + d) > loss(x):
            self.rejected += 1
            return x
        return x + d


@functools.cache
def step_of(name, **options):
    """One compiled step, (params, state) -> …; the options are numbers or strings."""
    return compiled(getattr(optgrad, name)(**options))


def compiled(optimizer, fn=loss_fn):
    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(fn)(params)
        updates, state = optimizer.update(grad, state, params, value=value, value_fn=fn)
        return jax.tree.map(jnp.add, params, updates), state

    return optimizer.init, step


CASES = [
    ("newton", {}, False),
    ("newton", {"learning_rate": 0.6}, False),
    ("damped_newton", {"damping": 3.0}, False),
    ("damped_newton", {"damping": 0.5, "learning_rate": 0.7}, False),
    ("damped_newton", {"damping": 0.1}, True),
    ("damped_newton", {"damping": 2.0, "learning_rate": 1.6}, True),
    ("saddle_free_newton", {"damping": 0.0}, False),
    ("saddle_free_newton", {"damping": 0.3, "floor": 2.0}, False),
    ("saddle_free_newton", {"damping": 1e-3}, True),
    ("saddle_free_newton", {"damping": 1e-3, "learning_rate": 1.7}, True),
]


@pytest.mark.parametrize(("name", "options", "adaptive"), CASES)
def test_follows_the_specification(x64, name, options, adaptive):
    """Five steps from a point where the Hessian has both signs; the sixth may be all rounding."""
    assert np.linalg.eigvalsh(hessian(START))[0] < 0 < np.linalg.eigvalsh(hessian(START))[-1]
    box = Box(
        name,
        options.get("learning_rate", 1.0),
        options.get("damping", 0.0),
        adaptive,
        options.get("floor", 1e-12),
    )
    init, step = compiled(
        getattr(optgrad, name)(**options, **({"adaptive": True} if adaptive else {}))
    )
    params, x = tree(START), START
    state = init(params)
    for _ in range(5):
        values = np.linalg.eigvalsh(hessian(x))
        params, state = step(params, state)
        x = box(x)
        np.testing.assert_allclose(flat(params), x, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(state.damping, box.damping, rtol=1e-12)
        ends = [state.curvature_min, state.curvature_max]
        np.testing.assert_allclose(ends, values[[0, -1]], atol=1e-10)
    assert (state.count, state.rejected) == (5, box.rejected)
    assert state.cost == pytest.approx(5 * (1 + 2 * 4 + adaptive / 3))


def test_steps_are_rejected_somewhere():
    """The cases above include steps that are not taken."""
    counts = []
    for name, options, adaptive in CASES:
        box = Box(name, options.get("learning_rate", 1.0), options.get("damping", 0.0), adaptive)
        x = START
        for _ in range(6):
            x = box(x)
        counts.append(box.rejected)
    assert max(counts) > 0


@pytest.mark.parametrize("name", NAMES)
def test_direction(x64, name):
    """``scale_by_*`` is positive, and the alias −α times it."""
    options = {} if name == "newton" else {"damping": 0.7}
    direction = getattr(optgrad, f"scale_by_{name}")(**options)
    params, g = tree(START), np.array([1.0, -2.0, 0.5, 3.0])
    updates, _ = direction.update(tree(g), direction.init(params), params, value_fn=loss_fn)
    expected = Box(name, 1.0, 0.7 * bool(options), False).direction(g, hessian(START))
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-10)
    alias = getattr(optgrad, name)(0.25, **options)
    signed, _ = alias.update(tree(g), alias.init(params), params, value_fn=loss_fn)
    np.testing.assert_allclose(flat(signed), -0.25 * expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("hvp", "cost", "tolerance"),
    [("jvp", 2, 1e-12), ("fd", 1, 1e-5), ("fdc", 2, 1e-8)],
)
def test_products(x64, hvp, cost, tolerance):
    params = tree(START)
    found = {}
    for mode in ("exact", hvp):
        init, step = compiled(optgrad.saddle_free_newton(damping=0.5, hvp=mode))
        found[mode] = step(params, init(params))
    difference = flat(found[hvp][0]) - flat(found["exact"][0])
    assert 0 <= np.abs(difference).max() < tolerance
    assert found[hvp][1].cost == 1 + 4 * cost


def test_schedules():
    """Learning rate and damping of each step."""
    optimizer = optgrad.damped_newton(lambda t: 1.0 / (1 + t), damping=lambda t: 3.0 + t)
    init, step = compiled(optimizer)
    params, x = tree(START), START
    state = init(params)
    for t in range(3):
        params, state = step(params, state)
        x = Box("damped_newton", 1 / (1 + t), 3.0 + t, False)(x)
        np.testing.assert_allclose(flat(params), x, rtol=1e-4)
        assert state.damping == 3.0 + t


def test_value_is_optional():
    """It costs a third of a gradient if it is missing."""
    optimizer = optgrad.saddle_free_newton(damping=0.1, adaptive=True)
    params = tree(START)
    value, grad = jax.value_and_grad(loss_fn)(params)
    state = optimizer.init(params)
    with_value = optimizer.update(grad, state, params, value=value, value_fn=loss_fn)
    without = optimizer.update(grad, state, params, value_fn=loss_fn)
    np.testing.assert_allclose(flat(without[0]), flat(with_value[0]), rtol=1e-6)
    np.testing.assert_allclose([with_value[1].cost, without[1].cost], [9 + 1 / 3, 9 + 2 / 3])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_never_increases(name):
    """From many starts, with a first damping that is far too small or large."""
    optimizer = getattr(optgrad, name)
    generator = np.random.default_rng(0)
    starts = jax.vmap(tree)(jnp.asarray(3 * generator.standard_normal((20, 4)), jnp.float32))
    dampings = jnp.asarray(10.0 ** generator.uniform(-6, 3, 20), jnp.float32)

    def run(params, damping):
        init, step = compiled(optimizer(damping=damping, adaptive=True))

        def body(carry, _):
            return step(*carry), loss_fn(carry[0])

        (params, state), values = jax.lax.scan(body, (params, init(params)), length=60)
        return jnp.append(values, loss_fn(params)), jax.grad(loss_fn)(params), state

    values, grads, state = jax.jit(jax.vmap(run))(starts, dampings)
    assert np.all(np.diff(values, axis=1) <= 0)
    assert np.all(np.isfinite(values))
    assert sum(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-2
    assert np.sum(state.rejected) > 0


# --- what is not finite -----------------------------------------------------------------------


def once(optimizer, grad, fn, value=None, params=None):
    params = jnp.ones(3) if params is None else params
    state = optimizer.init(params)
    return state, *optimizer.update(grad, state, params, value=value, value_fn=fn)


def bowl(x):
    return jnp.sum(jnp.array([1.0, 2.0, 3.0], x.dtype) * x**2)


def factories():
    yield from ((optgrad.newton, {}), (optgrad.damped_newton, {}), (optgrad.saddle_free_newton, {}))
    yield from ((getattr(optgrad, name), {"adaptive": True}) for name in ADAPTIVE)


@pytest.mark.parametrize(("factory", "options"), list(factories()))
@pytest.mark.parametrize(
    "case", ["gradient nan", "gradient inf", "value nan", "value_fn nan", "value_fn inf"]
)
def test_what_is_not_finite(factory, options, case):
    """No step, counted; the damping and the curvatures are not spoilt."""
    bad = jnp.float32(jnp.nan if "nan" in case else jnp.inf)
    grad = jnp.array([1.0, bad, 1.0]) if "gradient" in case else jnp.ones(3)
    value = bad if case == "value nan" else None
    fn = (lambda x: bad * bowl(x)) if "value_fn" in case else bowl
    before, updates, after = once(factory(**options), grad, fn, value)
    assert not np.any(updates)
    assert (after.count, after.rejected) == (1, 1)
    assert after.damping == before.damping
    assert np.isfinite([after.curvature_min, after.curvature_max]).all()


def test_singular_hessian():
    """Newton's method has no step for it; the others do, and none where there is no gradient."""

    def valley(x):
        return x[0] ** 2 + x[1] ** 2

    grad = jnp.array([2.0, 2.0, 1.0])
    _, updates, state = once(optgrad.newton(), grad, valley)
    assert not np.any(updates)
    assert state.rejected == 1
    for factory in (optgrad.damped_newton, optgrad.saddle_free_newton):
        _, updates, state = once(factory(damping=0.5), grad, valley)
        np.testing.assert_allclose(updates, [-0.8, -0.8, -2.0], rtol=1e-5)
        assert state.rejected == 0
    _, updates, _ = once(optgrad.saddle_free_newton(damping=0.0, floor=0.1), grad, valley)
    np.testing.assert_allclose(updates, [-1.0, -1.0, -10.0], rtol=1e-5)
    for name in NAMES:
        _, updates, state = once(getattr(optgrad, name)(), jnp.array([2.0, 2.0, 0.0]), valley)
        assert updates[2] == 0
        assert state.rejected == 0
        assert np.all(updates[:2] < -0.5)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradient(name):
    _, updates, state = once(getattr(optgrad, name)(), jnp.zeros(3), lambda x: 0.0 * x[0])
    assert not np.any(updates)
    assert state.rejected == 0


def test_rejection_raises_the_damping():
    """−√(1+x²) has a model of positive size in the wrong place: the step overshoots the wall."""

    def wall(x):
        return jnp.sum(0.5 * x**2 + jnp.where(x < 0.5, 1e3 * (x - 0.5) ** 2, 0.0))

    for name in ADAPTIVE:
        optimizer = getattr(optgrad, name)(damping=0.01, adaptive=True)
        _, updates, state = once(optimizer, jnp.ones(3), wall)
        assert not np.any(updates)
        assert state.rejected == 1
        np.testing.assert_allclose(state.damping, 0.04, rtol=1e-6)


def test_bfloat16():
    params = tree(START, jnp.bfloat16)
    for name in NAMES:
        init, step = step_of(name)
        moved, state = step(params, init(params))
        assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype("bfloat16")}
        x = flat(params)
        expected = Box(name, 1.0, {"newton": 0, "damped_newton": 1}.get(name, 1e-3), False)(x)
        np.testing.assert_allclose(flat(moved), expected, rtol=0.1, atol=0.05)
        assert state.damping.dtype == jnp.float32


def test_sweep_of_the_damping():
    """One compilation, the numbers of separate runs."""

    def run(damping):
        init, step = compiled(optgrad.saddle_free_newton(damping=damping, adaptive=True))
        params = tree(START, jnp.float32)
        state = init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    dampings = jnp.array([0.01, 1.0])
    together = jax.jit(jax.vmap(run))(dampings)
    for i, damping in enumerate(dampings):
        alone = jax.jit(run)(damping)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


def test_diagnostics():
    init, step = step_of("saddle_free_newton")
    params = tree(START, jnp.float32)
    _, state = step(params, init(params))
    found = optgrad.diagnostics(state)
    values = np.linalg.eigvalsh(hessian(START))
    expected = {
        "damping": 1e-3,
        "curvature_min": values[0],
        "curvature_max": values[-1],
        "rejected_steps": 0,
        "gradient_equivalents": 9,
    }
    assert {key: float(x) for key, x in found.items()} == pytest.approx(expected, rel=1e-4)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *[(name, {"learning_rate": -1.0}, "learning_rate = -1.0") for name in NAMES],
        *[(name, {"hvp": "fdd"}, "hvp = 'fdd' .*did you mean 'fd'") for name in NAMES],
        *[(name, {"max_size": 0}, "max_size = 0") for name in NAMES],
        *[(name, {"damping": -1.0}, r"damping = -1.0 .*\[0") for name in ADAPTIVE],
        *[(name, {"damping": 0.0, "adaptive": True}, r"damping = 0.0 .*\(0") for name in ADAPTIVE],
        *[(name, {"adaptive": "yes"}, "adaptive = 'yes'") for name in ADAPTIVE],
        ("saddle_free_newton", {"floor": -1.0}, "floor = -1.0"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optgrad, name)(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_the_transformation(name):
    optimizer, w = getattr(optgrad, name)(max_size=3), jnp.ones(3)
    state = optimizer.init(w)
    with pytest.raises(ValueError, match=r"4 entries; accepted: at most max_size = 3"):
        optimizer.init(jnp.ones(4))
    with pytest.raises(ValueError, match=r"value_fn = None; .*optgrad.curvature_args"):
        optimizer.update(w, state, w)
    with pytest.raises(TypeError, match=r"value_fn = 1\.0"):
        optimizer.update(w, state, w, value_fn=1.0)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(w, state, value_fn=bowl)


# --- the specification's numbers --------------------------------------------------------------

GOLDEN = [
    ("newton", {}, "Q", 1, 25),
    ("newton", {}, "R1", 5, 25),
    ("newton", {}, "R2", 6, 30),
    ("damped_newton", {"damping": 1e-3}, "Q", 4, 100),
    ("damped_newton", {"damping": 3.0}, "S2", 14, None),
    ("damped_newton", {"damping": 3.0}, "S6", 21, None),
    ("damped_newton", {"damping": 1.0, "adaptive": True}, "R1", 30, 170),
    ("damped_newton", {"damping": 1.0, "adaptive": True}, "R2", 33, 187),
    ("saddle_free_newton", {"damping": 0.0}, "Q", 1, 25),
    ("saddle_free_newton", {"damping": 0.0}, "S2", 11, 55),
    ("saddle_free_newton", {"damping": 0.0}, "I", 21, 105),
    ("saddle_free_newton", {"damping": 0.0}, "R1", 5, 25),
    ("saddle_free_newton", {"damping": 0.0}, "R2", 6, 30),
]


@pytest.mark.parametrize(("name", "options", "toy", "steps", "cost"), GOLDEN)
def test_toys(x64, name, options, toy, steps, cost):
    """Steps and gradient equivalents of the specification, with half as many again, in both types.

    The quadratic in one step is no matter of luck: it has no slack.
    """
    slack = 1.0 if steps == 1 else 1.5
    for dtype in (jnp.float64, jnp.float32):
        solved = solve(TOYS[toy], optgrad.create(name, **options), 100, dtype=dtype)
        assert solved.steps is not None
        assert solved.steps <= slack * steps
        assert cost is None or solved.cost <= slack * cost
        assert not (options.get("adaptive") and solved.increases)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "options"), [("newton", {}), ("damped_newton", {"damping": 0.5})])
def test_saddle_attracts(x64, name, options, dtype):
    """Acceptance test 3: from every start near it they end at the saddle."""
    solved = solve(TOYS["S2"], optgrad.create(name, **options), 100, dtype=jnp.dtype(dtype))
    assert solved.steps is None
    np.testing.assert_allclose(flat(solved.params), 0.0, atol=1e-6)


def escape(dtype, optimizer, start, steps):
    """Distances from the stable manifold of the saddle, before and after each step."""
    fn = TOYS["S2"].fn
    init, step = compiled(optimizer, fn)
    params = {"x": jnp.asarray(1.0, dtype), "y": jnp.asarray(start, dtype)}

    def body(carry, _):
        return step(*carry), carry[0]["y"]

    return jax.lax.scan(body, (params, init(params)), length=steps)[1]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_saddle_is_left(x64, dtype):
    """Acceptance test 3: at most 22 steps from 10⁻⁶, by doubling the distance in each of them."""
    optimizer = optgrad.saddle_free_newton(damping=0.0)
    solved = solve(TOYS["S6"], optimizer, 30, dtype=jnp.dtype(dtype))
    assert solved.steps <= 22
    distances = np.asarray(escape(jnp.dtype(dtype), optimizer, 1e-6, 18), np.float64)
    np.testing.assert_allclose(distances[1:] / distances[:-1], 2.0, rtol=0.03)
    # log₂ law: a start 64 times nearer takes 6 steps more.
    nearer = np.asarray(escape(jnp.dtype(dtype), optimizer, 1e-6 / 64, 24), np.float64)
    np.testing.assert_allclose(nearer[6:], distances, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_stable_manifold_is_not_left(x64, dtype):
    optimizer = optgrad.saddle_free_newton(damping=0.0)
    solved = solve(TOYS["S0"], optimizer, 100, dtype=jnp.dtype(dtype))
    assert solved.steps is None
    assert solved.params["y"] == 0

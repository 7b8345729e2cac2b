"""The safe line search: nothing foreign gets in, nothing worse comes out, all costs counted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.core import line_search
from optgrad.experiments.reproduce import survey_toys

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

SEARCHES = {
    "zoom": lambda: optax.scale_by_zoom_linesearch(20),
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(30, decrease_factor=0.5),
}
each_search = pytest.mark.parametrize("search", list(SEARCHES))


def rosenbrock(p):
    return 100.0 * (p["y"] - p["x"] ** 2) ** 2 + (1.0 - p["x"]) ** 2


def start(dtype=jnp.float32):
    return {"x": jnp.asarray(-1.2, dtype), "y": jnp.asarray(1.0, dtype)}


def safe(search="zoom", direction=None):
    return line_search.with_safe_linesearch(direction or optax.identity(), SEARCHES[search]())


def step(optimizer, params, state, value_fn=rosenbrock, **changes):
    value, grad = jax.value_and_grad(value_fn)(params)
    given = {"value": value, "grad": grad, "value_fn": value_fn} | changes
    return optimizer.update(given["grad"], state, params, **given)


def trace(optimizer, value_fn, params, steps, **each):
    """Values before each step, updates and states after each, in one scan; extras of each step."""

    def body(carry, extra):
        params, state = carry
        updates, state = step(optimizer, params, state, value_fn, **extra)
        return (optax.apply_updates(params, updates), state), (value_fn(params), updates, state)

    return jax.jit(lambda p: jax.lax.scan(body, (p, optimizer.init(p)), each, steps)[1])(params)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- what reaches the search -----------------------------------------------------------------


class Spy(NamedTuple):
    """A direction that wants an argument of its own."""

    seen: Any


def spying():
    def update(updates, state, params=None, *, residual_fn=None, value_fn=None, **extra):
        assert callable(value_fn)
        assert extra.keys() >= {"value", "grad"}
        return updates, Spy(state.seen + (residual_fn is not None))

    return optax.GradientTransformationExtraArgs(lambda _: Spy(jnp.int32(0)), update)


@each_search
def test_foreign_extras(search):
    """optax's searches raise for them; here the direction sees them and the search does not."""
    foreign = {"residual_fn": lambda p: p["x"], "object": object(), "batch": jnp.ones(3)}
    params = start()
    bare = optax.chain(optax.scale(-1.0), SEARCHES[search]())
    with pytest.raises(TypeError, match=r"Unexpected keyword|not consumed"):
        step(bare, params, bare.init(params), **foreign)
    optimizer = safe(search, spying())
    state = optimizer.init(params)
    updates, after = step(optimizer, params, state, **foreign)
    assert after.direction.seen == 1
    plain, other = step(optimizer, params, state)
    assert_same((updates, after.search), (plain, other.search))
    assert other.direction.seen == 0


@each_search
def test_same_steps_as_the_bare_search(search, x64):
    """Where nothing goes wrong the wrapper changes no number."""
    bare = optax.chain(optax.scale(-1.0), SEARCHES[search]())
    values, updates, _ = trace(safe(search), rosenbrock, start(jnp.float64), 20)
    expected = trace(bare, rosenbrock, start(jnp.float64), 20)
    np.testing.assert_allclose(values, expected[0], rtol=1e-8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected[1])


def test_schedule_of_the_search():
    """It is handed the number of steps so far, those not taken among them."""

    def at(count):
        return optax.scale_by_backtracking_linesearch(3, max_learning_rate=1.0 / (1.0 + count))

    optimizer = line_search.with_safe_linesearch(optax.identity(), at)
    params, lengths = jnp.array([5.0]), []
    state = optimizer.init(params)
    for t in range(4):
        broken = {"value": jnp.nan} if t == 1 else {}
        updates, state = step(optimizer, params, state, jnp.sum, **broken)
        lengths.append(-float(updates[0]))
    np.testing.assert_allclose(lengths, [1.0, 0.0, 1 / 3, 1 / 4], rtol=1e-6)
    assert (state.count, state.rejected) == (4, 1)


# --- no worse point --------------------------------------------------------------------------


def noisy():
    """A random direction, uphill as often as not, where the step's argument says so."""

    def update(updates, state, params=None, *, noise=0.0, **extra):
        del params, extra
        key = jax.random.PRNGKey((1e6 * noise).astype(jnp.int32))
        random = optax.tree.random_like(key, updates, jax.random.normal)
        found = jax.tree.map(lambda u, r: 1e-3 * u + (noise * r).astype(u.dtype), updates, random)
        return found, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def reckless(updates, state, params=None, **extra):
    """A search that triples its step whatever happens."""
    del params, extra
    found = jax.tree.map(lambda u: state["learning_rate"] * u, updates)
    return found, {"learning_rate": 3.0 * state["learning_rate"]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("search", [*SEARCHES, "three trials", "reckless"])
def test_never_increases(search, dtype, x64):
    found = {
        "zoom": SEARCHES["zoom"],
        "backtracking": lambda: optax.scale_by_backtracking_linesearch(9, decrease_factor=0.5),
        "three trials": lambda: optax.scale_by_zoom_linesearch(3, initial_guess_strategy="keep"),
        "reckless": lambda: optax.GradientTransformationExtraArgs(
            lambda _: {"learning_rate": jnp.float32(1e-4)}, reckless
        ),
    }[search]()
    direction = optax.identity() if search == "reckless" else noisy()
    optimizer = line_search.with_safe_linesearch(direction, found)
    noises = np.random.default_rng(0).choice([0.0, 1.0], 60) * np.linspace(0.5, 1.5, 60)
    values, updates, states = trace(
        optimizer, rosenbrock, start(dtype), 60, noise=jnp.asarray(noises, jnp.float32)
    )
    assert values.dtype == dtype
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 0.9 * values[0]
    refused = np.diff(states.rejected, prepend=0) == 1
    assert 0 < refused.sum() < 60  # both happen
    np.testing.assert_array_equal(states.count, np.arange(1, 61))
    for u in jax.tree.leaves(updates):
        np.testing.assert_array_equal(u[refused], 0.0)


@each_search
def test_refused_step(search):
    """Both states are as at the first step; counts and costs go on."""
    optimizer = safe(search, optax.chain(optax.trace(0.9), optax.scale(-1.0)))  # uphill
    params = start()
    fresh = optimizer.init(params)
    downhill = fresh._replace(  # as if there had been steps
        direction=jax.tree.map(lambda x: x + 1, fresh.direction),
        search=fresh.search._replace(learning_rate=jnp.float32(0.25)),
        cost=jnp.float32(7.0),
        count=jnp.int32(3),
    )
    updates, after = step(optimizer, params, downhill)
    assert not any(map(np.any, jax.tree.leaves(updates)))
    assert_same((after.direction, after.search), (fresh.direction, fresh.search))
    assert (after.count, after.rejected) == (4, 1)
    assert after.cost > 8


def test_escape_from_a_saddle_in_float32():
    """The search leaves the saddle with a step size of 2¹⁸, keeps it, and ends at 4·10¹⁹."""
    toy = survey_toys.TOYS["S6"]
    directions = functools.partial(optgrad.scale_by_nonlinear_cg, "pr+")
    search = functools.partial(
        optax.scale_by_zoom_linesearch, 20, curv_rtol=0.01, initial_guess_strategy="keep"
    )
    bare = optax.chain(directions(), optax.scale(-1.0), search())
    params = toy.params(jnp.float32)
    values, _, states = trace(bare, toy.fn, params, 6)
    assert np.max(values) > 1e19
    np.testing.assert_allclose(states[-1].learning_rate[1], 2.0**18, rtol=1e-5)
    optimizer = line_search.with_safe_linesearch(directions(), search())
    values, _, states = trace(optimizer, toy.fn, params, 6)
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_array_equal(states.rejected, [0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(values[2:4], -0.7973, atol=1e-3)
    assert values[5] < -1 + 1e-6


# --- numbers that are none -------------------------------------------------------------------


@each_search
@pytest.mark.parametrize(
    "where", ["value", "gradient", "everywhere", "elsewhere", "minus_inf", "inf"]
)
def test_non_finite(search, where):
    """A zero step, counted; the run goes on as from its beginning once they are finite again."""
    optimizer, params = safe(search, optax.trace(0.9)), start()
    fresh = optimizer.init(params)
    changes = {
        "value": {"value": jnp.nan},
        "gradient": {"grad": {"x": jnp.array(jnp.nan), "y": jnp.array(1.0)}},
        "everywhere": {"value_fn": lambda p: 0 * p["x"] + jnp.nan},
        "elsewhere": {  # a domain that is one point: the bare searches keep a step size of 0
            "value_fn": lambda p: jnp.where(p["x"] == params["x"], rosenbrock(p), jnp.nan)
        },
        "minus_inf": {"value": -jnp.inf},
        "inf": {"value": jnp.inf},
    }[where]
    updates, after = step(optimizer, params, fresh, **changes)
    assert not any(map(np.any, jax.tree.leaves(updates)))
    assert_same((after.direction, after.search), (fresh.direction, fresh.search))
    assert (after.count, after.rejected) == (1, 1)
    tried = where == "elsewhere"  # which is a search that failed, and shortens the next one
    assert after.failures == tried
    again, after = step(optimizer, params, after)
    expected, _ = step(optimizer, params, fresh._replace(failures=jnp.int32(tried)))
    assert_same(again, expected)
    assert after.rejected == 1


def full_step():
    return optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), lambda updates, state, params=None, **extra: (updates, state)
    )


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_non_finite_direction(number):
    """Not even where the loss is smallest at infinity."""
    broken = optax.stateless(lambda g, _: jax.tree.map(lambda x: x * number, g))
    optimizer, params = line_search.with_safe_linesearch(broken, full_step()), jnp.ones(2)
    state = optimizer.init(params)
    updates, after = step(optimizer, params, state, lambda x: jnp.exp(-jnp.sum(x * x)))
    assert not np.any(updates)
    assert after.rejected == 1


def test_direction_that_hides_the_gradient():
    """A direction of 0 for a gradient of NaN is no step that was taken."""
    hiding = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.nan_to_num(x, nan=0.0), g))
    optimizer, params = line_search.with_safe_linesearch(hiding, full_step()), jnp.ones(2)
    state = optimizer.init(params)
    updates, after = step(optimizer, params, state, jnp.sum, grad=params * jnp.nan)
    assert not np.any(updates)
    assert after.rejected == 1


def test_at_the_minimum():
    """A zero gradient is no failure."""
    optimizer, params = safe(), {"x": jnp.array(1.0), "y": jnp.array(1.0)}
    updates, after = step(optimizer, params, optimizer.init(params))
    assert not any(map(np.any, jax.tree.leaves(updates)))
    assert after.rejected == 0


# --- types and trees -------------------------------------------------------------------------

MIXED = {
    "narrow": (jnp.bfloat16, jnp.float16),
    "mixed": (jnp.bfloat16, jnp.float32),
    "with float64": (jnp.float32, jnp.float64),
}


@each_search
@pytest.mark.parametrize("types", list(MIXED))
def test_mixed_types(search, types, request):
    """The loss is only asked at parameters in their own types; the state is wide and fixed."""
    if types == "with float64":
        request.getfixturevalue("x64")
    first, second = MIXED[types]
    params = {"x": jnp.asarray([0.5, -1.5], first), "y": jnp.asarray(2.0, second)}

    def loss(p):
        assert (p["x"].dtype, p["y"].dtype) == (first, second)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
        return jnp.sum(wide["x"] ** 2) + (wide["y"] - wide["x"][0]) ** 2

    optimizer = safe(search)
    state = optimizer.init(params)
    values, updates, _ = trace(optimizer, loss, params, 8)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 1e-2 * values[0]
    _, after = jax.eval_shape(lambda p, s: step(optimizer, p, s, loss), params, state)
    types = [[(x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(s)] for s in (state, after)]
    assert types[0] == types[1]
    assert not any(weak for *_, weak in types[0])
    assert all(jnp.dtype(d).itemsize >= 4 for d, *_ in types[0])


@pytest.mark.parametrize("params", [{}, (None, {"a": optax.MaskedNode()})])
def test_trees_without_leaves(params):
    optimizer = safe()
    state = optimizer.init(params)
    updates, after = optimizer.update(
        params, state, params, value=1.0, grad=params, value_fn=lambda _: 1.0
    )
    assert updates == params
    assert_same(after, state)


@each_search
def test_one_compilation_and_donated_buffers(search):
    optimizer = safe(search, optax.trace(0.5))
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state):
        traces.append(search)
        updates, state = step(optimizer, params, state)
        return optax.apply_updates(params, updates), state

    params = start()
    state = optimizer.init(params)
    for _ in range(4):
        before = jax.tree.leaves((params, state.direction))
        params, state = run(params, state)
        assert all(x.is_deleted() for x in before)
    assert len(traces) == 1
    assert rosenbrock(params) < rosenbrock(start())


def test_mapped_runs():
    """vmap over starts is the loop over them."""
    optimizer = safe("zoom", optax.trace(0.9))
    starts = {"x": jnp.array([-1.2, 0.3, 2.0]), "y": jnp.array([1.0, 2.0, -1.0])}

    @jax.jit
    def values(params):
        def body(carry, _):
            params, state = carry
            updates, state = step(optimizer, params, state)
            return (optax.apply_updates(params, updates), state), rosenbrock(params)

        return jax.lax.scan(body, (params, optimizer.init(params)), None, 10)[1]

    mapped = jax.vmap(values)(starts)
    for i in range(3):
        expected = values(jax.tree.map(lambda x, i=i: x[i], starts))
        np.testing.assert_allclose(mapped[i], expected, rtol=1e-4)


# --- costs and diagnostics -------------------------------------------------------------------


class Priced(NamedTuple):
    cost: Any


def priced(cost):
    return optax.GradientTransformation(
        lambda _: Priced(jnp.float32(0.0)),
        lambda updates, state, params=None: (updates, Priced(state.cost + cost)),
    )


@pytest.mark.parametrize(
    ("search", "each", "own"),
    [("zoom", 1.0, 1.0), ("backtracking", 1 / 3, 1.0), ("zoom", 1.0, 5.0)],
)
def test_cost(search, each, own):
    """Evaluations are counted by the loss itself; the last one is of the point that is taken."""
    direction = optax.identity() if own == 1.0 else priced(own)
    optimizer = safe(search, direction)
    evaluations = []

    def counting(p):
        jax.debug.callback(lambda: evaluations.append(1))
        return rosenbrock(p)

    params, cost = start(), 0.0
    state = optimizer.init(params)
    value_and_grad = jax.jit(jax.value_and_grad(rosenbrock))
    for t in range(3):
        value, grad = value_and_grad(params)
        extra = {"value": jnp.nan if t == 1 else value, "grad": grad}  # one step is not taken
        evaluations.clear()
        updates, state = optimizer.update(grad, state, params, value_fn=counting, **extra)
        jax.effects_barrier()
        assert len(evaluations) > 1
        cost += own + each * (len(evaluations) - 1) + 1 / 3
        np.testing.assert_allclose(state.cost, cost, rtol=1e-5)
        params = optax.apply_updates(params, updates)
    assert state.rejected == 1


def test_diagnostics():
    """The search's, and the direction's own."""
    optimizer, params = safe("zoom", optgrad.scale_by_nonlinear_cg()), start()
    _, state = step(optimizer, params, optimizer.init(params))
    found = optgrad.diagnostics(state)
    assert found["steps_since_restart"] == 1
    assert found["step_size"] == state.search.learning_rate
    assert found["rejected_steps"] == 0
    assert found["gradient_equivalents"] == state.cost > 3  # not the direction's, which is 1
    reckless_state = line_search.with_safe_linesearch(
        optax.identity(), optax.with_extra_args_support(optax.identity())
    ).init(params)
    assert set(reckless_state.diagnostics()) == {"rejected_steps", "gradient_equivalents"}


def test_value_and_grad_from_state():
    """For a deterministic loss, what the search found is the next step's gradient."""
    optimizer, params = safe("zoom"), start()
    state = optimizer.init(params)
    from_state = optax.value_and_grad_from_state(rosenbrock)
    for _ in range(3):
        value, grad = from_state(params, state=state)
        np.testing.assert_allclose(value, rosenbrock(params), rtol=1e-5)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=rosenbrock
        )
        params = optax.apply_updates(params, updates)
    expected = jax.grad(rosenbrock)(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        state.search.grad,
        expected,
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("value", "value = None; accepted: the loss at params"),
        ("grad", r"grad = None; accepted: the gradient at params.*curvature_args"),
        ("value_fn", r"value_fn = None; accepted: a function of the parameters.*curvature_args"),
    ],
)
def test_missing_extras(missing, message):
    optimizer, params = safe(), start()
    given = {"value": 1.0, "grad": params, "value_fn": rosenbrock}
    del given[missing]
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, optimizer.init(params), params, **given)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(params, optimizer.init(params), **given)


# --- steep losses ----------------------------------------------------------------------------


def steep(p):
    """Its gradient is 1e8 long at (10, 10): a step size of 1 ends far beyond all sense."""
    return jnp.sum(1e4 * (p**4 - p)) + 1e4 * (p[0] - p[1]) ** 2


@pytest.mark.parametrize("name", ["nonlinear_cg", "bfgs"])
def test_a_first_step_that_is_much_too_long_is_followed_by_shorter_ones(name):
    optimizer = optgrad.create(name)
    extras = optgrad.curvature_args(lambda p, batch: steep(p))

    def body(carry, _):
        params, state = carry
        given = extras(params, None)
        updates, state = optimizer.update(given["grad"], state, params, **given)
        return (optax.apply_updates(params, updates), state), (given["value"], state.rejected)

    params = jnp.array([10.0, 11.0])
    first = (params, optimizer.init(params))
    values, rejected = jax.jit(lambda c: jax.lax.scan(body, c, None, 40)[1])(first)
    least = steep(jnp.full(2, 0.25 ** (1 / 3)))
    assert values[-1] - least < 1e-5 * abs(least)
    assert np.all(np.diff(rejected)[:3] == 0), "one failure is enough to find the scale"


@each_search
def test_after_failures_the_steps_are_shorter_and_the_step_size_is_the_directions_own(search):
    direction = optax.scale(1e12)  # 40 halvings of its step are still too long
    optimizer = safe(search, direction)
    params = {"x": jnp.asarray(3.0), "y": jnp.asarray(1.0)}
    fn = lambda p: p["x"] ** 2 + p["y"] ** 2  # noqa: E731
    state = optimizer.init(params)
    assert state.failures == 0
    updates, state = step(optimizer, params, state, fn)
    assert (state.failures, state.rejected) == (1, 1)
    assert not any(jax.tree.leaves(jax.tree.map(jnp.any, updates)))
    updates, state = step(optimizer, params, state, fn)
    assert (state.failures, state.rejected) == (0, 1)
    gradient = jax.grad(fn)(params)
    ratio = float(updates["x"] / (1e12 * gradient["x"]))
    np.testing.assert_allclose(-ratio, state.search.learning_rate, rtol=1e-5)

"""LossGrad against a transcription, in both modes, with and without rejection."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

from . import loss_runs as runs

MODES = ("value_fn", "next_value")


class Box:
    """Transcription of section 4.2 of the specification."""

    def __init__(self, h, c=1.05, reject=False, cap=np.inf):
        self.h, self.c, self.reject, self.cap = h, c, reject, cap
        self.rejected = 0

    def __call__(self, f, g, w, loss):
        h, n = self.h, g @ g
        after = loss(w - h * g)
        if self.reject and after > f:
            self.h = h / 2
            self.rejected += 1
            return np.zeros_like(g)
        r = (after - f + h * n) / (h * n + 1e-25)
        self.h = min(h * self.c if r < 0.5 else h / self.c, self.cap)
        return -h * g


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize(("h", "c"), [(0.01, 1.05), (6.0, 1.2), (1.0, 1.01)])
def test_follows_the_specification(x64, h, c, reject, noise):
    # Later the loss changes by its rounding only, which decides about growth.
    steps = 100 if noise else 60
    box = Box(h, c, reject)
    optimizer = optgrad.lossgrad(h, c=c, reject=reject)
    state = runs.assert_follows(optimizer, box, noise=noise, steps=steps)
    np.testing.assert_allclose(h * state.factor, box.h, rtol=1e-10)
    assert state.rejected == box.rejected
    assert box.rejected > 0 or not (reject and h == 6.0)


@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize("h", [0.01, 6.0, 50.0])
def test_next_value_follows_value_fn(x64, h, reject):
    """On one loss for all steps, both try the same points; nothing is evaluated for the second."""
    box, single, steps = Box(h, reject=reject), runs.quadratic(0.0), 30
    tried, w = [], single.start
    for _ in range(steps):
        g, length = single.gradient(w, 0), box.h
        w = w + box(single.value(w, 0), g, w, lambda x: single.value(x, 0))
        tried.append(w if not reject else None)
        if reject:  # the point that was tried, whether it was accepted or not
            before = w + length * g if box.h != length / 2 else w
            tried[-1] = before - length * g
    optimizer = optgrad.lossgrad(h, evaluation="next_value", reject=reject)
    actual, state = runs.run(optimizer, single, steps)
    np.testing.assert_allclose(actual, tried, rtol=1e-9, atol=1e-10)
    assert abs(int(state.rejected) - box.rejected) <= 1  # the last one is not judged yet
    assert box.rejected > 0 or not (reject and h > 3)


def test_vectors_in_the_state():
    """Only what may be taken back later is kept."""
    params = jnp.zeros(7)
    for mode, reject in itertools.product(MODES, (False, True)):
        state = optgrad.lossgrad(evaluation=mode, reject=reject).init(params)
        vectors = [x for x in jax.tree.leaves(state) if x.shape]
        assert len(vectors) == (mode == "next_value" and reject)


def test_minimum_of_the_parabola(x64):
    """r = ½ is where h is 1/λ: from both sides h ends within a factor c of it."""

    def loss(w):
        return 2.0 * w @ w

    w = jnp.array([1e3])
    for start in (0.01, 1.9):
        optimizer = optgrad.lossgrad(start)
        state = optimizer.init(w)
        update = jax.jit(lambda s, o=optimizer: o.update(4 * w, s, w, value=loss(w), value_fn=loss))
        for _ in range(100):
            _, state = update(state)
        assert 1 / 1.06 < 4 * float(start * state.factor) < 1.06


def test_a_nan_shrinks_the_step():
    """And is not stepped into, with or without `reject`; the authors' comparison lets h grow."""
    for reject, bad in itertools.product((False, True), (jnp.nan, jnp.inf, -jnp.inf)):
        optimizer = optgrad.lossgrad(0.5, reject=reject)
        updates, state = judged(optimizer, bad)
        if reject and bad == -jnp.inf:  # it is smaller
            continue
        assert not np.any(updates)
        assert (state.count, state.rejected, state.skipped) == (1, 1, 0)
        np.testing.assert_allclose(state.factor, 0.5)


def judged(optimizer, after, value=1.0, gradient=2.0):
    w = jnp.ones(1)
    return optimizer.update(
        jnp.array([gradient]), optimizer.init(w), w, value=value, value_fn=lambda _: after
    )


@pytest.mark.parametrize(
    ("after", "reject", "factor", "moves"),
    [
        (-0.1, False, 1.05, True),  # fell by 1.1 of the 2 that the tangent promised
        (0.1, False, 1 / 1.05, True),  # fell by 0.9
        (0.0, False, 1 / 1.05, True),  # r = ½ exactly
        (1.0, False, 1 / 1.05, True),
        (1.5, False, 1 / 1.05, True),
        (0.1, True, 1 / 1.05, True),
        (1.0, True, 1 / 1.05, True),  # no larger
        (1.5, True, 0.5, False),
    ],
)
def test_judgements(after, reject, factor, moves):
    updates, state = judged(optgrad.lossgrad(0.5, reject=reject), after)
    np.testing.assert_allclose(state.factor, factor, rtol=1e-6)
    np.testing.assert_allclose(updates, [-1.0 if moves else 0.0])
    np.testing.assert_allclose(state.step_size, 0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize(("gradient", "value"), [(2.0, np.nan), (2.0, np.inf), (np.nan, 1.0)])
def test_what_is_not_finite_at_first(mode, reject, gradient, value):
    """No step, and nothing is remembered but that."""
    optimizer = optgrad.lossgrad(0.5, evaluation=mode, reject=reject)
    w = jnp.ones(1)
    before = optimizer.init(w)
    updates, after = optimizer.update(
        jnp.array([gradient]), before, w, value=value, value_fn=jnp.sum
    )
    assert not np.any(updates)
    jax.tree.map(np.testing.assert_array_equal, after, before._replace(skipped=jnp.int32(1)))


@pytest.mark.parametrize(("gradient", "value"), [(3.0, np.nan), (3.0, 9.0), (np.nan, 0.1)])
def test_way_back(gradient, value):
    """In "next_value" mode a bad step is undone and retried at half its length, in one update."""
    optimizer = optgrad.lossgrad(0.5, evaluation="next_value", reject=True)
    w = jnp.array([1.0])
    updates, state = optimizer.update(jnp.array([2.0]), optimizer.init(w), w, value=1.0)
    np.testing.assert_allclose(updates, [-1.0])
    updates, state = optimizer.update(jnp.array([gradient]), state, w, value=value)
    np.testing.assert_allclose(updates, [0.5])  # 1 − ¼·2, from 0
    assert (state.count, state.rejected, state.skipped) == (2, 1, 0)
    assert (state.value, state.gradient[0], state.step_size) == (1.0, 2.0, 0.25)
    updates, state = optimizer.update(jnp.array([1.0]), state, w, value=0.1)
    np.testing.assert_allclose(updates, [-0.25 * 1.05], rtol=1e-6)
    assert state.rejected == 1


def test_without_a_way_back():
    """Without `reject`, a loss that is not finite stops the run where it is."""
    optimizer = optgrad.lossgrad(0.5, evaluation="next_value")
    w = jnp.array([1.0])
    _, state = optimizer.update(jnp.array([2.0]), optimizer.init(w), w, value=1.0)
    updates, after = optimizer.update(jnp.array([2.0]), state, w, value=np.nan)
    assert not np.any(updates)
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(skipped=jnp.int32(1)))


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_keep_the_step_size(mode):
    """By the formula h grows 5 % in each, without bound."""
    optimizer = optgrad.lossgrad(0.5, evaluation=mode)

    def body(carry, gradient):
        w, state = carry
        updates, state = optimizer.update(
            gradient[None], state, w, value=1.0, value_fn=lambda _: jnp.float32(1.0)
        )
        return (w + updates, state), state.step_size

    w = jnp.ones(1)
    gradients = jnp.zeros(3000).at[-1].set(1.0)
    (w, _), lengths = jax.lax.scan(body, (w, optimizer.init(w)), gradients)
    np.testing.assert_allclose(lengths, 0.5)
    np.testing.assert_allclose(w, 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_step_size_stays_a_number(mode):
    """Linear losses let it grow, constant ones shrink, for thousands of steps, and back."""
    optimizer = optgrad.lossgrad(1.0, evaluation=mode, c=1.5)

    def body(carry, slope):
        total, state = carry
        gradient = jnp.array([1.0])
        promise = state.factor  # h·‖g‖², as long as h₀ = 1
        updates, state = optimizer.update(
            gradient,
            state,
            gradient,
            value=total,
            value_fn=lambda _: total - slope * promise,
        )
        return (total - slope * state.step_size, state), (updates, state.factor)

    slopes = jnp.repeat(jnp.array([1.0, 0.0, 1.0]), 1000)
    start = (jnp.float32(0.0), optimizer.init(jnp.zeros(1)))
    _, (updates, factors) = jax.lax.scan(body, start, slopes)
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(factors))
    assert np.all(factors > 0)


def test_step_size_survives_rejections():
    """However many there are, h is not 0, from which it could not grow."""
    optimizer, w = optgrad.lossgrad(1e-5, reject=True), jnp.ones(1)

    def body(state, _):
        extra = {"value": 1.0, "value_fn": lambda _: jnp.float32(2.0)}
        return optimizer.update(w, state, w, **extra)[1], None

    state, _ = jax.lax.scan(body, optimizer.init(w), None, length=500)
    assert state.rejected == 500
    assert 0 < state.step_size < 1e-30


@pytest.mark.parametrize("mode", MODES)
def test_cap(x64, mode):
    """The step size stays at the cap, and leaves it at once where the loss rises."""
    optimizer = optgrad.lossgrad(0.1, evaluation=mode, reject=True, max_step_size=0.3)
    single = runs.quadratic(0.0)
    if mode == "value_fn":
        runs.assert_follows(optimizer, Box(0.1, reject=True, cap=0.3), noise=0.0, steps=60)
    _, state = runs.run(optimizer, single, 60)
    np.testing.assert_allclose(state.step_size, 0.3)
    assert not state.rejected
    params = runs.split(jnp.ones(runs.SIZE))
    gradient = jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        extra = {"value": 1e3, "value_fn": lambda _: jnp.inf}
        _, state = optimizer.update(gradient, state, params, **extra)
    assert 0.1 * float(state.factor) <= 0.0751


def test_initial_step_size_multiplies():
    """A schedule of it scales what has been learnt."""
    optimizer = optgrad.lossgrad(lambda count: 0.5 + count)
    w = jnp.ones(1)
    state = optimizer.init(w)
    lengths = []
    for _ in range(3):
        updates, state = optimizer.update(w, state, w, value=1.0, value_fn=lambda _: -1e6)
        lengths.append(-float(updates[0]))
    np.testing.assert_allclose(lengths, [0.5, 1.5 * 1.05, 2.5 * 1.05**2], rtol=1e-6)


def test_diagnostics():
    _, state = judged(optgrad.lossgrad(0.5, reject=True), 5.0)
    found = optgrad.diagnostics(state)
    expected = {"step_size": 0.5, "rejected_steps": 1, "skipped_steps": 0}
    assert {key: float(x) for key, x in found.items()} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_step_size": 0.0}, "initial_step_size = 0.0"),
        ({"c": 1.0}, "c = 1.0"),
        ({"evaluation": "value"}, "evaluation = 'value' .* did you mean 'value_fn'"),
        ({"max_step_size": 0.0}, "max_step_size = 0.0"),
        ({"epsilon": -1.0}, "epsilon = -1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.lossgrad(**arguments)


def test_missing_extras():
    optimizer, w = optgrad.lossgrad(), jnp.ones(1)
    state = optimizer.init(w)
    with pytest.raises(ValueError, match="value = None; accepted: the loss at params"):
        optimizer.update(w, state, w, value_fn=jnp.sum)
    with pytest.raises(ValueError, match=r"value_fn = None; accepted: a function.*next_value"):
        optimizer.update(w, state, w, value=1.0)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(w, state, value=1.0, value_fn=jnp.sum)
    cheap = optgrad.lossgrad(evaluation="next_value")
    cheap.update(w, cheap.init(w), value=1.0)  # needs neither


# --- the specification's numbers -------------------------------------------------------------


def test_diverges_on_rosenbrock(x64):
    """For all nine settings: h shrinks by a factor c at most, after steps that are always taken."""

    def run(h, c):
        return runs.trace_rosenbrock(optgrad.lossgrad(h, c=c), 2000)[0]

    settings = jnp.array(list(itertools.product((1e-5, 1e-4, 1e-3), (1.01, 1.05, 1.2))))
    values = np.asarray(jax.jit(jax.vmap(run))(*settings.T))
    assert np.all(~(values < 1e3))


@pytest.mark.parametrize("mode", MODES)
def test_rejection_solves_rosenbrock(x64, mode):
    """3e-17 to 7e-17 after 20,000 steps, from 1e-5 to 1."""

    def run(h):
        return runs.trace_rosenbrock(optgrad.lossgrad(h, evaluation=mode, reject=True), 20_000)[0]

    values = np.asarray(jax.jit(jax.vmap(run))(jnp.array([1e-5, 1e-3, 1.0])))
    assert np.all((values > 2e-17) & (values < 9e-17))

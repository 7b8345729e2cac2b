"""Polyak's step size against its formula, and what optax makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import loss_runs as runs


def box(f_min=0.0, s=1.0, cap=np.inf):
    """Transcription: −s·min(max(f − f*, 0)/‖g‖², γ_max)·g."""

    def step(f, g, w, loss):
        del w, loss
        n = g @ g
        return -s * min(max(f - f_min, 0.0) / n, cap) * g if n else np.zeros_like(g)

    return step


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("f_min", "s", "cap"),
    [(runs.OFFSET, 1.0, None), (runs.OFFSET, 1.7, 0.4), (0.0, 0.5, 2.0), (0.25, 1.0, 1.0)],
)
def test_follows_the_formula(x64, noise, f_min, s, cap):
    optimizer = optgrad.polyak(f_min, scaling=s, max_learning_rate=cap)
    expected = box(f_min, s, np.inf if cap is None else cap)
    steps = runs.STEPS if noise else 35  # then f − f* is rounding, which the norm amplifies
    state = runs.assert_follows(optimizer, expected, noise=noise, steps=steps)
    assert state.count == steps
    assert state.skipped == 0


def test_scaling_scales_and_that_of_optax_does_not():
    """Twice the scaling is twice the step; `optax.polyak_sgd` takes half of it."""
    gradient, value = [3.0, -4.0], 2.0

    def update(make, **arguments):
        return runs.one_step(make(**arguments), gradient, value)[0]

    for s in (0.5, 2.0, 8.0):
        ours = update(optgrad.polyak, scaling=s)
        np.testing.assert_allclose(ours, -s * 2.0 / 25 * np.array(gradient), rtol=1e-6)
        # The cap is far away. Should this fail, optax has been corrected: drop the warnings.
        theirs = update(optax.polyak_sgd, scaling=s, max_learning_rate=1e6)
        np.testing.assert_allclose(theirs, -2.0 / 25 / s * np.array(gradient), rtol=1e-6)
        baseline = update(optgrad.get_method("polyak_sgd").factory, scaling=s)
        np.testing.assert_allclose(baseline, theirs, rtol=1e-6)
        capped = {"scaling": s, "max_learning_rate": 1e-3}  # there s is right in both
        theirs = update(optax.polyak_sgd, **capped)
        np.testing.assert_allclose(update(optgrad.polyak, **capped), theirs, rtol=1e-6)


def test_without_scaling_it_is_optax(x64):
    """With s = 1 and a loss above f*, step by step."""
    ours, _ = runs.run(optgrad.polyak(max_learning_rate=0.7), runs.quadratic())
    theirs, _ = runs.run(optax.polyak_sgd(max_learning_rate=0.7), runs.quadratic())
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(("s", "remains"), [(1.0, 0.5), (2.0, 0.0)])
def test_half_of_the_optimal_step(s, remains):
    """On an isotropic quadratic s = 2 is exact, s = 1 goes half the way."""
    w = jnp.array([1.0, -2.0, 0.5])
    updates, _ = runs.one_step(optgrad.polyak(3.0, scaling=s), 4 * w, 3.0 + 2 * w @ w)
    np.testing.assert_allclose(w + updates, remains * w, atol=1e-6)


def test_distance_never_increases(x64):
    """With the true f* of a convex function, whatever its condition."""
    single = runs.quadratic(0.0)
    path, _ = runs.run(optgrad.polyak(runs.OFFSET), single)
    distance = np.linalg.norm(np.vstack([single.start, path]), axis=1)
    moving = distance[:-1] > 1e-7
    assert np.sum(moving) > 30
    assert np.all(np.diff(distance)[moving] < 0)


def test_no_threshold(x64):
    """A gradient of 1e-9 is one like another; optax returns 0 for it, in float64 too."""
    gradient, value = [1e-9, 0.0], 1e-18
    updates, _ = runs.one_step(optgrad.polyak(), gradient, value)
    np.testing.assert_allclose(updates, [-1e-9, 0.0], rtol=1e-12)
    assert not np.any(runs.one_step(optax.polyak_sgd(), gradient, value)[0])


def test_loss_below_f_min():
    """No step, where optax' default goes uphill."""
    gradient = [1.0, 1.0]
    updates, state = runs.one_step(optgrad.polyak(2.0), gradient, 1.5)
    assert not np.any(updates)
    assert (state.count, state.skipped) == (1, 0)
    assert np.all(runs.one_step(optax.polyak_sgd(f_min=2.0), gradient, 1.5)[0] > 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_loss_that_is_not_finite(value):
    """Nothing moves, nothing is remembered, one step is counted as skipped."""
    optimizer = optgrad.polyak()
    _, before = runs.one_step(optimizer, [1.0, 2.0], 1.0)
    updates, after = runs.one_step(optimizer, [1.0, 2.0], value, state=before)
    assert not np.any(updates)
    assert after == before._replace(skipped=1)


@pytest.mark.parametrize("entry", [np.nan, np.inf, 1e30])
def test_gradient_without_a_norm(entry):
    """NaN, infinite, or with a square that overflows."""
    updates, state = runs.one_step(optgrad.polyak(), [entry, 1.0], 1.0)
    assert not np.any(updates)
    assert (state.count, state.skipped) == (0, 1)


def test_quotient_that_overflows():
    """100/4e-38 is no float32; the step is long but finite, and 0 stays 0."""
    updates, state = runs.one_step(optgrad.polyak(), [2e-19, 0.0], 100.0)
    assert np.all(np.isfinite(updates))
    assert updates[0] < -1e19
    assert updates[1] == 0
    assert np.isfinite(state.step_size)
    updates, _ = runs.one_step(optgrad.polyak(scaling=0.0), [2e-19, 0.0], 100.0)
    assert not np.any(updates)  # not 0 times infinity


def test_schedules():
    """Each argument is one of the number of steps taken; skipped steps do not count."""
    optimizer = optgrad.polyak(
        lambda count: 1.0 * count,
        scaling=lambda count: 1.0 + count,
        max_learning_rate=lambda count: 10.0 - 9.9 * count,
    )
    state, lengths = optimizer.init(jnp.zeros(1)), []
    for value in (4.0, np.nan, 4.0):
        updates, state = runs.one_step(optimizer, [2.0], value, state=state)
        lengths.append(-float(updates[0]) / 2)
    np.testing.assert_allclose(lengths, [1.0, 0.0, 0.2], rtol=1e-5)


def test_diagnostics():
    """The last step size that was not 0."""
    optimizer = optgrad.polyak()
    _, state = runs.one_step(optimizer, [2.0], 1.0)
    _, state = runs.one_step(optimizer, [0.0], 1.0, state=state)
    _, state = runs.one_step(optimizer, [0.0], np.nan, state=state)
    found = optgrad.diagnostics(state)
    assert {key: float(x) for key, x in found.items()} == {"step_size": 0.25, "skipped_steps": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": -1.0}, "scaling = -1.0"),
        ({"max_learning_rate": 0.0}, "max_learning_rate = 0.0"),
        ({"f_min": np.nan}, "f_min = nan"),
        ({"f_min": np.inf}, "f_min = inf"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.polyak(**arguments)


def test_wrong_value():
    with pytest.raises(ValueError, match="value = None; accepted: the loss at params"):
        runs.one_step(optgrad.polyak(), [1.0], None)
    with pytest.raises(ValueError, match=r"value has the shape \(3,\); accepted: a scalar"):
        runs.one_step(optgrad.polyak(), [1.0], jnp.ones(3))


def test_value_of_any_type():
    """A Python number, a NumPy scalar, a bfloat16."""
    for value in (2, 2.0, np.float64(2), jnp.bfloat16(2)):
        updates, _ = jax.jit(lambda v: runs.one_step(optgrad.polyak(), [2.0], v))(value)
        np.testing.assert_allclose(updates, [-1.0])


def test_rosenbrock(x64):
    """The specification's 9e-29 after 20,000 steps."""
    assert runs.on_rosenbrock(optgrad.polyak())[0] == pytest.approx(9e-29, rel=0.1)

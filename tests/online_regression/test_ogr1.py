"""ogr1d, ogr1ds and ogr1dc on given sequences: Algorithms 1–7 and every rule, step by step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optgrad

from . import boxes
from .trajectories import (
    NAMES,
    RULES,
    RUNS,
    WARMUP,
    error,
    of_box,
    row,
    run_given,
    sequence,
    settings_of,
    static_of,
    updates_of,
    updates_of_runs,
)


def stages(name):
    return {"ogr1d": (None,), "ogr1ds": (2, 5), "ogr1dc": (1, 3)}[name]


def box_cases():
    """Every rule at the first length of a stage, the paper's at the others, in both presets.

    In the paper's preset ogr1d and ogr1ds have every second rule: one compilation each.
    """
    found = []
    for name, paper in itertools.product(NAMES, (False, True)):
        for i, stage in enumerate(stages(name)):
            rules = RULES[:1] if i else RULES[::2] if paper and name != "ogr1dc" else RULES
            for step, sign in rules:
                static = {"step": step, "negative_curvature": sign, "warmup_steps": WARMUP}
                if stage is not None:
                    static["stage_steps"] = stage
                label = [name, step, sign, "paper" if paper else "robust", str(stage or "")]
                found.append(pytest.param(name, {**static, "paper": paper}, id="-".join(label)))
    return found


@pytest.mark.parametrize(("name", "static"), box_cases())
def test_follows_the_box(x64, name, static):
    positions, gradients = sequence()
    settings = settings_of(static["paper"])
    ours = updates_of_runs(name, positions, gradients, settings, **static)
    for i in range(RUNS):
        options = {**row(settings, i), **static}
        expected = of_box(boxes.BOXES[name], positions, gradients, **options)
        assert error(ours[i], expected) < 1e-10, row(settings, i)


@functools.cache
def default_runs(name):
    """Updates with the default rule, robust, stages of 3; one compilation for several tests."""
    static = static_of(name)
    return static, updates_of_runs(name, *sequence(), settings_of(False), **static)


def wrong_cases():
    return [(name, port) for name in NAMES for port in boxes.WRONG_PORTS[name]]


@pytest.mark.parametrize(("name", "port"), wrong_cases())
def test_wrong_ports_do_not_pass(x64, name, port):
    """What the errata mend, and what is easily changed by mistake, shows in these runs."""
    static, ours = default_runs(name)
    worst = 0.0
    for i in range(RUNS):
        options = {**row(settings_of(False), i), **static}
        expected = of_box(boxes.BOXES[name], *sequence(), **options)
        assert error(ours[i], expected) < 1e-10
        wrong = of_box(boxes.WRONG_PORTS[name][port], *sequence(), **options)
        worst = max(worst, error(ours[i], wrong))
    assert worst > 1e-3


CHANGES = [
    *(("lr_max", 1e9), ("clip_sigmas", 1e9), ("epsilon", 1e9), ("beta", 0.95), ("gamma", 0.95)),
    *(("alpha", 0.45), ("eta", 0.11), ("step", "last_point"), ("step", "sigma_ratio")),
    *(("negative_curvature", "gradient_descent"), ("negative_curvature", "tanh")),
    *(("warmup_steps", WARMUP + 1), ("stage_steps", 2), ("paper", True)),
]


@pytest.mark.parametrize(
    ("name", "changed", "value"),
    [(name, *x) for name in NAMES for x in CHANGES if (name, x[0]) != ("ogr1d", "stage_steps")],
)
def test_every_option_matters_in_these_runs(x64, name, changed, value):
    static, ours = default_runs(name)
    errors = []
    for i in range(RUNS):
        options = {**row(settings_of(False), i), **static, changed: value}
        errors.append(error(ours[i], of_box(boxes.BOXES[name], *sequence(), **options)))
    assert max(errors) > 1e-3


@pytest.mark.parametrize("guard", ["clip_sigmas", "lr_max"])
def test_infinite_guards_are_off(x64, guard):
    positions, gradients = sequence()
    options = {"eta": 0.1, "epsilon": 3.0, "gamma": 0.9, "warmup_steps": WARMUP}
    finite = {"clip_sigmas": 0.5, "lr_max": 0.5}
    ours = run_given(optgrad.ogr1dc(**options, **{**finite, guard: np.inf}), positions, gradients)
    expected = of_box(boxes.Ogr1dc, positions, gradients, **options, **{**finite, guard: 1e99})
    assert error(ours, expected) < 1e-10
    assert error(ours, of_box(boxes.Ogr1dc, positions, gradients, **options, **finite)) > 1e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_central_statistics_are_algorithm_7s(x64, stage):
    """Algorithm 7 literally but for its shift by s·Δ; weights that sum to as little as 0.01."""
    positions, gradients = sequence()
    options = {"eta": 0.1, "beta": 0.99, "warmup_steps": 5, "stage_steps": stage}
    states = jax.jit(lambda x, g: updates_of(optgrad.ogr1dc(gamma=0.8, **options), x, g)[1].model)(
        positions, gradients
    )
    box = boxes.Ogr1dc(boxes.Options(gamma=0.8, **options))
    for t, sample in enumerate(zip(positions, gradients, strict=True)):
        box(*sample)
        if t <= 5:  # one sample has no parabola
            continue
        ours, avg = jax.tree.map(lambda x, t=t: x[t], states), box.avg
        expected = [avg.mean_gradient, avg.variance, avg.covariance, avg.gradient_variance]
        np.testing.assert_allclose(ours[1:], np.array(expected, float), rtol=0, atol=1e-12)
        # In the warm-up the box has not yet moved its origin.
        if t >= 10:
            np.testing.assert_allclose(ours[0], float(avg.mean_position), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("step", "sign"), RULES[:-1])
def test_rates_at_every_curvature(x64, step, sign):
    """On an exact line g = 1 + λx all ways to p agree: the step is −α·rate(λ)·g(x)."""
    lr_max, alpha, eta = 0.05, 0.7, 0.01
    positions = np.cumsum(np.random.default_rng(0).normal(size=(20, 1)), axis=0) * 0.1
    curvatures = np.array([0.0, 1e-12, 1e-7, -1e-7, 1e-3, -1e-3, 1.0, -1.0, 30.0, -30.0])

    def run(curvature):
        optimizer = optgrad.ogr1dc(
            *(eta, alpha),
            **{"epsilon": 1e9, "clip_sigmas": 1e9, "lr_max": lr_max, "warmup_steps": 3},
            **{"step": step, "negative_curvature": sign},
        )
        return updates_of(optimizer, positions, 1 + curvature * positions)[0][6:, 0]

    ours = jax.jit(jax.vmap(run))(curvatures)
    for curvature, found in zip(curvatures, ours, strict=True):
        gradient = 1 + curvature * positions[6:, 0]
        if sign == "gradient_descent" and abs(curvature) < 1e-9:
            continue  # the sign of λ is that of rounding
        if sign == "tanh":
            ratio = np.tanh(curvature * lr_max) / curvature if curvature else lr_max
            expected = -alpha * ratio * gradient
        elif sign == "gradient_descent" and curvature < 0:
            expected = -eta * gradient
        elif step == "last_point" or abs(curvature) > 1 / lr_max:
            expected = -alpha * min(lr_max, 1 / max(abs(curvature), 1e-99)) * gradient
        else:  # p from the averages with |λ| replaced by 1/lr_max: not a multiple of g(x)
            assert np.all(np.isfinite(found))
            continue
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- direction and positions -----------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_direction_does_not_contain_the_current_gradient(x64, name, stage):
    """η = 0 leaves the step along v̂ alone; its line is the same whatever the newest gradient."""
    positions, gradients = sequence()
    static = {"ogr1d": {}, "ogr1ds": {"stage_steps": stage + 1}, "ogr1dc": {"stage_steps": stage}}
    optimizer = getattr(optgrad, name)(0.0, gamma=0.5, warmup_steps=WARMUP, **static[name])
    lines = []
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=gradients.shape)
        for last in range(2 * WARMUP + 6, 2 * WARMUP + 12):
            changed = gradients.copy()
            changed[last] += noise[last]
            lines.append((last, run_given(optimizer, positions, changed)[last]))
    for last in range(2 * WARMUP + 6, 2 * WARMUP + 12):
        same = np.stack([u / np.linalg.norm(u) for t, u in lines if t == last])
        np.testing.assert_allclose(np.abs(same @ same[0]), 1.0, atol=1e-12)


def test_only_centred_rotations_are_independent_of_the_origin(x64):
    positions, gradients = sequence()
    for name, expected in (("ogr1dc", True), ("ogr1d", False)):
        optimizer = getattr(optgrad, name)(0.1, gamma=0.5, warmup_steps=WARMUP)
        here, there = (run_given(optimizer, x, gradients) for x in (positions, positions + 30))
        assert (error(there, here) < 1e-10) == expected, name


def test_float32_far_from_the_origin():
    """OGR1dc measures differences of parameters, which float32 has exactly."""
    positions, gradients = (np.float32(x) for x in sequence())
    positions = np.float32(positions * 1e-3 + 100)
    run = of_box(boxes.Ogr1dc, positions, gradients, eta=0.1, gamma=0.5, warmup_steps=WARMUP)
    ours = run_given(optgrad.ogr1dc(0.1, gamma=0.5, warmup_steps=WARMUP), positions, gradients)
    assert error(ours, run) < 1e-3


def test_trusted_positions_save_a_vector_and_see_gradients_only(x64):
    positions, gradients = sequence()
    optimizer = optgrad.ogr1dc(0.1, gamma=0.5, position="trusted", warmup_steps=WARMUP)
    assert optimizer.init(positions[0]).origin is None
    elsewhere = np.random.default_rng(3).normal(size=positions.shape)
    np.testing.assert_array_equal(
        run_given(optimizer, positions, gradients), run_given(optimizer, elsewhere, gradients)
    )


@pytest.mark.parametrize("name", NAMES)
def test_parameters_set_from_outside(x64, name):
    """A jump is one far position: the box says the same, and the next steps forget it."""
    positions, gradients = sequence(seed=2)
    positions[40:] += 25.0
    static = static_of(name)
    options = {"eta": 0.1, "gamma": 0.9, **static}
    ours = run_given(getattr(optgrad, name)(**options), positions, gradients)
    assert error(ours, of_box(boxes.BOXES[name], positions, gradients, **options)) < 1e-10


# --- trees, types, devices -----------------------------------------------------------------------

SPLIT = {"a": slice(0, 2), "b": slice(2, 5)}


def tree_of(x):
    """(T, 5) as a tree of (T, 2) and (T, 3, 1)."""
    return {"a": x[:, SPLIT["a"]], "b": x[:, SPLIT["b"], None]}


@pytest.mark.parametrize("name", NAMES)
def test_one_direction_per_tensor_or_for_the_tree(x64, name):
    positions, gradients = sequence()
    static = static_of(name)
    options = {"eta": 0.1, "gamma": 0.9, **static}
    for per_tensor in (False, True):
        optimizer = getattr(optgrad, name)(per_tensor=per_tensor, **options)
        ours, states = jax.jit(lambda x, g, o=optimizer: updates_of(o, x, g))(
            tree_of(positions), tree_of(gradients)
        )
        parts = SPLIT.values() if per_tensor else [slice(None)]
        expected = np.concatenate(
            [of_box(boxes.BOXES[name], positions[:, i], gradients[:, i], **options) for i in parts],
            axis=1,
        )
        assert error(np.concatenate([ours["a"], ours["b"][..., 0]], axis=1), expected) < 1e-10
        shape = (len(positions), 2) if per_tensor else (len(positions),)
        assert {x.shape for x in states.diagnostics().values()} == {shape}


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_parameters_have_float32_statistics(name):
    positions, gradients = (jnp.asarray(x, jnp.bfloat16) for x in sequence())
    wide = [np.asarray(x, np.float64) for x in (positions, gradients)]
    options = {"eta": 0.1, "gamma": 0.9, **static_of(name)}
    ours, states = updates_of(getattr(optgrad, name)(**options), positions, gradients)
    assert ours.dtype == jnp.bfloat16
    assert states.momentum.dtype == states.direction.dtype == jnp.float32
    assert {x.dtype for x in states.model} == {jnp.dtype(jnp.float32)}
    # The updates are rounded to 8 bits, nothing else is.
    assert error(ours, of_box(boxes.BOXES[name], *wide, **options)) < 2**-8
    narrow = getattr(optgrad, name)(state_dtype=jnp.bfloat16, **options).init(positions[0])
    assert narrow.momentum.dtype == narrow.direction.dtype == jnp.bfloat16
    assert narrow.model.covariance.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_scalars_of_sharded_parameters(name):
    """Eight devices: the dot products are those of one, up to the order of a float32 sum."""
    devices = jax.devices("cpu")
    assert len(devices) >= 8, "tests/conftest.py sets XLA_FLAGS before jax starts"
    positions, gradients = (np.float32(x) for x in sequence(length=24, size=64))
    optimizer = getattr(optgrad, name)(0.1, gamma=0.9, **static_of(name))
    run = jax.jit(lambda x, g: updates_of(optimizer, x, g))
    mesh = Mesh(np.array(devices[:8]), ("x",))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    expected, one = run(positions, gradients)
    ours, eight = run(*(jax.device_put(x, split) for x in (positions, gradients)))
    assert error(ours, expected) < 1e-4
    for a, b in zip(jax.tree.leaves(eight.model), jax.tree.leaves(one.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- introspection and bad input -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_diagnostics_within_a_scan(x64, name):
    """The parabola of the box, at every step of a run."""
    positions, gradients = sequence()
    static = static_of(name)
    optimizer = optax.chain(getattr(optgrad, name)(0.1, gamma=0.9, **static), optax.scale(1.0))

    def step(state, sample):
        position, gradient = sample
        updates, state = optimizer.update(gradient, state, position)
        return state, (updates, optgrad.diagnostics(state))

    start = optimizer.init(positions[0])
    assert np.all(np.isfinite(list(optgrad.diagnostics(start).values())))
    updates, found = jax.lax.scan(step, start, (positions, gradients))[1]
    box = boxes.BOXES[name](boxes.Options(0.1, gamma=0.9, **static))
    for t, sample in enumerate(zip(positions, gradients, strict=True)):
        box(*sample)
        entries = {key: float(value[t]) for key, value in found.items()}
        assert np.all(np.isfinite(list(entries.values())))
        if t < 2 * WARMUP:
            assert entries["step"] == 0 or name != "ogr1ds"
            continue
        avg = box.avg_w if name == "ogr1ds" else box.avg
        expected = {
            "curvature": avg.curvature,
            "minimum": avg.minimum,
            "sigma_ratio": np.sqrt(avg.variance / avg.gradient_variance),
            "correlation": avg.covariance / np.sqrt(avg.variance * avg.gradient_variance),
            "mean_position": avg.mean_position,
            "mean_gradient": avg.mean_gradient,
            "step": np.asarray(updates[t]) @ box.direction,
        }
        # A direction's sign is a convention where its statistics start anew.
        odd = {"minimum", "mean_position", "mean_gradient", "step"} if name == "ogr1ds" else set()
        for key, value in expected.items():
            a, b = entries[key], float(value)
            assert (abs(a) if key in odd else a) == pytest.approx(
                abs(b) if key in odd else b, rel=1e-8, abs=1e-10
            ), (t, key)


@pytest.mark.parametrize("name", NAMES)
def test_missing_parameters_are_refused(name):
    optimizer = getattr(optgrad, name)(0.1)
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("eta", -0.1), ("eta", np.inf), ("alpha", -0.5), ("beta", 1.0), ("beta", -0.1)),
        *(("gamma", 1.0), ("gamma", -0.1), ("epsilon", 0.0), ("clip_sigmas", 0.0)),
        *(("lr_max", 0.0), ("lr_max", -1.0), ("eta", np.nan), ("step", "newton")),
        *(("negative_curvature", "absolute"), ("warmup_steps", 0), ("warmup_steps", -1)),
    ],
)
def test_numbers_outside_their_range_are_refused(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} = {value!r}.*(?i:accepted|range)"):
        getattr(optgrad, name)(**{"eta": 0.1, argument: value})


def test_stages_that_are_too_short_are_refused():
    """One sample has no parabola: a stage of Algorithm 6 needs two."""
    with pytest.raises(ValueError, match=r"stage_steps = 1 is not accepted; .* ≥ 2"):
        optgrad.ogr1ds(0.1, stage_steps=1)
    with pytest.raises(ValueError, match=r"stage_steps = 0 is not accepted; .* ≥ 1"):
        optgrad.ogr1dc(0.1, stage_steps=0)
    with pytest.raises(TypeError, match=r"stage_steps = 2\.5 is not an integer"):
        optgrad.ogr1ds(0.1, stage_steps=2.5)
    with pytest.raises(ValueError, match="position = 'assumed' is not accepted"):
        optgrad.ogr1dc(0.1, position="assumed")

"""csawg and csawg_repeated against the direct loops, the paper's numbers, and each option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import boxes, runs

START = np.array([-1.0, 0.0])
ALGORITHM_2 = {"projections": 5, "corrections": 10}
LAYOUTS = ("pairs", "reference", "gradients")
# Verification stays on where the layout is compared with others; here it never rejects.
PLAIN = {"verify": False}


def make(window, episode=None, rate=1e-3, **options):
    if episode is None:
        return optgrad.csawg(rate, window, **options)
    return optgrad.csawg_repeated(rate, window, **episode, **options)


def loop(window, episode, rate, evaluations, gradient=boxes.rosenbrock_gradient, start=START):
    sizes = (1, 0) if episode is None else tuple(episode.values())
    return boxes.planning(gradient, start, rate, window, *sizes, evaluations)


# --- against the direct loop ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "episode"), [(2, None), (5, None), (1, {"projections": 2, "corrections": 1})]
)
@pytest.mark.parametrize("read_back", [False, True])
def test_pairs_are_the_loop_bit_by_bit(x64, window, episode, read_back):
    """The paper's preset, operation by operation: every bit of every point."""
    optimizer = make(window, episode, paper=True, read_back=read_back)
    steps = 45 if episode is None else 20  # the last one overflows later
    actual, _ = runs.step_by_step(optimizer, boxes.rosenbrock_gradient, START, steps)
    expected, plans = loop(window, episode, 1e-3, steps)
    assert len(plans) > 3
    np.testing.assert_array_equal(actual, expected)


def test_algorithm_2_is_the_loop_bit_by_bit(x64):
    optimizer = make(2, ALGORITHM_2, paper=True)
    actual, state = runs.step_by_step(optimizer, boxes.rosenbrock_gradient, START, 120)
    expected, plans = loop(2, ALGORITHM_2, 1e-3, 120)
    np.testing.assert_array_equal(actual, expected)
    assert (int(state.evaluations), int(state.outer_iterations)) == (120, 2 + 2 * len(plans))


@pytest.mark.parametrize("window", [2, 10, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_the_convex_problem(x64, window, layout):
    """Compiled, all layouts follow the loop; the first step sizes to 1e-12."""
    optimizer = optgrad.csawg(9e-4, window, layout=layout, paper=True)
    points, _, records = runs.descend(optimizer, runs.convex, [-1.0, 2.0], 420, record=runs.planned)
    expected, plans = boxes.planning(
        boxes.convex_gradient, np.array([-1.0, 2.0]), 9e-4, window, 1, 0, 420
    )
    found = runs.plans_of(records)
    count = min(3, len(plans))
    np.testing.assert_allclose(found[:count], plans[:count], rtol=1e-12)
    np.testing.assert_allclose(
        points[: 60 + 2 * window], expected[: 60 + 2 * window], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_algorithm_2(x64, layout):
    """The episodes' displacement enters alike; trajectories agree until rounding decides."""
    optimizer = make(10, ALGORITHM_2, layout=layout, paper=True)
    points, _, records = runs.descend(optimizer, runs.rosenbrock, START, 250, record=runs.planned)
    expected, plans = loop(10, ALGORITHM_2, 1e-3, 250)
    np.testing.assert_allclose(runs.plans_of(records)[:3], plans[:3], rtol=1e-9)
    np.testing.assert_allclose(points, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", ["pairs", "reference"])
@pytest.mark.parametrize("window", [2, 5])
def test_matched_pairs(x64, window, layout):
    optimizer = optgrad.csawg(1e-3, window, pairing="matched", layout=layout, **PLAIN)
    points, _, records = runs.descend(optimizer, runs.rosenbrock, START, 60, record=runs.planned)
    expected, plans = boxes.matched_planning(boxes.rosenbrock_gradient, START, 1e-3, window, 60)
    np.testing.assert_allclose(runs.plans_of(records)[:3], plans[:3], rtol=1e-9)
    np.testing.assert_allclose(points, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reused_gradient(x64, layout):
    """The call that completes a window takes both steps; no evaluation is spent on projections."""
    optimizer = optgrad.csawg(1e-3, 5, gradient="reuse", layout=layout, **PLAIN)
    points, state, _ = runs.descend(optimizer, runs.rosenbrock, START, 60)
    expected, plans = boxes.planning(
        boxes.rosenbrock_gradient, START, 1e-3, 5, 1, 0, 60, reuse=True
    )
    assert len(plans) == 11
    np.testing.assert_allclose(points, expected, rtol=1e-6)
    assert int(state.outer_iterations) == 60


# --- the paper's numbers (design/methods, section 6) --------------------------------------------


@pytest.mark.parametrize(("window", "evaluations", "iterations"), [(10, 465, 80), (2, 458, 18)])
@pytest.mark.parametrize("options", [{"paper": True}, {}], ids=["paper", "default"])
def test_repeated_planning_reaches_zero(x64, window, evaluations, iterations, options):
    """Golden test 1: exactly zero error after 465 and 458 gradients."""

    def record(state):
        size = jnp.where(state.is_planned, jnp.max(state.step_sizes), 0.0)
        return state.outer_iterations, state.phase, size

    optimizer = make(window, ALGORITHM_2, **options)
    points, _, (outer, phase, size) = runs.descend(
        optimizer, runs.rosenbrock, START, evaluations, record=record
    )
    error = runs.error(points)
    assert error[-1] == 0.0
    assert outer[-1] == iterations
    # One iteration earlier: before the last window's steps and episode.
    before = np.flatnonzero(outer == iterations - 1)[-1]
    assert error[before] > 1e-10
    assert 2.49 <= size.max() <= 2.52
    # 2K steps of the first two windows; the projection that follows is call 2K + 1.
    first = np.flatnonzero(phase != 0)[0]
    assert first == (2 * window - 1 if options else 2 * window)


@pytest.mark.parametrize(
    ("window", "low", "high"), [(10, 132.3, 134.3), (5, 310, 355), (2, 250, 700)]
)
def test_single_planning(x64, window, low, high):
    """Golden test 2: errors of gradient descent over those of Csawg at 10,000 gradients.

    K = 2 is chaotic, a start that differs in the last bit may even diverge: a median of nine.
    """

    def final_errors(optimizer, starts):
        def one(start):
            def step(carry, _):
                w, state = carry
                updates, state = optimizer.update(jax.grad(runs.rosenbrock)(w), state, w)
                return (w + updates, state), None

            (w, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=10_000)
            return jnp.linalg.norm(w - 1)

        return np.asarray(jax.jit(jax.vmap(one))(starts))

    starts = jnp.asarray(START + 1e-14 * np.arange(9)[:, None])
    planned = final_errors(optgrad.csawg(1e-3, window, paper=True), starts)
    plain = final_errors(optax.sgd(1e-3), starts)
    gains = np.where(np.isfinite(planned), plain / planned, 0)
    assert low <= np.median(gains) <= high


@pytest.mark.parametrize(("window", "outer", "evaluations"), [(2, 334, 500), (10, 740, 813)])
def test_convex_problem(x64, window, outer, evaluations):
    """Golden test 3: error 1e-10."""
    points, state, _ = runs.descend(
        optgrad.csawg(9e-4, window, paper=True), runs.convex, [-1.0, 2.0], evaluations
    )
    assert runs.error(points, 0.0)[-1] <= 1e-10
    assert abs(int(state.outer_iterations) - outer) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_loss(x64, layout):
    """Golden test 4: with a constant gradient α' = P·α + γ(K + P·M)."""
    rate, window, jumps, between = 0.1, 3, 2, 4
    optimizer = make(
        window,
        {"projections": jumps, "corrections": between},
        rate,
        layout=layout,
        paper=True,
    )
    _, _, records = runs.descend(
        optimizer, lambda w: 0.7 * w[0] - 0.2 * w[1], START, 90, record=runs.planned
    )
    found = runs.plans_of(records)
    expected = [rate * window]
    for _ in found[1:]:
        expected.append(jumps * expected[-1] + rate * (window + jumps * between))
    assert len(found) >= 5
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), rtol=1e-9)


def test_no_nan_after_convergence(x64):
    """Golden test 6: a gradient of zero gives α = 0."""
    points, state, (_, sizes) = runs.descend(
        make(10, ALGORITHM_2, paper=True), runs.rosenbrock, START, 2000, record=runs.planned
    )
    assert np.isfinite(points).all()
    assert np.isfinite(sizes).all()
    assert runs.error(points)[-1] == 0
    assert (np.asarray(state.step_sizes) == 0).all()


# --- verification -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "gradient_norm"])
def test_verification_loses_no_run(x64, metric):
    """Section 2.4: repeated planning from 40 starts, in float64; without it runs are lost."""
    starts = START + 0.5 * np.random.default_rng(0).standard_normal((40, 2))
    tolerance = 1.0 if metric == "loss" else 10.0

    def final(options):
        optimizer = make(10, ALGORITHM_2, **options)

        def one(start):
            def step(carry, _):
                w, state = carry
                value, gradient = jax.value_and_grad(runs.rosenbrock)(w)
                updates, state = optimizer.update(gradient, state, w, value=value)
                return (w + updates, state), None

            (w, state), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=2000)
            return runs.rosenbrock(w), state.rejected

        return [np.asarray(x) for x in jax.jit(jax.vmap(one))(jnp.asarray(starts))]

    value, rejected = final({"verify": metric, "tolerance": tolerance})
    begin = np.array([boxes.rosenbrock(w) for w in starts])
    assert np.isfinite(value).all()
    assert (value <= np.maximum(begin, 1.0)).all()
    assert rejected.sum() > 0
    trusted, none = final({"paper": True})
    assert none.sum() == 0
    assert (~(trusted <= begin)).sum() >= 3  # NaN or far away


@pytest.mark.parametrize("dimension", [5, 20])
def test_rotated_quadratics(x64, dimension):
    """Section 3: repeated planning diverges on them, and does not with verification."""
    losses = {}
    for name, options in (("verified", {}), ("trusted", {"paper": True})):
        function, start = runs.rotated_quadratic(dimension, dimension)
        points, _, _ = runs.descend(make(10, ALGORITHM_2, 0.9, **options), function, start, 1500)
        losses[name] = float(function(jnp.asarray(points[-1]))) / float(
            function(jnp.asarray(start))
        )
    assert not abs(losses["trusted"]) < 1  # NaN and −inf included
    assert losses["verified"] < 1e-3


def test_restored_point_is_the_saved_one(x64):
    """A plan that makes it worse is taken back by exactly its displacement; windows start anew."""
    optimizer = optgrad.csawg(0.1, 2)
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    values, points = [5.0, 4.0, 3.0, 2.0, 1.0, 1.5, np.nan, 1.0], []
    for value in values:
        points.append(params)
        updates, state = optimizer.update(jnp.array([0.5, 0.3]), state, params, value=value)
        params = params + updates
    # Calls 1–4 fill the windows, 5 plans at value 1, 6 sees 1.5 > 1 and goes back, 7 checks that.
    assert int(state.rejected) == 1
    np.testing.assert_array_equal(points[7], points[4])
    assert not np.allclose(points[5], points[4])
    np.testing.assert_allclose(params - points[7], [-0.05, -0.03], rtol=1e-12)
    assert not bool(state.is_full)
    assert (int(state.slot), bool(state.is_pending)) == (0, True)  # call 9 records call 8's step


def test_restored_from_far_away():
    """What the rounding of large parameters takes from the way back, the second call gives."""
    optimizer = optgrad.csawg(0.01, 2)

    def loss(w):
        return 0.5 * (w[0] - 2) ** 2 + 0.5 * (w[1] - 10 * jnp.maximum(w[0] - 0.5, 0)) ** 2

    params = jnp.array([0.47, 1e-12], jnp.float32)
    state = optimizer.init(params)
    points = []
    for _ in range(8):
        points.append(params)
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value=value)
        params = params + updates
    assert int(state.rejected) == 1
    assert np.abs(points[5]).max() > 1e6
    np.testing.assert_array_equal(points[7], points[4])


@pytest.mark.parametrize("abort", [1e39, np.inf])
def test_infinite_loss_within_an_episode(abort):
    """It is worse than any, also where the bound overflows."""
    optimizer = make(1, {"projections": 2, "corrections": 1}, 0.1, abort=abort)
    params = jnp.array([1.0, 2.0])
    state = optimizer.init(params)
    for value in (5.0, 4.0, 3.0, 2.0, np.inf, 1.0, 1.0):
        updates, state = optimizer.update(params, state, params, value=value)
        params = params + updates
    assert int(state.rejected) == 1
    assert int(state.phase) == 0


def test_loss_is_a_scalar():
    optimizer = optgrad.csawg(0.1)
    with pytest.raises(ValueError, match=r"value has the shape \(3,\); accepted: a scalar"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2), value=jnp.ones(3))


def test_base_without_a_loss():
    """A base that averages the loss is not handed one that nobody gave."""
    base = optgrad.MultiSteps(optax.identity(), 2)
    optimizer = optgrad.csawg(0.1, 2, verify=False, base=base)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(updates, 0.0)


def test_abort_within_the_episode(x64):
    """A metric beyond ``abort`` ends an episode at once; up to there it goes on."""
    for factor, expected in ((10.0, 1), (1e4, 0)):
        optimizer = make(1, ALGORITHM_2, 0.1, abort=factor)
        params = jnp.array([1.0, -2.0])
        state = optimizer.init(params)
        for value in (5.0, 4.0, 1.0, 50.0):
            updates, state = optimizer.update(jnp.array([0.5, 0.3]), state, params, value=value)
            params = params + updates
        assert int(state.rejected) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_loss_skips_the_step(value):
    """No parameter moves by a gradient whose loss is not finite, and the run goes on after it."""
    for options in ({}, PLAIN, {"pairing": "matched"}, {"layout": "pairs"}, {"paper": True}):
        optimizer = make(2, None, 0.1, **options)
        params = jnp.array([1.0, -2.0])
        state = optimizer.init(params)
        for call in range(12):
            is_bad = call in (0, 1, 4, 5, 8)
            gradient = jnp.full(2, np.nan) if is_bad else params
            loss = value if is_bad else 0.5 * jnp.sum(params**2)
            updates, state = optimizer.update(gradient, state, params, value=loss)
            # A call that judges a plan takes it back instead.
            assert np.isfinite(updates).all()
            params = params + updates
        assert np.linalg.norm(params) < np.linalg.norm([1.0, -2.0])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.window))


def test_missing_value_is_refused():
    optimizer = optgrad.csawg(0.1)
    with pytest.raises(ValueError, match=r"value = None; accepted: the loss.*verify=False"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    for options in (PLAIN, {"verify": "gradient_norm"}, {"paper": True}):
        optimizer = optgrad.csawg(0.1, **options)
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))


# --- float32 and low precision ------------------------------------------------------------------


def test_float32_reaches_the_minimum():
    for window in (2, 10):
        points, _, _ = runs.descend(
            make(window, ALGORITHM_2), runs.rosenbrock, START, 500, dtype=jnp.float32
        )
        assert runs.error(points).min() < 1e-6


def test_verified_runs_survive_convergence_in_float32():
    """Section 2.3: after convergence α is noise, and unverified runs get lost."""
    starts = jnp.asarray(
        START + 1e-2 * np.random.default_rng(1).standard_normal((20, 2)), jnp.float32
    )

    def worst(options):
        optimizer = make(10, ALGORITHM_2, layout="gradients", **options)

        def one(w):
            def step(carry, _):
                w, state = carry
                value, gradient = jax.value_and_grad(runs.rosenbrock)(w)
                updates, state = optimizer.update(gradient, state, w, value=value)
                return (w + updates, state), None

            return runs.rosenbrock(
                jax.lax.scan(step, (w, optimizer.init(w)), None, length=2500)[0][0]
            )

        return np.asarray(jax.jit(jax.vmap(one))(starts))

    assert (worst({}) < 1e-8).all()


def test_noise_guard():
    """A numerator of rounding alone plans nothing."""
    for guard, planned in ((0.0, True), (16.0, False)):
        optimizer = optgrad.csawg(1e-7, 2, noise_guard=guard, **PLAIN)
        params = jnp.array([1.0])
        state = optimizer.init(params)
        sizes = []
        for call in range(5):
            gradient = jnp.array([1.0 + 0.1 * call])
            updates, state = optimizer.update(gradient, state, params)
            params = params + updates
            sizes.append(float(state.step_sizes[0]) if bool(state.is_planned) else 0.0)
        assert (sizes[-1] != 0) is planned


def test_ring_of_less_precision(x64):
    """bfloat16 gradients in the ring cost nothing that is seen on the convex problem."""
    final = {}
    for dtype in (None, jnp.bfloat16):
        optimizer = optgrad.csawg(9e-4, 10, ring_dtype=dtype, **PLAIN)
        state = optimizer.init(jnp.ones(2))
        assert state.window.gradients.dtype == (dtype or jnp.float64)
        points, _, _ = runs.descend(optimizer, runs.convex, [-1.0, 2.0], 1200)
        final[dtype] = np.flatnonzero(runs.error(points, 0.0) < 1e-8)[0]
    assert final[jnp.bfloat16] < 1.1 * final[None]


# --- what follows in a chain, and the base ------------------------------------------------------


def test_read_back_sees_what_follows(x64):
    """With weight decay behind it, the step sizes are those of the steps that were really taken."""
    decay = 0.05

    def plans(read_back):
        optimizer = optax.chain(
            make(3, None, 0.05, read_back=read_back, layout="pairs", **PLAIN),
            optax.add_decayed_weights(-decay),
        )
        return runs.plans_of(
            runs.descend(
                optimizer, runs_quadratic, [1.0, 2.0], 30, record=lambda s: runs.planned(s[0])
            )[2]
        )

    def runs_quadratic(w):
        return 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2)

    w, pairs, direct = np.array([1.0, 2.0]), [], []
    while len(direct) < 1:
        g = np.array([1.0, 3.0]) * w
        w = w - 0.05 * g - decay * w
        pairs.append((w, g))
        if len(pairs) == 6:
            direct.append(boxes.step_sizes(pairs[:3], pairs[3:]))
    np.testing.assert_allclose(plans(True)[0], direct[0], rtol=1e-10)
    assert not np.allclose(plans(False)[0], direct[0], rtol=1e-2)


def test_base_gives_the_ordinary_steps(x64):
    """Outside of episodes it is the base, whose state stands still during projections."""
    base, rate = optax.scale_by_adam(), 0.01
    optimizer = optgrad.csawg(rate, 3, base=base, **PLAIN)
    points, state, _ = runs.descend(optimizer, runs.rosenbrock, START, 7)
    expected, _, _ = runs.descend(
        optax.with_extra_args_support(optax.adam(rate)), runs.rosenbrock, START, 6
    )
    np.testing.assert_allclose(points[:6], expected, rtol=1e-12)
    assert int(state.base.count) == 6  # the seventh call projects


def test_schedule(x64):
    """A schedule of the number of calls."""
    optimizer = optgrad.csawg(lambda count: jnp.where(count < 2, 0.1, 0.2), 10, **PLAIN)
    points, _, _ = runs.descend(optimizer, jnp.sum, [0.0], 4)
    np.testing.assert_allclose(points[:, 0], [-0.1, -0.2, -0.4, -0.6], rtol=1e-12)


# --- state, options and errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "vectors"),
    [
        ({"window": 2, "paper": True}, 6),
        ({"window": 2, "layout": "reference", "paper": True}, 7),
        ({"window": 2, "layout": "gradients", "paper": True}, 7),
        ({"window": 10, "paper": True}, 22),
        ({"window": 10, "layout": "reference", "paper": True}, 15),
        ({"window": 10, "layout": "gradients", "paper": True}, 15),
        ({"window": 100, "verify": False, "read_back": False}, 105),
        ({"window": 3, "verify": False, "read_back": False}, 8),
        ({"window": 10, "verify": False}, 16),
        ({"window": 10, "pairing": "matched"}, 16),
        ({"window": 10}, 17),
    ],
)
def test_state_vectors(options, vectors):
    """Section 2.2's table, one vector more to read back, and one more to verify."""
    state = jax.eval_shape(optgrad.csawg(0.1, **options).init, jnp.zeros(1000))
    assert sum(x.size for x in jax.tree.leaves(state) if x.size >= 1000) == 1000 * vectors


def test_diagnostics():
    optimizer = optgrad.csawg(0.1, 2)
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    state = optimizer.init(params)
    seen = []
    for _ in range(6):
        loss = 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        updates, state = optimizer.update(params, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        seen.append(optgrad.diagnostics(state))
    assert [int(d["evaluations"]) for d in seen] == [1, 2, 3, 4, 5, 6]
    assert [int(d["outer_iterations"]) for d in seen] == [1, 2, 3, 4, 4, 5]
    assert [bool(d["is_planned"]) for d in seen] == [False] * 4 + [True, False]
    alpha = np.concatenate([np.ravel(x) for x in jax.tree.leaves(seen_step_sizes(seen[4]))])
    assert seen[3]["step_size_mean"] == 0
    assert alpha[1] <= alpha[0] <= alpha[2]
    # Two steps of rate 0.1 on curvature 1 are one of 1 − 0.9²; lagged pairs see it from w after g.
    np.testing.assert_allclose(alpha, 0.9 * (1 - 0.9**2), rtol=1e-5)


def seen_step_sizes(entry):
    return [entry["step_size_mean"], entry["step_size_min"], entry["step_size_max"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window = 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"pairing": "match"}, "did you mean 'matched'"),
        ({"gradient": "stale"}, "gradient = 'stale'"),
        ({"layout": "pair"}, "did you mean 'pairs'"),
        ({"verify": "value"}, "verify = 'value'"),
        ({"verify": 1}, "verify = '1'"),
        ({"tolerance": -1.0}, "tolerance = -1.0"),
        ({"abort": -1.0}, "abort = -1.0"),
        ({"noise_guard": -1.0}, "noise_guard = -1.0"),
        ({"ring_dtype": "int32"}, "ring_dtype = 'int32'"),
        ({"layout": "gradients", "base": optax.scale_by_adam()}, "layout = 'gradients' .* base"),
        ({"layout": "gradients", "learning_rate": lambda t: 0.1}, "learning_rate = a schedule"),
        ({"layout": "gradients", "pairing": "matched"}, "pairing = 'matched'"),
        ({"layout": "gradients", "read_back": True}, "read_back = True"),
        ({"gradient": "reuse", "pairing": "matched"}, "pairing = 'matched'"),
        ({"gradient": "reuse", "read_back": True}, "read_back = True"),
        ({"pairing": "matched", "read_back": False}, "read_back = False"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        optgrad.csawg(**{"learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projections": 0}, "projections = 0"),
        ({"corrections": -1}, "corrections = -1"),
        ({"gradient": "reuse"}, r"projections, corrections = \(5, 10\)"),
    ],
)
def test_wrong_arguments_of_repeated_planning(options, message):
    with pytest.raises(ValueError, match=message):
        optgrad.csawg_repeated(0.1, **options)


def test_unverified_repetition_warns():
    with pytest.warns(UserWarning, match="projections = 5 with verify = False"):
        optgrad.csawg_repeated(0.1, verify=False)


def test_counts_are_of_integers():
    with pytest.raises(TypeError, match=r"window = 2\.5"):
        optgrad.csawg(0.1, 2.5)

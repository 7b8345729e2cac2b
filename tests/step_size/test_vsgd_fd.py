"""vSGD-fd against its algorithm in NumPy, and on noisy problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad

from . import curvature_runs as runs

NEEDED = ("value_fn",)


def box(single, inflation=2.0, warmup_steps=10, *, floor=1e-8, outliers=False, per_example=False):
    """Section 4.4 of the specification, the ``fd`` lines; v̄ and the average of h² themselves."""
    state = {"gb": np.zeros(runs.SIZE)}
    size = single.inputs.shape[1] if per_example else 1

    def curvature(w, t, g):
        move = g if t < warmup_steps else state["gb"]
        least = np.maximum(floor, np.sqrt(np.finfo(float).eps) * np.abs(w))
        length = np.maximum(np.abs(move), least)
        probed = w + np.where(move < 0, -length, length)
        return np.abs(single.gradient(probed, t) - g) / length

    def step(w, t):
        g = single.gradient(w, t)
        h = curvature(w, t, g)
        square = np.mean(single.per_example(w, t) ** 2, axis=0) if per_example else g**2
        if t < warmup_steps:
            state.setdefault("samples", []).append((g, square, h, h**2))
            if t == warmup_steps - 1:
                gb, vb, hb, vh = np.mean(state["samples"], axis=0)
                tau = np.full(runs.SIZE, float(warmup_steps))
                averages = gb, inflation * vb, inflation * hb, inflation**2 * vh
                state.update(gb=gb, averages=averages, tau=tau)
            return np.zeros(runs.SIZE)
        gb, vb, hb, vh = state["averages"]
        tau = state["tau"]
        if outliers:
            far = np.abs(g - gb) > 2 * np.sqrt((vb - gb**2) / size)
            far |= np.abs(h - hb) > 2 * np.sqrt(vh - hb**2)
            tau = tau + far
        samples = zip((gb, vb, hb, vh), (g, square, h, h**2), strict=True)
        gb, vb, hb, vh = ((1 - 1 / tau) * old + new / tau for old, new in samples)
        r = size * gb**2 / (vb + (size - 1) * gb**2)
        state.update(gb=gb, averages=(gb, vb, hb, vh), tau=(1 - r) * tau + 1)
        return -hb / vh * r * g

    return step


@pytest.mark.parametrize(
    "options",
    [{}, {"inflation": 1.0, "warmup_steps": 3}, {"outliers": True}, {"floor": 0.1}],
)
def test_follows_the_algorithm(x64, options):
    """The minibatch gradient is the sample."""
    single = runs.stream()
    arguments = {{"floor": "probe_floor"}.get(k, k): v for k, v in options.items()}
    runs.assert_follows(optgrad.vsgd_fd(**arguments), box(single, **options), NEEDED)


def test_follows_the_batch_formula(x64):
    """With the squares of the examples' gradients."""
    single = runs.stream()
    names = (*NEEDED, "per_example_grads")
    runs.assert_follows(optgrad.vsgd_fd(), box(single, per_example=True), names)


def test_golden_noisy_parabola(x64):
    """As `vsgd`: the difference of gradients is the curvature here."""
    squares, states = runs.noisy_parabola(optgrad.vsgd_fd(), NEEDED)
    exact, _ = runs.noisy_parabola(optgrad.vsgd(), ("curvature_diagonal",))
    assert np.median(squares) == pytest.approx(np.median(exact), rel=0.2)
    diagnostics = jax.vmap(lambda state: state.diagnostics())(states)
    assert 2e-5 < np.median(diagnostics["step_size_geomean"]) < 1.2e-4
    assert 0.5 < np.median(diagnostics["memory_geomean"]) / 3000 < 0.65


def test_least_squares_table(x64):
    """0.020 / 2.5e-4 / 1e-7; the last is between two floors, as the one it was for is not told."""
    assert runs.is_within(runs.excess(optgrad.vsgd_fd(), 1, 5000, NEEDED)[0], 0.020)
    assert runs.is_within(runs.excess(optgrad.vsgd_fd(), 20, 5000, NEEDED)[0], 2.5e-4)
    # One draw of several may be lost, by the rounding of the machine.
    assert np.median(runs.excess(optgrad.vsgd_fd(), None, 2000, NEEDED)[0]) < 1e-7
    assert runs.excess(optgrad.vsgd_fd(probe_floor=1e-5), None, 2000, NEEDED)[0].max() > 1e-7


def test_larger_floors_help_under_noise(x64):
    """A mean gradient near 0 is no good distance."""
    default, _ = runs.excess(optgrad.vsgd_fd(), 1, 5000, NEEDED)
    floored, _ = runs.excess(optgrad.vsgd_fd(probe_floor=1e-3), 1, 5000, NEEDED)
    assert np.median(floored) < 0.7 * np.median(default)


def test_rosenbrock_does_not_reproduce(x64):
    """4e-19 in the specification; read literally, the first probe is 450 away: no progress."""
    assert runs.on_rosenbrock(optgrad.vsgd_fd()) > 1


def quartic(w):
    return jnp.sum(w**4) / 4


def test_probe_is_one_mean_gradient_away(x64):
    """((w + g)³ − w³)/g at first; afterwards with the mean of the gradients before."""
    optimizer = optgrad.vsgd_fd(1.0, warmup_steps=2)
    points, expected = [1.0, 0.5, -0.8], []
    state, means = optimizer.init(jnp.zeros(1)), []
    for t, w in enumerate(points):
        g = w**3
        move = g if t < 2 else np.mean(means)
        expected.append(abs((w + move) ** 3 - w**3) / abs(move))
        means.append(g)
        params = jnp.array([w])
        _, state = optimizer.update(jax.grad(quartic)(params), state, params, value_fn=quartic)
    np.testing.assert_allclose(state.mean_curvature, np.mean(expected[:2]) / 2 + expected[2] / 2)


def test_grad_is_what_is_compared(x64):
    """Behind a clip in a chain the second gradient is compared with the raw first one."""
    params = jnp.array([3.0])
    gradient = jax.grad(quartic)(params)
    optimizer = optgrad.vsgd_fd()
    state = optimizer.init(params)
    extras = {"value_fn": quartic}
    _, plain = optimizer.update(gradient, state, params, **extras)
    _, clipped = optimizer.update(gradient / 27, state, params, grad=gradient, **extras)
    np.testing.assert_array_equal(plain.mean_curvature, clipped.mean_curvature)
    np.testing.assert_allclose(clipped.mean_gradient, 1.0)
    _, wrong = optimizer.update(gradient / 27, state, params, **extras)
    assert abs(wrong.mean_curvature[0] - ((3.0 + 1) ** 3 - 27)) > 1


def test_overflow_at_the_probed_point_does_not_count():
    """The mean curvature is kept, and the step is finite."""

    def steep(w):  # infinite beyond 1
        return jnp.sum(0.5 * w**2 + jnp.exp(1e4 * (w - 1)))

    optimizer = optgrad.vsgd_fd(1.0, warmup_steps=2)
    state = optimizer.init(jnp.zeros(1))
    curvatures = []
    for w in (0.4, 0.4, 0.9, 0.1):  # the third one is probed at 0.9 + 0.4
        params = jnp.array([w])
        updates, state = optimizer.update(params, state, params, value_fn=steep)
        curvatures.append(float(state.mean_curvature[0]))
        assert np.all(np.isfinite(updates))
    np.testing.assert_allclose(curvatures, 1.0, rtol=1e-5)
    assert updates[0] != 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_probes_are_not_lost_in_rounding(dtype):
    """Gradients far below the parameters' precision still find the curvature."""
    params = jnp.asarray([100.0, 300.0], dtype)
    scale = jnp.asarray([2.0, 0.5], jnp.float32)

    def loss(w):
        return 0.5 * jnp.sum(scale * (w.astype(jnp.float32) - params.astype(jnp.float32)) ** 2)

    optimizer = optgrad.vsgd_fd()
    gradient = jnp.asarray([1e-6, -1e-6], dtype)
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(gradient, state, params, value_fn=loss)
    tolerance = 2 * float(jnp.finfo(dtype).eps) ** 0.5
    np.testing.assert_allclose(state.mean_curvature, scale, rtol=tolerance)


def test_no_curvature():
    """A linear loss: without a cap θ stands, with one it moves by it."""
    for max_rate, expected in ((None, 0.0), (3.0, -3.0)):
        optimizer = optgrad.vsgd_fd(1.0, warmup_steps=2, max_rate=max_rate)
        params = jnp.zeros(2)
        state = optimizer.init(params)
        for _ in range(4):
            updates, state = optimizer.update(jnp.ones(2), state, params, value_fn=jnp.sum)
        np.testing.assert_allclose(updates, expected)


def test_diagnostics():
    """The rate is r·h̄/mean(h²)."""
    state = (
        optgrad.vsgd_fd()
        .init(jnp.zeros(1))
        ._replace(
            mean_gradient=jnp.array([1.0]),
            gradient_variance=jnp.array([1.0]),
            mean_curvature=jnp.array([2.0]),
            mean_square_curvature=jnp.array([8.0]),
        )
    )
    assert float(state.diagnostics()["step_size_geomean"]) == pytest.approx(0.5 * 2 / 8)


def test_wrong_arguments():
    """Refused by name."""
    with pytest.raises(ValueError, match="probe_floor"):
        optgrad.vsgd_fd(probe_floor=0.0)
    optimizer, one = optgrad.vsgd_fd(), jnp.ones(2)
    state = optimizer.init(one)
    with pytest.raises(ValueError, match="grad has leaves"):
        optimizer.update(one, state, one, value_fn=jnp.sum, grad=jnp.ones(3))

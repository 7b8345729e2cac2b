"""TONGA against the dense covariance and against a transcription with truncation; its diagonal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optgrad

SIZE = 7
FLAGS = list(itertools.product((False, True), repeat=2))


def tree(x):
    """Three leaves of a vector of seven numbers, one of them a scalar; leading axes stay."""
    return {"a": x[..., :2], "b": x[..., 2:6].reshape(*x.shape[:-1], 2, 2), "c": x[..., 6]}


def flat(found, leading=0):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]
    return np.concatenate([x.reshape(*x.shape[:leading], -1) for x in leaves], axis=-1)


def gradients(steps=45, seed=0):
    rng = np.random.default_rng(seed)
    mean, scales = rng.normal(size=SIZE), np.logspace(-1, 1, SIZE)
    axes = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    return mean + rng.normal(size=(steps, SIZE)) * scales @ axes.T


class Dense:
    """The covariance of all gradients, without truncation."""

    def __init__(self, gamma, damping, relative, normalize, rows):
        self.C = np.zeros((SIZE, SIZE))
        self.gamma, self.damping, self.relative = gamma, damping, relative
        self.normalize, self.rows = normalize, rows

    def __call__(self, g):
        self.C = self.gamma * self.C + np.outer(g, g)
        lam = self.damping * (np.trace(self.C) / self.rows if self.relative else 1.0)
        v = np.linalg.solve(self.C + lam * np.eye(SIZE), g)
        return lam * v if self.normalize else v


class Truncated:
    """Section 5.8 of the specification, with X as a matrix of D × (rank + period)."""

    def __init__(self, rank, period, gamma, damping):
        self.X, self.t = np.zeros((SIZE, rank + period)), 0
        self.rank, self.period, self.gamma, self.damping = rank, period, gamma, damping

    def __call__(self, g):
        slot = self.rank + self.t % self.period
        self.X = np.sqrt(self.gamma) * self.X
        self.X[:, slot] = g
        G = self.X.T @ self.X
        lam = self.damping * np.trace(G) / len(G)
        v = g - self.X @ np.linalg.solve(G + lam * np.eye(len(G)), self.X.T @ g)
        self.t += 1
        if self.t % self.period == 0:
            values, vectors = np.linalg.eigh(G)
            largest = vectors[:, np.argsort(values)[::-1][: self.rank]]
            self.X = np.concatenate([self.X @ largest, np.zeros((SIZE, self.period))], axis=1)
        return v


def scan(transformation, stream, dtype=None):
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(stream))

    def body(state, g):
        found, state = transformation.update(g, state)
        return state, found

    return jax.lax.scan(body, transformation.init(jax.tree.map(lambda x: x[0], grads)), grads)


def run(transformation, stream, dtype=None):
    """The updates of a stream of gradients, one row each, and the last state."""
    state, found = jax.jit(lambda: scan(transformation, stream, dtype))()
    return flat(found, leading=1), state


@pytest.mark.parametrize(("relative", "normalize"), FLAGS)
@pytest.mark.parametrize("period", [1, 4])
def test_equals_the_dense_covariance(x64, period, relative, normalize):
    """With as many directions as parameters, to 1e-12."""
    stream, gammas = gradients(), np.array([0.9, 0.5, 0.0])
    flags = {"relative": relative, "normalize": normalize}

    @jax.vmap
    def updates(gamma):
        return scan(optgrad.scale_by_tonga(9, period, gamma, 0.3, **flags), stream)[1]

    for found, gamma in zip(flat(jax.jit(updates)(gammas), leading=2), gammas, strict=True):
        dense = Dense(gamma, 0.3, rows=SIZE + period, **flags)  # the rank is cut to seven
        np.testing.assert_allclose(found, [dense(g) for g in stream], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "period"), [(1, 1), (2, 5), (3, 2)])
def test_follows_the_specification(x64, rank, period):
    stream = gradients()
    found, state = run(optgrad.scale_by_tonga(rank, period, 0.95, 0.1), stream)
    box = Truncated(rank, period, 0.95, 0.1)
    expected = np.array([box(g) for g in stream])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    dense = Dense(0.95, 0.1, True, True, rank + period)
    assert np.max(np.abs(expected - [dense(g) for g in stream])) > 1e-3  # truncation matters
    # The state's X is the transcription's, up to the merge that is due and rotations.
    X = flat(state.covariance.rows, leading=1).T * np.asarray(state.covariance.weights)
    np.testing.assert_allclose(X.T @ X, state.covariance.gram, atol=1e-9)


def test_optimizer_is_the_scaled_direction():
    stream = gradients(12)
    direction, _ = run(optgrad.scale_by_tonga(3, 4), stream)
    steps, _ = run(optgrad.tonga(lambda count: 0.5 + count, 3, 4), stream)
    rates = 0.5 + np.arange(12)[:, None]
    np.testing.assert_allclose(steps, -rates * direction, rtol=1e-5, atol=1e-6)


def test_float32_does_not_drift(x64):
    """After 2000 steps and 400 merges the Gram matrix is still that of the rows."""
    stream = gradients(2000)
    transformation = optgrad.scale_by_tonga(3, 5, 0.95, 0.1)
    expected, _ = run(transformation, stream)
    found, state = run(transformation, stream, jnp.float32)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.max(error) < 1e-4
    X = flat(state.covariance.rows, leading=1) * np.asarray(state.covariance.weights)[:, None]
    gram = np.asarray(state.covariance.gram)
    assert np.max(np.abs(X @ X.T - gram)) < 1e-5 * np.trace(gram)


def test_zero_gradients_and_no_memory():
    """0 at first, after others, and with γ = 0, where each gradient is alone."""
    stream = np.zeros((6, SIZE))
    stream[3] = 2.0
    for gamma, period in ((0.0, 2), (0.99, 2), (0.99, 10)):
        found, state = run(optgrad.scale_by_tonga(2, period, gamma, 0.5), stream)
        shrink = 0.5 / (2 + period)
        np.testing.assert_allclose(found[3], 2.0 * shrink / (1 + shrink), rtol=1e-5)
        assert not np.any(found[[0, 1, 2, 4, 5]])
        assert not state.rejected


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15])
def test_scale_of_the_gradients(scale, normalize):
    """The normalised direction has it; the other has its inverse, 0 where squares underflow."""
    stream = gradients(15)
    found, state = run(optgrad.scale_by_tonga(3, 4, normalize=normalize), scale * stream)
    expected, _ = run(optgrad.scale_by_tonga(3, 4, normalize=normalize), stream)
    assert not state.rejected
    assert np.all(np.isfinite(found))
    if scale == 1e15:
        factor = scale if normalize else 1 / scale
        np.testing.assert_allclose(found / factor, expected, rtol=1e-3, atol=1e-4)
    elif scale == 1e-30:  # C is 0
        np.testing.assert_allclose(found, scale * stream * normalize, rtol=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_bad_gradients_are_no_samples(number):
    """Nor those whose square is not finite, in any row, also when a merge is due."""
    stream = gradients(14)
    positions = (0, 4, 5, 9)
    bad = np.insert(stream, positions, stream[0], axis=0)
    rows = np.array(positions) + np.arange(4)
    bad[rows, 3] = number
    transformation = optgrad.scale_by_tonga(2, 4, 0.9)
    found, state = run(transformation, bad)
    expected, clean = run(transformation, stream)
    assert not np.any(found[rows])
    np.testing.assert_allclose(np.delete(found, rows, axis=0), expected, rtol=1e-6)
    assert (state.rejected, state.count, state.cost) == (4, 18, 18)
    jax.tree.map(np.testing.assert_array_equal, state.covariance, clean.covariance)


def test_tiny_damping_in_float32():
    """λ below the rounding of G is raised to it: no NaN from a singular matrix."""
    stream = np.repeat(gradients(1), 25, axis=0)
    found, state = run(optgrad.scale_by_tonga(3, 4, damping=1e-20), stream)
    assert not state.rejected
    assert np.all(np.isfinite(found))
    assert state.damping > 0


def test_low_precision_parameters():
    stream = gradients(12)
    transformation = optgrad.scale_by_tonga(3, 4)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), tree(stream[0]))
    state = transformation.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.covariance.rows)} == {jnp.dtype("float32")}
    update = jax.jit(transformation.update)
    updates, state = update(tree(jnp.asarray(stream[0])), state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_merges_under_vmap():
    """With a batched state, at different phases of the period."""
    transformation = optgrad.scale_by_tonga(2, 3)
    streams = [gradients(11, seed) for seed in (0, 1)]
    states = [run(transformation, s[: i + 1])[1] for i, s in enumerate(streams)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)
    update, alone = jax.jit(jax.vmap(transformation.update)), jax.jit(transformation.update)
    for t in range(2, 11):
        grads = [jax.tree.map(jnp.asarray, tree(s[t])) for s in streams]
        found, together = update(jax.tree.map(lambda *x: jnp.stack(x), *grads), together)
        for i in range(2):
            expected, states[i] = alone(grads[i], states[i])
            np.testing.assert_allclose(flat(found, leading=1)[i], flat(expected), atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded(axis_type):
    """Without a gather of anything, on both kinds of mesh."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    rng = np.random.default_rng(0)
    stream = [jnp.asarray(rng.normal(size=(16, 3)), jnp.float32) for _ in range(7)]
    transformation = optgrad.scale_by_tonga(2, 3)
    expected = state = transformation.init(stream[0])
    with jax.set_mesh(mesh):
        place = [jax.device_put(g, sharding) for g in stream]
        sharded = jax.jit(transformation.init)(place[0])
        update = jax.jit(transformation.update)
        assert "all-gather" not in update.lower(place[0], sharded).compile().as_text()
        for g, on_mesh in zip(stream, place, strict=True):
            expected, state = transformation.update(g, state)
            found, sharded = update(on_mesh, sharded)
            assert found.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_diagnostics():
    stream = np.zeros((2, SIZE))
    stream[0, 0], stream[1, 1] = 2.0, 1.0
    _, state = run(optgrad.scale_by_tonga(3, 2, 0.5, 1.0), stream)
    found = {key: float(x) for key, x in optgrad.diagnostics(state).items()}
    np.testing.assert_allclose(found.pop("directions"), 9 / 5, rtol=1e-6)
    np.testing.assert_allclose(found.pop("covariance_max"), 2.0, rtol=1e-6)
    np.testing.assert_allclose(found.pop("damping"), 3 / 5, rtol=1e-6)
    assert found == {"covariance_trace": 3.0, "gradient_equivalents": 2.0, "rejected_steps": 0.0}
    empty = optgrad.diagnostics(optgrad.scale_by_tonga().init(tree(stream[0])))
    assert not any(map(float, empty.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"period": 0}, "period = 0"),
        ({"gamma": 1.0}, "gamma = 1.0"),
        ({"damping": 0.0}, "damping = 0.0"),
        ({"relative": None}, "relative = None"),
        ({"normalize": "yes"}, "normalize = 'yes'"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.tonga(**{"learning_rate": 1.0, **arguments})


# --- the diagonal version ----------------------------------------------------------------------


@pytest.mark.parametrize(("centered", "relative"), FLAGS)
def test_diagonal_follows_its_formula(x64, centered, relative):
    stream = gradients()
    transformation = optgrad.scale_by_inverse_diag_covariance(
        0.9, 0.5, centered=centered, relative=relative
    )
    found, state = run(transformation, stream)
    for t in range(len(stream)):
        weights = 0.9 ** np.arange(t, -1, -1)
        weights /= weights.sum()
        mean = weights @ stream[: t + 1] if centered else 0.0
        c = weights @ (stream[: t + 1] - mean) ** 2
        lam = 0.5 * (c.mean() if relative else 1.0)
        gain = lam / (lam + c) if lam else 1.0  # one sample has no variance
        np.testing.assert_allclose(found[t], gain * stream[t], rtol=1e-9, atol=1e-12)
    summary = optgrad.diagnostics(state)
    np.testing.assert_allclose(summary["variance_max"], c.max(), rtol=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_diagonal_confines_bad_coordinates(number):
    stream = gradients(5)
    bad = stream.copy()
    bad[2, 3] = number
    for centered in (False, True):
        transformation = optgrad.scale_by_inverse_diag_covariance(relative=False, centered=centered)
        found, state = run(transformation, bad)
        expected, _ = run(transformation, stream)
        np.testing.assert_array_equal(np.delete(found, 3, 1), np.delete(expected, 3, 1))
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(flat(state)))


def test_diagonal_of_zeros_and_types():
    transformation = optgrad.scale_by_inverse_diag_covariance(state_dtype=jnp.bfloat16)
    found, state = run(transformation, np.zeros((3, SIZE)))
    assert not np.any(found)
    assert state.variance["a"].dtype == jnp.bfloat16
    nothing = optgrad.scale_by_inverse_diag_covariance()
    assert nothing.update({}, nothing.init({}))[0] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay = 1.0"),
        ({"damping": -1.0}, "damping = -1.0"),
        ({"centered": None}, "centered = None"),
        ({"relative": None}, "relative = None"),
        ({"state_dtype": "int8"}, "state_dtype = 'int8'"),
    ],
)
def test_diagonal_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.scale_by_inverse_diag_covariance(**arguments)

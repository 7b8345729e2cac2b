"""Krylov methods on trees against dense NumPy, on real Hessians and on eight devices."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optgrad.core import linalg, oracles, trees

# --- vectors and bases ------------------------------------------------------------------------


def random_tree(seed=0, dtype=None, lead=()):
    """A tree of 11 numbers in leaves of several shapes, one of them without any."""
    generator = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (4,), "c": (), "none": None, "empty": (0, 2)}
    return {
        key: None if s is None else jnp.asarray(generator.standard_normal((*lead, *s)), dtype)
        for key, s in shapes.items()
    }


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def rows(basis):
    """A basis as a matrix."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(basis)]
    return np.concatenate([x.reshape(len(x), int(np.prod(x.shape[1:]))) for x in leaves], axis=1)


def test_vectors(x64):
    x, y = random_tree(0), random_tree(1)
    a, b = flat(x), flat(y)
    np.testing.assert_allclose(linalg.dot(x, y), a @ b, rtol=1e-13)
    np.testing.assert_allclose(linalg.norm(x), np.sqrt(a @ a), rtol=1e-13)
    np.testing.assert_allclose(flat(linalg.axpy(0.3, x, y)), 0.3 * a + b, rtol=1e-13)
    np.testing.assert_allclose(flat(linalg.scale(-2.0, x)), -2 * a, rtol=1e-13)
    direction, length = linalg.unit(x)
    np.testing.assert_allclose(flat(direction) * float(length), a, rtol=1e-13)
    for condition in (True, False):
        chosen = linalg.where(jnp.asarray(condition), x, y)
        np.testing.assert_array_equal(flat(chosen), a if condition else b)


def test_zero_vector_has_no_direction():
    direction, length = linalg.unit(linalg.zeros_like(random_tree()))
    assert length == 0
    assert not np.any(flat(direction))
    assert linalg.norm({}) == 0


def test_narrow_types_are_widened():
    x = random_tree(dtype=jnp.bfloat16)
    for tree in (linalg.widened(x), linalg.axpy(1.0, x, x), linalg.scale(2.0, x)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert linalg.dot(x, x).dtype == jnp.float32
    basis = linalg.empty_basis(x, 3)
    assert basis["a"].shape == (3, 2, 3)
    assert basis["a"].dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad):
    x = random_tree()
    assert linalg.all_finite(x)
    assert linalg.all_finite({})
    assert not linalg.all_finite({**x, "c": jnp.float32(bad)})


def test_random_unit():
    like = random_tree(dtype=jnp.bfloat16)
    first, second = (linalg.random_unit(jax.random.PRNGKey(i), like) for i in (0, 1))
    assert jax.tree.structure(first) == jax.tree.structure(like)
    assert {x.dtype for x in jax.tree.leaves(first)} == {jnp.dtype("float32")}
    np.testing.assert_allclose([linalg.norm(first), linalg.norm(second)], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(
        flat(first), flat(linalg.random_unit(jax.random.PRNGKey(0), like))
    )
    assert abs(float(linalg.dot(first, second))) < 0.99
    assert linalg.random_unit(jax.random.PRNGKey(0), {}) == {}
    assert not linalg.random_unit(jax.random.PRNGKey(0), jnp.zeros((0, 3))).size


def test_random_units_have_no_preferred_axis():
    """Mean 0 and covariance I/D, whatever the leaf."""
    keys = jax.random.split(jax.random.PRNGKey(3), 3000)
    drawn = jax.jit(jax.vmap(lambda key: linalg.random_unit(key, random_tree())))(keys)
    sample = rows(drawn)
    np.testing.assert_allclose(sample.mean(0), 0.0, atol=0.03)
    np.testing.assert_allclose(sample.T @ sample / len(sample), np.eye(11) / 11, atol=0.01)


def test_bases(x64):
    basis, other = random_tree(2, lead=(3,)), random_tree(3, lead=(2,))
    V, U, x = rows(basis), rows(other), random_tree(4)
    np.testing.assert_allclose(linalg.gram(other, basis), U @ V.T, rtol=1e-12)
    matrix = np.random.default_rng(5).standard_normal((4, 3))
    np.testing.assert_allclose(
        rows(linalg.rotate(jnp.asarray(matrix), basis)), matrix @ V, rtol=1e-12
    )
    np.testing.assert_allclose(trees.project(basis, x), V @ flat(x), rtol=1e-12)
    changed = linalg.set_direction(basis, 1, x)
    expected = V.copy()
    expected[1] = flat(x)
    np.testing.assert_array_equal(rows(changed), expected)
    np.testing.assert_array_equal(flat(linalg.get_direction(changed, 1)), flat(x))
    np.testing.assert_array_equal(rows(linalg.append(basis, x)), np.vstack([V, flat(x)]))
    with pytest.raises(ValueError, match="basis has no leaves"):
        linalg.gram({}, {})


def test_orthogonalize(x64):
    V = np.linalg.qr(np.random.default_rng(0).standard_normal((11, 3)))[0].T
    _, unravel = jax.flatten_util.ravel_pytree(random_tree())
    basis = jax.vmap(unravel)(jnp.asarray(V))
    x = random_tree(1)
    expected = flat(x) - V.T @ (V @ flat(x))
    np.testing.assert_allclose(flat(linalg.orthogonalize(x, basis)), expected, rtol=1e-12)


# --- matrices ---------------------------------------------------------------------------------


def tree_product(matrix, like):
    """v -> Av on trees, for a dense matrix."""
    _, unravel = jax.flatten_util.ravel_pytree(like)

    def product(v):
        x = jax.flatten_util.ravel_pytree(v)[0]
        a = jnp.asarray(matrix, x.dtype)
        return unravel(jnp.matmul(a, x, precision=jax.lax.Precision.HIGHEST))

    return product


@functools.partial(jax.jit, static_argnums=2)
def run_dense(matrix, start, count):
    """Lanczos' method on a dense matrix."""
    return linalg.lanczos(tree_product(matrix, start), start, count)


@jax.jit
def extend_dense(matrix, space, x):
    return linalg.extend(space, tree_product(matrix, x), x)


@functools.partial(jax.jit, static_argnums=2)
def solve_dense(matrix, b, max_iterations, tolerance, radius=None, start=None, inverse=None):
    """Conjugate gradients on a dense matrix, with a dense preconditioner."""
    return linalg.conjugate_gradients(
        tree_product(matrix, b),
        b,
        max_iterations,
        tolerance,
        radius=radius,
        start=start,
        preconditioner=None if inverse is None else tree_product(inverse, b),
    )


def symmetric(size, seed=0, spectrum=None):
    generator = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(generator.standard_normal((size, size)))
    values = generator.standard_normal(size) if spectrum is None else np.asarray(spectrum)
    return axes @ np.diag(values) @ axes.T


def network():
    """Parameters and loss of a small network (D = 321), as a user has them."""
    generator = np.random.default_rng(0)
    sizes = [(1, 16), (16, 16), (16, 1)]
    params = [
        {
            "w": jnp.asarray(generator.standard_normal(s) / np.sqrt(s[0]), jnp.float32),
            "b": jnp.zeros(s[1], jnp.float32),
        }
        for s in sizes
    ]
    x = jnp.linspace(-1.0, 1.0, 64)[:, None]
    y = jnp.sin(3 * x)

    def loss(params):
        hidden = x
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
        return jnp.mean((hidden @ params[-1]["w"] + params[-1]["b"] - y) ** 2)

    return params, loss


@functools.cache
def network_space(count):
    """Lanczos vectors of the network's Hessian in float32, and the dense Hessian."""
    params, loss = network()

    @jax.jit
    def run(params):
        product = oracles.hessian_product(loss, params)
        space = linalg.lanczos(product, jax.grad(loss)(params), count)
        return space, oracles.dense_matrix(product, params)

    space, hessian = run(params)
    return space, np.asarray(hessian)


# --- Lanczos ----------------------------------------------------------------------------------


def test_orthogonal_in_float32():
    """Acceptance test 6: sixty vectors of a real Hessian; without the passes it would be 0.5."""
    space, _ = network_space(60)
    V = rows(space.basis)
    assert V.shape == (60, 321)
    assert np.abs(V @ V.T - np.eye(60)).max() < 1e-5


def test_projected_matrix_in_float32():
    """T is VᵀAV, and its ends are those of the spectrum."""
    space, hessian = network_space(60)
    V, T = rows(space.basis), np.asarray(space.projected)
    size = np.abs(np.linalg.eigvalsh(hessian)).max()
    np.testing.assert_allclose(T, V @ hessian @ V.T, atol=3e-6 * size)
    np.testing.assert_array_equal(T, T.T)
    assert not np.any(np.triu(T, 2))
    ritz, exact = np.linalg.eigvalsh(T), np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(ritz[[0, -1]], exact[[0, -1]], atol=1e-5 * size)
    assert exact[0] < -1e-3 * size  # both ends, one of them negative
    assert 0.1 * size < space.scale <= 1.0001 * size


def lanczos(matrix, start, count):
    """The three-term recursion on paper, with full orthogonalisation."""
    V, T = np.zeros((count, len(start))), np.zeros((count, count))
    q = start / np.linalg.norm(start)
    for i in range(count):
        V[i] = q
        w = matrix @ q
        T[i, i] = q @ w
        for _ in range(2):
            w = w - V.T @ (V @ w)
        if i + 1 < count:
            T[i, i + 1] = T[i + 1, i] = np.linalg.norm(w)
            q = w / np.linalg.norm(w)
    return V, T


@pytest.mark.parametrize("count", [1, 4, 11])
def test_follows_the_recursion(x64, count):
    like, matrix = random_tree(), symmetric(11)
    space = run_dense(matrix, like, count)
    V, T = lanczos(matrix, flat(like), count)
    np.testing.assert_allclose(rows(space.basis), V, atol=1e-10)
    np.testing.assert_allclose(space.projected, T, atol=1e-10)
    np.testing.assert_allclose(space.scale, np.linalg.norm(matrix @ V.T, axis=0).max(), rtol=1e-10)


def test_more_vectors_than_entries():
    """k > D: an invariant space, then rows of zeros."""
    like, matrix = random_tree(dtype=jnp.float32), symmetric(11)
    space = run_dense(matrix, like, 20)
    V, T = rows(space.basis), np.asarray(space.projected)
    assert np.all(np.isfinite(V))
    np.testing.assert_allclose(V[:11] @ V[:11].T, np.eye(11), atol=1e-5)
    assert not np.any(V[11:])
    assert not np.any(T[11:])
    np.testing.assert_allclose(
        np.linalg.eigvalsh(T[:11, :11]), np.linalg.eigvalsh(matrix), atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_breakdown(request, rank, dtype):
    """A matrix of low rank: its range, the part of the start outside of it, and zeros."""
    if dtype == np.float64:
        request.getfixturevalue("x64")
    matrix = symmetric(11, spectrum=[*range(1, rank + 1), *[0] * (11 - rank)])
    like = random_tree(dtype=dtype)
    space = run_dense(matrix, like, 8)
    V, T = rows(space.basis), np.asarray(space.projected)
    used = np.linalg.norm(V, axis=1) > 0.5
    assert used.tolist() == [True] * (rank + 1) + [False] * (7 - rank)
    assert not np.any(V[~used])
    assert not np.any(T[~used])
    ritz = np.linalg.eigvalsh(T)
    np.testing.assert_allclose(ritz[-rank:], range(1, rank + 1), rtol=1e-5)
    np.testing.assert_allclose(ritz[:-rank], 0.0, atol=1e-5)


def test_zero_start_is_an_empty_space():
    like = linalg.zeros_like(random_tree())
    space = run_dense(symmetric(11), like, 4)
    for x in jax.tree.leaves(space):
        assert not np.any(x)
    values, _ = linalg.eigh(space.projected)
    np.testing.assert_array_equal(values, 0.0)


def test_zero_matrix():
    """One direction, without a curvature."""
    space = linalg.lanczos(linalg.zeros_like, random_tree(), 4)
    assert np.linalg.norm(rows(space.basis), axis=1) == pytest.approx([1, 0, 0, 0], rel=1e-6)
    assert not np.any(space.projected)


def test_non_finite_product_spoils_no_control_flow():
    like = random_tree()
    space = linalg.lanczos(lambda v: linalg.scale(jnp.nan, v), like, 4)
    values, _ = linalg.eigh(space.projected)
    assert np.all(np.isnan(values))


def test_lanczos_under_vmap():
    matrix = symmetric(11)
    starts = random_tree(7, lead=(3,))

    def run(start):
        return run_dense(matrix, start, 4)

    together = jax.vmap(run)(starts)
    for i in range(3):
        alone = run(jax.tree.map(lambda x, i=i: x[i], starts))
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-5)


def test_extend(x64):
    """One row more, with a full row and column of the projected matrix."""
    like, matrix = random_tree(), symmetric(11)
    space = run_dense(matrix, like, 4)
    x = random_tree(9)
    wide = extend_dense(matrix, space, x)
    V = rows(wide.basis)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(V.T @ (V @ flat(x)), flat(x) - residual(V, flat(x)), atol=1e-12)
    np.testing.assert_allclose(residual(V, flat(x)), 0.0, atol=1e-12)
    np.testing.assert_allclose(wide.projected, V @ matrix @ V.T, atol=1e-12)
    assert abs(wide.projected[0, 4]) < 1e-12 < abs(wide.projected[3, 4])
    assert wide.scale >= space.scale


def residual(V, x):
    return x - V.T @ (V @ x)


@pytest.mark.parametrize("case", ["inside", "nearly inside", "zero"])
def test_extend_by_nothing_new(case):
    """What lies in the space already, but for a thousandth, gets a row of zeros."""
    like, matrix = random_tree(dtype=jnp.float32), symmetric(11)
    space = run_dense(matrix, like, 4)
    inside = trees.combine(jnp.array([1.0, 2.0, -1.0, 0.5]), space.basis)
    other = linalg.orthogonalize(random_tree(9), space.basis)
    x = {
        "inside": inside,
        "nearly inside": linalg.axpy(5e-4 / linalg.norm(other), other, inside),
        "zero": linalg.zeros_like(like),
    }[case]
    wide = extend_dense(matrix, space, x)
    assert not np.any(rows(wide.basis)[4])
    assert not np.any(wide.projected[4])
    assert not np.any(wide.projected[:, 4])
    np.testing.assert_array_equal(wide.projected[:4, :4], space.projected)
    np.testing.assert_array_equal(wide.scale, space.scale)
    more = linalg.axpy(5e-3 / linalg.norm(other), other, inside)
    assert np.any(rows(extend_dense(matrix, space, more).basis)[4])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_eigh(bad):
    matrix = symmetric(5).astype(np.float32)
    values, vectors = linalg.eigh(jnp.asarray(matrix + np.triu(np.ones((5, 5)), 1)))
    expected = matrix + 0.5 * (np.ones((5, 5)) - np.eye(5))
    rebuilt = np.asarray(vectors) @ np.diag(values) @ np.asarray(vectors).T
    np.testing.assert_allclose(rebuilt, expected, atol=1e-5)
    values, vectors = linalg.eigh(jnp.asarray(matrix).at[1, 2].set(bad))
    assert np.all(np.isnan(values))
    assert np.all(np.isfinite(vectors))


# --- conjugate gradients ----------------------------------------------------------------------


def steihaug(matrix, b, max_iterations, tolerance, radius=None, start=None, inverse=None):
    """Steihaug's algorithm for min ½xᵀAx − bᵀx in |x| ≤ radius, on paper."""
    inverse = np.eye(len(b)) if inverse is None else inverse
    x = np.zeros(len(b)) if start is None else start.copy()
    r = b - matrix @ x
    z = inverse @ r
    p, largest, negative, boundary, i = z.copy(), 0.0, False, False, 0
    while i < max_iterations and np.linalg.norm(r) > tolerance:
        i += 1
        Ap = matrix @ p
        curvature = p @ Ap
        largest = max(largest, abs(curvature) / (p @ p))
        negative = bool(curvature <= np.finfo(float).eps * (p @ p) * largest)
        alpha = (r @ z) / curvature if not negative else 0.0
        outside = radius is not None and (negative or np.linalg.norm(x + alpha * p) >= radius)
        if outside:
            # The positive root of |x + τp|² = Δ².
            alpha = max(np.roots([p @ p, 2 * x @ p, x @ x - radius**2]).real)
            boundary = True
        elif negative:
            alpha = 1.0 if i == 1 and not np.any(x) else 0.0
        x = x + alpha * p
        new = r - alpha * Ap
        new_z = inverse @ new
        p = new_z + (new @ new_z) / (r @ z) * p
        r, z = new, new_z
        if outside or negative:
            break
    return x, r, i, negative, boundary


SPECTRA = {
    "positive": np.linspace(0.5, 5.0, 11),
    "one negative": np.array([-0.3, *np.linspace(0.5, 5.0, 10)]),
    "all negative": -np.linspace(0.5, 5.0, 11),
    "singular": np.array([*[0.0] * 4, *np.linspace(0.5, 5.0, 7)]),
}


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("radius", [None, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_follows_steihaug(x64, spectrum, radius, started, preconditioned):
    like = random_tree()
    matrix = symmetric(11, seed=3, spectrum=SPECTRA[spectrum])
    inverse = np.diag(np.linspace(0.5, 2.0, 11)) if preconditioned else np.eye(11)
    start = linalg.scale(0.02, random_tree(5)) if started else None
    found = solve_dense(matrix, like, 7, 1e-3, radius, start, inverse if preconditioned else None)
    x, r, iterations, negative, boundary = steihaug(
        matrix, flat(like), 7, 1e-3, radius, None if start is None else flat(start), inverse
    )
    np.testing.assert_allclose(flat(found.solution), x, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(flat(found.residual), r, rtol=1e-9, atol=1e-9)
    assert (found.iterations, found.negative_curvature, found.hit_boundary) == (
        iterations,
        negative,
        boundary,
    )
    np.testing.assert_allclose(flat(like) - matrix @ flat(found.solution), r, atol=1e-9)
    if radius is not None:
        assert np.linalg.norm(x) <= radius * (1 + 1e-12)


def test_cases_are_all_there():
    """The transcription takes every exit in the test above."""
    b, exits = flat(random_tree()), set()
    for spectrum in SPECTRA.values():
        for radius in (None, 0.5, 2.0, 100.0):
            *_, iterations, negative, boundary = steihaug(
                symmetric(11, seed=3, spectrum=spectrum), b, 7, 1e-3, radius
            )
            exits.add((iterations == 1, negative, boundary))
    assert {(True, True, False), (True, True, True), (False, False, True)} <= exits
    assert {(False, False, False), (False, True, False), (False, True, True)} <= exits


def test_decrease_of_the_model(x64):
    """½(xᵀb + xᵀr) from a start at 0, wherever it ended."""
    like = random_tree()
    for spectrum, radius in (("positive", None), ("one negative", 2.0), ("positive", 0.5)):
        matrix = symmetric(11, seed=3, spectrum=SPECTRA[spectrum])
        found = solve_dense(matrix, like, 6, 1e-3, radius)
        x = flat(found.solution)
        short = 0.5 * (linalg.dot(found.solution, like) + linalg.dot(*found[:2]))
        np.testing.assert_allclose(short, flat(like) @ x - 0.5 * x @ matrix @ x, rtol=1e-10)


def test_start_at_zero_is_no_start(x64):
    """Negative curvature at once returns b, whether the zero is given or not."""
    like = random_tree()
    matrix = symmetric(11, seed=3, spectrum=SPECTRA["all negative"])
    given = solve_dense(matrix, like, 7, 1e-3, None, linalg.zeros_like(like))
    np.testing.assert_array_equal(flat(given.solution), flat(like))
    elsewhere = solve_dense(matrix, like, 7, 1e-3, None, linalg.scale(0.1, like))
    np.testing.assert_array_equal(flat(elsewhere.solution), 0.1 * flat(like))


@pytest.mark.parametrize("radius", [None, 1.0])
@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_zero_right_hand_side(radius, tolerance):
    zero = linalg.zeros_like(random_tree())
    for matrix in (symmetric(11), -np.eye(11), np.zeros((11, 11))):
        found = solve_dense(matrix, zero, 5, tolerance, radius)
        assert not np.any(flat(found.solution))
        assert found.iterations == 0


@pytest.mark.parametrize("radius", [None, 1.0])
def test_nan_product_ends_it(radius):
    """At the first one; the flag of negative curvature tells so, and the caller sees the NaN."""
    like = random_tree()
    found = linalg.conjugate_gradients(
        lambda v: linalg.scale(jnp.nan, v), like, 50, 1e-6, radius=radius
    )
    assert found.iterations == 1
    assert found.negative_curvature
    assert np.all(np.isnan(flat(found.residual)))


def test_float32_stops_at_the_tolerance():
    like = random_tree(dtype=jnp.float32)
    matrix = symmetric(11, spectrum=np.logspace(-3, 0, 11))
    found = solve_dense(matrix, like, 500, 1e-4)
    assert linalg.norm(found.residual) <= 1e-4
    assert found.iterations < 100
    assert not found.negative_curvature


def test_bfloat16_right_hand_side():
    """Everything is float32 from there on."""
    like = random_tree(dtype=jnp.bfloat16)
    found = linalg.conjugate_gradients(
        tree_product(2.0 * np.eye(11), linalg.widened(like)), like, 5, 1e-6
    )
    assert found.solution["a"].dtype == jnp.float32
    np.testing.assert_allclose(flat(found.solution), flat(like) / 2, rtol=1e-6)


def test_conjugate_gradients_under_vmap():
    """Each lane ends where it would alone."""
    like = random_tree()
    matrices = np.stack([symmetric(11, spectrum=s) for s in SPECTRA.values()])

    def run(matrix):
        return solve_dense(matrix, like, 9, 1e-3, 2.0)

    together = jax.vmap(run)(jnp.asarray(matrices, jnp.float32))
    for i, matrix in enumerate(matrices):
        alone = run(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_array_equal(together.iterations[i], alone.iterations)
        np.testing.assert_allclose(
            together.solution["a"][i], alone.solution["a"], rtol=1e-4, atol=1e-5
        )


# --- gain ratio -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "predicted", "expected"),
    [
        (3.0, 2.0, 2.0, 0.5),
        (3.0, 4.0, 2.0, -0.5),
        (3.0, 2.0, -1.0, -1.0),  # the model promises an increase
        (3.0, 2.0, 0.0, -1.0),
        (3.0, np.nan, 1.0, -1.0),
        (3.0, np.inf, 1.0, -1.0),
        (np.nan, 1.0, 1.0, -1.0),
        (3.0, 2.0, np.nan, -1.0),
        (3.0, 2.0, np.inf, -1.0),
        (0.0, 0.0, 0.0, 1.0),
        # Roundings of float32: 10·1.2e-7·1000 = 1.2e-3.
        (1000.0, 1000.001, 1e-4, 1.0),
        (1000.0, 1000.001, -1e-4, -1.0),
        (1000.0, 1000.001, 0.01, -0.1),  # the model promised what could be seen
        (1000.0, 1000.01, 1e-4, -100.0),  # and the loss rose visibly
    ],
)
def test_gain_ratio(before, after, predicted, expected):
    found = linalg.gain_ratio(*map(jnp.float32, (before, after, predicted)))
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_gain_ratio_floor_follows_the_type(x64):
    """In float64 a thousandth in a thousand is no rounding."""
    found = linalg.gain_ratio(*map(jnp.float64, (1000.0, 1000.001, 1e-4)))
    np.testing.assert_allclose(found, -10.0, rtol=1e-6)


# --- eight devices ----------------------------------------------------------------------------

DEVICES = 8
SHARDED = {"w": (16, 3), "b": (8,)}


@pytest.fixture(scope="module", params=["auto", "explicit"])
def mesh(request):
    devices = jax.devices("cpu")
    assert len(devices) >= DEVICES, "tests/conftest.py sets XLA_FLAGS before jax starts"
    types = (AxisType.Explicit if request.param == "explicit" else AxisType.Auto,)
    return Mesh(np.array(devices[:DEVICES]), ("data",), axis_types=types)


def placed(tree, mesh):
    """The first axis of each leaf over the devices."""

    def put(x):
        spec = PartitionSpec("data", *[None] * (x.ndim - 1))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def sharded_problem():
    generator = np.random.default_rng(0)
    params = {k: jnp.asarray(generator.standard_normal(s)) for k, s in SHARDED.items()}

    def loss(p):
        """Curvatures of both signs, no two the same, every parameter coupled with all."""
        weights = {k: 1 + np.arange(np.prod(s)).reshape(s) for k, s in SHARDED.items()}
        total = sum(jnp.sum(p[k]) for k in p)
        squares = sum(jnp.sum(weights[k] * p[k] ** 2) for k in p)
        return 0.01 * squares - 0.5 * total**2 + 0.1 * sum(jnp.sum(jnp.cos(p[k])) for k in p)

    return params, loss


def run_lanczos(params):
    _, loss = sharded_problem()
    product = oracles.hessian_product(loss, params)
    space = linalg.lanczos(product, jax.grad(loss)(params), 6)
    return linalg.extend(space, product, linalg.random_unit(jax.random.PRNGKey(0), params))


def run_conjugate_gradients(params):
    _, loss = sharded_problem()
    product = oracles.hessian_product(loss, params)
    return linalg.conjugate_gradients(product, jax.grad(loss)(params), 6, 1e-3, radius=20.0)


def run_gram(params):
    _, loss = sharded_problem()
    space = linalg.lanczos(oracles.hessian_product(loss, params), params, 4)
    grams = linalg.gram(space.basis, linalg.rotate(space.projected, space.basis))
    return space.basis, grams


@pytest.mark.parametrize("run", [run_lanczos, run_conjugate_gradients, run_gram])
def test_sharded(mesh, run):
    """The numbers of one device, each vector and basis where the parameters are, no all-gather."""
    params, _ = sharded_problem()
    expected = jax.jit(run)(params)
    arguments = placed(params, mesh)
    compiled = jax.jit(run).lower(arguments).compile()
    found = compiled(arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4)
    hlo = compiled.as_text()
    assert "all-reduce" in hlo
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert name not in hlo
    shardings = {x.shape: x.sharding for x in jax.tree.leaves(arguments)}
    vectors = 0
    for x in jax.tree.leaves(found):
        for shape, sharding in shardings.items():
            if x.ndim > 0 and x.shape[-len(shape) :] == shape and x.shape not in ((8, 8),):
                lead = x.ndim - len(shape)
                spec = PartitionSpec(*[None] * lead, *sharding.spec)
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
                vectors += 1
    assert vectors >= 2

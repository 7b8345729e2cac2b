"""K-FAC against factors built by hand, explicit Fisher matrices and a transcription."""

import functools
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import optgrad
from optgrad import LayerStatistics
from optgrad.curvature import kfac_layers

EPS = np.finfo(np.float64).eps


# --- a transcription ---------------------------------------------------------------------------


def homogeneous(activations, has_bias):
    """Rows ã of all examples and positions."""
    rows = np.asarray(activations, np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    return np.column_stack([rows, np.ones(len(rows))]) if has_bias else rows


def factors_of(statistics, has_bias):
    """Section 3 of Grosse & Martens: sums over positions in Ω, means in Γ."""
    a = homogeneous(statistics.activations, has_bias)
    s = np.asarray(statistics.gradients, np.float64)
    n, positions = len(s), int(np.prod(s.shape[1:-1]))
    s = s.reshape(-1, s.shape[-1])
    return a.T @ a / n, s.T @ s / (n * positions)


class Box:
    """Spec 5.11 for layers given as matrices (in + 1, out)."""

    def __init__(self, lr, damping=1e-2, momentum=0.9, decay=0.95, kl_clip=1e-2, period=10):
        self.lr, self.damping, self.momentum = lr, damping, momentum
        self.decay, self.kl_clip, self.period = decay, kl_clip, period
        self.t, self.factors, self.inverses, self.velocity = 0, {}, {}, {}

    def __call__(self, grads, statistics):
        beta = min(self.decay, 1 - 1 / (self.t + 1))
        for path, g in grads.items():
            rows = np.asarray(statistics[path].activations).shape[-1]
            new = factors_of(statistics[path], has_bias=len(g) > rows)
            old = self.factors.get(path, new)
            self.factors[path] = [beta * x + (1 - beta) * y for x, y in zip(old, new, strict=True)]
        if self.t % self.period == 0:
            self.inverses = {path: self.damped(*f) for path, f in self.factors.items()}
        directions = {k: self.inverses[k][0] @ g @ self.inverses[k][1] for k, g in grads.items()}
        along = sum(np.sum(v * grads[k]) for k, v in directions.items())
        nu = min(1, np.sqrt(self.kl_clip / (self.lr**2 * along)))
        self.t += 1
        for k, v in directions.items():
            self.velocity[k] = self.momentum * self.velocity.get(k, 0) + nu * v
        return {k: -self.lr * v for k, v in self.velocity.items()}

    def damped(self, a, s):
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
        root = np.sqrt(self.damping)
        return (
            np.linalg.inv(a + pi * root * np.eye(len(a))),
            np.linalg.inv(s + root / pi * np.eye(len(s))),
        )


def matrices(tree):
    """The layers of a dictionary of layers, as matrices."""
    return {
        path: np.asarray(kfac_layers.matrix(block), np.float64)
        for path, block in tree.items()
        if "kernel" in block
    }


# --- problems ----------------------------------------------------------------------------------


def layered(dtype=float, seed=0):
    """Parameters of a dense layer, one without bias, a convolution, and a leaf of no layer."""
    generator = np.random.default_rng(seed)
    shapes = {
        "conv": {"kernel": (2, 3, 2, 4), "bias": (4,)},
        "dense": {"kernel": (5, 3), "bias": (3,)},
        "norm": {"scale": (3,)},
        "plain": {"kernel": (3, 2)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(generator.standard_normal(s), dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def random_statistics(seed, dtype=float, n=7):
    generator = np.random.default_rng(seed)

    def one(positions, rows, columns):
        return LayerStatistics(
            *(
                jnp.asarray(generator.standard_normal((n, *positions, k)), dtype)
                for k in (rows, columns)
            )
        )

    return {"conv": one((4, 2), 12, 4), "dense": one((), 5, 3), "plain": one((6,), 3, 2)}


OPTIONS = {
    "defaults": {},
    "every_step": {"period": 1, "kl_clip": np.inf},
    "others": {"damping": 0.3, "decay": 0.5, "momentum": 0.5, "period": 3, "kl_clip": 1e-3},
}


@pytest.mark.parametrize("options", list(OPTIONS))
def test_follows_the_specification(x64, options):
    """Averages, damping, amortised inverses, clip and momentum over 23 steps."""
    options = OPTIONS[options]
    optimizer, box = optgrad.kfac(0.05, **options), Box(0.05, **options)
    params = layered()
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p, k: optimizer.update(g, s, p, kfac_stats=k))
    clipped = []
    for t in range(23):
        grads, statistics = layered(seed=t + 1), random_statistics(t)
        updates, state = update(grads, state, params, statistics)
        expected = box(matrices(grads), statistics)
        for path, found in matrices(updates).items():
            np.testing.assert_allclose(found, expected[path], rtol=1e-10, atol=1e-12)
        clipped.append(float(state.step_size) < 0.05)
    assert any(clipped) == (options.get("kl_clip") != np.inf)
    assert (int(state.count), int(state.rejected), float(state.cost)) == (23, 0, 46.0)
    for path, (a, s) in box.factors.items():
        np.testing.assert_allclose(state.curvature.factors[path].activations, a, rtol=1e-10)
        np.testing.assert_allclose(
            state.curvature.factors[path].gradients, s, rtol=1e-10, atol=1e-13
        )


def test_schedules(x64):
    """Every number may be a schedule."""
    names = {"damping": 0.1, "momentum": 0.5, "decay": 0.8, "kl_clip": 0.5}
    schedules = {k: lambda t, v=v: v / (1 + t) for k, v in names.items()}
    optimizer = optgrad.kfac(lambda t: 0.1 / (1 + t), **schedules, period=2)
    box = Box(0.1, period=2)
    params = layered()
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, k: optimizer.update(g, s, params, kfac_stats=k))
    for t in range(5):
        box.lr = 0.1 / (1 + t)
        for name, value in names.items():
            setattr(box, name, value / (1 + t))
        grads, statistics = layered(seed=t + 1), random_statistics(t)
        updates, state = update(grads, state, statistics)
        expected = box(matrices(grads), statistics)
        for path, found in matrices(updates).items():
            np.testing.assert_allclose(found, expected[path], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.damping, 0.1 / (1 + t))


def test_scale_by_kfac(x64):
    """The preconditioner alone: no momentum, no clip; other leaves keep their gradient."""
    optimizer = optgrad.scale_by_kfac(0.1, period=1)
    box = Box(1.0, 0.1, momentum=0.0, kl_clip=np.inf, period=1)
    params = layered()
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, k: optimizer.update(g, s, params, kfac_stats=k))
    for t in range(3):
        grads, statistics = layered(seed=t + 1), random_statistics(t)
        updates, state = update(grads, state, statistics)
        expected = box(matrices(grads), statistics)
        for path, found in matrices(updates).items():
            np.testing.assert_allclose(found, -expected[path], rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(updates["norm"]["scale"], grads["norm"]["scale"])
    assert float(state.diagnostics()["gradient_equivalents"]) == 6.0


# --- the Fisher matrix -------------------------------------------------------------------------


def natural(optimizer, params, grads, statistics):
    """The first step, in one flat vector per layer."""
    updates, _ = optimizer.update(grads, optimizer.init(params), params, kfac_stats=statistics)
    return {k: np.ravel(v) for k, v in matrices(updates).items()}


def empirical_blocks(statistics, layers):
    """(1/n)Σ vec(∇ᵢ)vec(∇ᵢ)ᵀ of each layer, row by row of (in + 1, out)."""
    blocks = {}
    for path, has_bias in layers.items():
        found = statistics[path]
        n = len(found.gradients)
        a = homogeneous(found.activations, has_bias)
        a = a.reshape(n, -1, a.shape[-1])
        s = np.asarray(found.gradients).reshape(n, a.shape[1], -1)
        grads = np.einsum("nti,nto->nio", a, s).reshape(n, -1)
        blocks[path] = grads.T @ grads / n
    return blocks


def test_fisher_of_one_example(x64):
    """With one example the Fisher block of a dense layer is the Kronecker product, exactly."""
    params = layered()
    statistics = random_statistics(3, n=1)
    statistics["plain"] = jax.tree.map(lambda x: x[:, 0], statistics["plain"])
    dense = {"dense": True, "plain": False}
    for path, block in empirical_blocks(statistics, dense).items():
        a, s = factors_of(statistics[path], dense[path])
        np.testing.assert_allclose(np.kron(a, s), block, rtol=1e-12, atol=1e-14)
        layer = {path: params[path]}
        grads = jax.tree.map(jnp.sin, layer)
        found = natural(plain_kfac(0.1), layer, grads, {path: statistics[path]})[path]
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
        eye_a, eye_s = (np.eye(len(x)) for x in (a, s))
        # (Ā + π√λ)⊗(S + √λ/π) = Ā⊗S + λI + the two cross terms of factored damping
        cross = np.sqrt(0.1) * (np.kron(a, eye_s) / pi + np.kron(eye_a, s) * pi)
        matrix = block + 0.1 * np.eye(len(block)) + cross
        expected = -np.linalg.solve(matrix, np.ravel(matrices(grads)[path]))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def plain_kfac(damping):
    return optgrad.kfac(1.0, damping=damping, momentum=0.0, kl_clip=np.inf)


def test_deep_linear_network(x64):
    """With Gaussian targets the outputs' gradients are independent of the inputs: the block of
    each layer of a linear network is Ā ⊗ WWᵀ, which the statistics approach."""
    generator = np.random.default_rng(0)
    w1, w2 = generator.standard_normal((3, 4)), generator.standard_normal((4, 2))
    params = {"first": {"kernel": jnp.asarray(w1)}, "second": {"kernel": jnp.asarray(w2)}}
    x = jnp.asarray(generator.standard_normal((4000, 3)) @ generator.standard_normal((3, 3)))

    def apply(params, x, taps):
        hidden = x @ params["first"]["kernel"] + taps["first"]
        return hidden @ params["second"]["kernel"] + taps["second"], {"first": x, "second": hidden}

    found = optgrad.layer_statistics(apply, params, x, key=jax.random.key(0), likelihood="squared")
    hidden = np.asarray(x) @ w1
    for path, inputs, outputs in (("first", x, w2 @ w2.T), ("second", hidden, np.eye(2))):
        a, s = factors_of(found[path], has_bias=False)
        np.testing.assert_allclose(a, np.asarray(inputs).T @ inputs / len(x), rtol=1e-9)
        np.testing.assert_allclose(s, outputs, atol=0.1 * np.abs(outputs).max())
        block = empirical_blocks(found, {path: False})[path]
        error = np.linalg.norm(block - np.kron(a, outputs)) / np.linalg.norm(block)
        assert error < 0.15


def test_convolution_with_one_pixel_is_dense(x64):
    """The same factors and step; a kernel of 4 axes is a matrix of rows (h, w, cin)."""
    params = layered()["conv"]
    statistics = random_statistics(0)["dense"]
    generator = np.random.default_rng(5)
    statistics = LayerStatistics(
        jnp.asarray(generator.standard_normal((6, 1, 1, 12))),
        jnp.asarray(generator.standard_normal((6, 1, 1, 4))),
    )
    grads = jax.tree.map(jnp.cos, params)
    flat = jax.tree.map(lambda x: x.reshape(-1, 4) if x.ndim == 4 else x, (params, grads))
    squeezed = jax.tree.map(lambda x: x[:, 0, 0], statistics)
    optimizer = plain_kfac(0.1)
    conv = natural(optimizer, {"l": params}, {"l": grads}, {"l": statistics})
    dense = natural(optimizer, {"l": flat[0]}, {"l": flat[1]}, {"l": squeezed})
    np.testing.assert_allclose(conv["l"], dense["l"], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_linear_least_squares_in_one_step(x64, dtype):
    """S = I: the Kronecker product is the Hessian; the step goes to the minimum."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((50, 6))
    solution = 4 * generator.standard_normal((7, 3))
    y = np.column_stack([x, np.ones(50)]) @ solution
    x, y = (jnp.asarray(v, dtype) for v in (x, y))
    params = {"l": {"kernel": jnp.zeros((6, 3), dtype), "bias": jnp.zeros(3, dtype)}}

    def loss(params):
        outputs = x @ params["l"]["kernel"] + params["l"]["bias"]
        return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, -1))

    gradients = np.sqrt(50) * np.eye(3)[np.arange(50) % 3]  # of which the mean square is not I
    gradients *= np.sqrt(1 / np.bincount(np.arange(50) % 3))[np.arange(50) % 3][:, None]
    statistics = {"l": LayerStatistics(x, jnp.asarray(gradients, dtype))}
    np.testing.assert_allclose(factors_of(statistics["l"], True)[1], np.eye(3), atol=1e-6)
    optimizer = plain_kfac(1e-8)
    updates, _ = optimizer.update(
        jax.grad(loss)(params), optimizer.init(params), params, kfac_stats=statistics
    )
    before, after = loss(params), loss(optax.apply_updates(params, updates))
    assert before > 50
    assert after < 1e-6 * before


# --- inverses ----------------------------------------------------------------------------------


def scan_of(optimizer, steps):
    """A run on random gradients, from ``init`` on, and the number of inversions in its HLO."""

    def run(seed):
        key = jax.random.key(seed)
        params = {"l": {"kernel": jax.random.normal(key, (5, 3))}}

        def body(carry, key):
            params, state = carry
            a, s, g = (
                jax.random.normal(k, shape)
                for k, shape in zip(jax.random.split(key, 3), [(9, 5), (9, 3), (5, 3)], strict=True)
            )
            grads = {"l": {"kernel": g}}
            updates, state = optimizer.update(
                grads, state, params, kfac_stats={"l": LayerStatistics(a, s)}
            )
            return (optax.apply_updates(params, updates), state), state.curvature.inverses

        carry = (params, optimizer.init(params))
        return jax.lax.scan(body, carry, jax.random.split(key, steps))

    return run


@pytest.fixture(scope="module")
def amortised():
    return scan_of(optgrad.kfac(0.1, period=4), 10)


def test_inverses_are_amortised(amortised):
    """They change at the first of every four steps, and at no other."""
    _, inverses = jax.jit(amortised)(0)
    flat = np.asarray(inverses["l"].activations)
    changed = [not np.array_equal(x, y) for x, y in itertools.pairwise(flat)]
    assert [t + 1 for t, c in enumerate(changed) if c] == [4, 8]


def test_vmap_equals_loop_and_keeps_the_branch(amortised):
    """With the state made inside, the inversions stay in a branch that is not taken."""
    together, _ = jax.jit(jax.vmap(amortised))(jnp.arange(3))
    for seed in range(3):
        alone, _ = jax.jit(amortised)(seed)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[seed], y, rtol=2e-4, atol=2e-5)
    jaxpr = jax.make_jaxpr(jax.vmap(amortised))(jnp.arange(3)).jaxpr
    found = [outer for name, outer in operations(jaxpr) if name == "cholesky" and "scan" in outer]
    assert found
    assert all("while" in outer for outer in found)


def operations(jaxpr, outer=()):
    """Every operation's name, and the names of those that it is inside of."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, outer
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from operations(inner, (*outer, name))


@pytest.mark.parametrize("where", ["gradient", "statistics", "fallback"])
@pytest.mark.parametrize("method", [optgrad.kfac, optgrad.scale_by_kfac])
def test_non_finite_steps_are_not_taken(where, method):
    """Zero updates, counted; what was known before is kept, and used again."""
    params = layered(jnp.float32)
    grads, statistics = layered(jnp.float32, seed=1), random_statistics(0, jnp.float32)
    optimizer = method(damping=1e-2, period=1)
    update = jax.jit(lambda g, s, k: optimizer.update(g, s, params, kfac_stats=k))
    _, state = update(grads, optimizer.init(params), statistics)
    bad_grads, bad_statistics = grads, statistics
    if where == "statistics":
        broken = statistics["dense"].gradients.at[0, 0].set(jnp.nan)
        bad_statistics = {**statistics, "dense": LayerStatistics(statistics["dense"][0], broken)}
    else:
        leaf = ("dense", "kernel") if where == "gradient" else ("norm", "scale")
        broken = grads[leaf[0]][leaf[1]].at[0].set(jnp.inf)
        bad_grads = {**grads, leaf[0]: {**grads[leaf[0]], leaf[1]: broken}}
    updates, later = update(bad_grads, state, bad_statistics)
    if where == "fallback" and method is optgrad.scale_by_kfac:
        return  # it passes other leaves through
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert (int(later.rejected), int(later.count)) == (1, 2)
    if where != "fallback":
        kept = later._replace(count=state.count, rejected=state.rejected, cost=state.cost)
        kept = kept._replace(
            **({"step_size": state.step_size} if hasattr(kept, "step_size") else {})
        )
        jax.tree.map(np.testing.assert_array_equal, kept, state)
    updates, _ = update(grads, later, statistics)
    assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("where", ["gradient", "statistics"])
@pytest.mark.parametrize("method", [optgrad.kfac, optgrad.scale_by_kfac])
def test_a_first_batch_that_is_not_finite_is_made_up_for(where, method):
    """The inverses are those of the first good batch, not of no batch at all."""
    params = {"l": {"kernel": jnp.ones((3, 2))}}
    grads = {"l": {"kernel": jnp.full((3, 2), 0.1)}}
    key = jax.random.key(0)
    good = LayerStatistics(jax.random.normal(key, (8, 3)), jax.random.normal(key, (8, 2)))
    bad = LayerStatistics(good.activations * jnp.nan, good.gradients)
    optimizer = method(damping=1e-3, period=10)
    update = jax.jit(lambda g, s, k: optimizer.update(g, s, params, kfac_stats={"l": k}))
    expected, _ = update(grads, optimizer.init(params), good)
    spoilt = jax.tree.map(lambda g: g * jnp.nan, grads) if where == "gradient" else grads
    _, state = update(spoilt, optimizer.init(params), bad if where == "statistics" else good)
    updates, later = update(grads, state, good)
    assert int(later.rejected) == 1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)


# --- parameters --------------------------------------------------------------------------------


def test_kinds_of_trees():
    """Dictionaries, `nnx.State` and what is in it, top-level layers; and what is no layer."""
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        nnx.Conv(4, 2, (2, 2), use_bias=False, rngs=nnx.Rngs(0)),
    )
    state = nnx.state(model, nnx.Param)
    for tree in (state, nnx.to_pure_dict(state), {"a": {}, **nnx.to_pure_dict(state)}):
        found = kfac_layers.find_layers(tree)
        assert [layer.path for layer in found] == ["layers/0", "layers/2"]
        assert [layer.bias is None for layer in found] == [False, True]
        blocks = kfac_layers.blocks(tree, found)
        rest = kfac_layers.rest(tree, found)
        assert len(jax.tree.leaves(rest)) == 2
        again = kfac_layers.joined(found, blocks, rest, tree)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert kfac_layers.find_layers({"kernel": jnp.ones((2, 3))})[0].path == ""
    for kernel in (jnp.ones(3), jnp.ones((2, 2, 2)), jnp.ones((2, 2), int), jnp.ones((0, 2)), None):
        assert not kfac_layers.find_layers({"a": {"kernel": kernel, "bias": jnp.ones(2)}})


def test_nnx_state():
    """A step on an NNX model's state, with its own statistics."""
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8) % 2

    def loss(params):
        logits = nnx.merge(graph, params, rest)(x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    optimizer = optgrad.kfac(0.1)

    @jax.jit
    def step(params, state, key):
        statistics = optgrad.layer_statistics(model, params, x, key=key)
        updates, state = optimizer.update(
            jax.grad(loss)(params), state, params, kfac_stats=statistics
        )
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), loss(params)
    for t in range(10):
        params, state = step(params, state, jax.random.key(t))
    assert loss(params) < 0.7 * before


def test_fallback(x64):
    """It gets all other leaves, masked; the default is SGD with the same momentum and rate."""
    params = layered()
    optimizers = {
        "default": optgrad.kfac(0.1, momentum=0.8),
        "same": optgrad.kfac(0.1, momentum=0.8, fallback=optax.sgd(0.1, 0.8)),
        "adam": optgrad.kfac(0.1, momentum=0.8, fallback=optax.adam(0.01)),
    }
    found = {}
    adam = optax.adam(0.01)
    adam_state = adam.init(params["norm"])
    for name, optimizer in optimizers.items():
        state = optimizer.init(params)
        update = jax.jit(lambda g, s, k, o=optimizer: o.update(g, s, params, kfac_stats=k))
        for t in range(3):
            grads = layered(seed=t + 1)
            found[name], state = update(grads, state, random_statistics(t))
            if name == "adam":
                expected, adam_state = adam.update(grads["norm"], adam_state)
        if name == "adam":
            assert len(jax.tree.leaves(state.fallback[0].mu)) == 1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(close, found["default"], found["same"])
    close(found["adam"]["norm"]["scale"], expected["scale"])
    close(found["adam"]["dense"]["kernel"], found["same"]["dense"]["kernel"])


def test_chosen_layers(x64):
    """Others are the fallback's, and need no statistics."""
    params, grads = layered(), layered(seed=1)
    optimizer = optgrad.kfac(0.1, layers=["dense"])
    statistics = {"dense": random_statistics(0)["dense"]}
    updates, state = optimizer.update(grads, optimizer.init(params), params, kfac_stats=statistics)
    assert set(state.curvature.factors) == {"dense"}
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1 * grads["conv"]["kernel"])
    expected = Box(0.1)(matrices({"dense": grads["dense"]}), statistics)["dense"]
    np.testing.assert_allclose(matrices(updates)["dense"], expected, rtol=1e-10)


def test_narrow_parameters():
    """bfloat16 parameters: updates in it, all matrices in float32."""
    params = layered(jnp.bfloat16)
    optimizer = optgrad.kfac(0.1)
    state = optimizer.init(params)
    statistics = random_statistics(0, jnp.bfloat16)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, kfac_stats=statistics))
    updates, later = update(layered(jnp.bfloat16, 1), state, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    for tree in (state, later):
        floats = {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats == {jnp.dtype(jnp.float32)}
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), layered(jnp.bfloat16, 1))
    wide, _ = update(grads, optimizer.init(grads), grads)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=0.01)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"damping": 0.0}, r"damping = 0.0 is outside its range \(0, inf\)"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"decay": 1.0}, "decay = 1.0"),
        ({"kl_clip": 0.0}, "kl_clip = 0.0"),
        ({"period": 0}, "period = 0"),
        ({"adapt_every": 0}, "adapt_every = 0"),
        ({"adaptive": "yes"}, "adaptive = 'yes'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.kfac(**arguments)
    if arguments.keys() <= {"damping", "decay", "period"}:
        with pytest.raises(ValueError, match=message):
            optgrad.scale_by_kfac(**arguments)


def test_wrong_layers_and_statistics():
    params, grads = layered(jnp.float32), layered(jnp.float32, 1)
    statistics = random_statistics(0, jnp.float32)
    with pytest.raises(ValueError, match=r"layers has 'desne'.*did you mean 'dense'"):
        optgrad.kfac(layers=["desne"]).init(params)
    for method in (optgrad.kfac(), optgrad.scale_by_kfac()):
        update = functools.partial(method.update, grads, method.init(params), params)
        with pytest.raises(ValueError, match=r"kfac_stats = None.*optgrad\.layer_statistics"):
            update()
        part = {k: v for k, v in statistics.items() if k != "conv"}
        with pytest.raises(ValueError, match=r"layer 'conv'.*layers=\('dense', 'plain'\)"):
            update(kfac_stats=part)
        turned = LayerStatistics(*reversed(statistics["dense"]))
        with pytest.raises(ValueError, match=r"kfac_stats\['dense'\].*\(n, \*positions, 5\)"):
            update(kfac_stats={**statistics, "dense": turned})
        cut = LayerStatistics(statistics["dense"][0][:3], statistics["dense"][1])
        with pytest.raises(ValueError, match=r"kfac_stats\['dense'\]"):
            update(kfac_stats={**statistics, "dense": cut})


# --- the adaptive mode -------------------------------------------------------------------------


class Net:
    """A tanh network on few points, in float64, and all that the adaptive mode needs of it."""

    def __init__(self, fallback_leaf=True):
        generator = np.random.default_rng(0)
        self.x = jnp.asarray(generator.standard_normal((12, 3)))
        self.y = jnp.asarray(generator.standard_normal((12, 2)))
        self.params = {
            "a": {
                "kernel": jnp.asarray(generator.standard_normal((3, 4))),
                "bias": jnp.asarray(generator.standard_normal(4)),
            },
            "b": {"kernel": jnp.asarray(generator.standard_normal((4, 2)))},
        }
        if fallback_leaf:
            self.params["gain"] = jnp.asarray(generator.standard_normal(4))

    def apply(self, params, x, taps):
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"] + taps["a"])
        hidden = hidden * params.get("gain", 1.0)
        return hidden @ params["b"]["kernel"] + taps["b"], {"a": x, "b": hidden}

    def outputs(self, params):
        return self.apply(params, self.x, {"a": 0.0, "b": 0.0})[0]

    def out_loss(self, z):
        return 0.5 * jnp.mean(jnp.sum((z - self.y) ** 2, -1))

    def loss(self, params):
        return self.out_loss(self.outputs(params))

    def extras(self, params, key):
        statistics = optgrad.layer_statistics(
            self.apply, params, self.x, key=key, likelihood="squared"
        )
        value, grad = jax.value_and_grad(self.loss)(params)
        functions = {"outputs_fn": self.outputs, "out_loss_fn": self.out_loss}
        return grad, {"value": value, "value_fn": self.loss, "kfac_stats": statistics, **functions}


@pytest.mark.parametrize("fallback_leaf", [False, True])
def test_adaptive_follows_the_paper(x64, fallback_leaf):
    """α and μ of the 2 × 2 system with explicit matrices; λ by the gain ratio; the cost."""
    net, every = Net(fallback_leaf), 2
    optimizer = optgrad.kfac(0.05, adaptive=True, damping=0.5, adapt_every=every, period=1)
    params = net.params
    state, direction_state = optimizer.init(params), optgrad.scale_by_kfac().init(params)
    previous = np.zeros(sum(x.size for x in jax.tree.leaves(params)))

    def flatten(tree):
        return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])

    unravel = jax.flatten_util.ravel_pytree(params)[1]
    own = flatten(
        {**jax.tree.map(jnp.ones_like, params), **({"gain": jnp.zeros(4)} if fallback_leaf else {})}
    )
    velocity, damping, shares = 0.0, 0.5, []

    @jax.jit
    def update(params, state, key):
        grad, extras = net.extras(params, key)
        return optimizer.update(grad, state, params, **extras)

    @jax.jit
    def scale(params, state, key, damping):
        grad, extras = net.extras(params, key)
        preconditioner = optgrad.scale_by_kfac(damping, period=1)
        return grad, *preconditioner.update(grad, state, params, **extras)

    for t in range(8):
        key = jax.random.key(t)
        np.testing.assert_allclose(state.damping, damping, rtol=1e-9)
        grad, scaled, direction_state = scale(params, direction_state, key, damping)
        delta, g = -own * flatten(scaled), flatten(grad)
        velocity = 0.9 * velocity + (1 - own) * g
        rest = -0.05 * velocity
        jacobian = np.asarray(
            jax.jacobian(lambda p: jnp.ravel(net.outputs(unravel(p))))(jnp.asarray(flatten(params)))
        )
        matrix = jacobian.T @ jacobian / 12 + damping * np.eye(len(g))
        basis = np.stack([delta, previous])[: 1 + (t > 0)]
        share = 1.0
        if fallback_leaf:  # the minimum over three directions decides how much of it is taken
            three = np.stack([*basis, rest])
            share = np.clip(-np.linalg.solve(three @ matrix @ three.T, three @ g)[-1], 0, 1)
            shares.append(share)
        c = -np.linalg.solve(basis @ matrix @ basis.T, basis @ (g + share * matrix @ rest))
        step = c @ basis + share * rest
        predicted = -(g @ step + 0.5 * step @ matrix @ step)
        updates, state = update(params, state, key)
        np.testing.assert_allclose(flatten(updates), step, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(state.step_size, c[0], rtol=1e-7)
        after = optax.apply_updates(params, updates)
        ratio = float((net.loss(params) - net.loss(after)) / predicted)
        if (t + 1) % every == 0:
            factor = 1 / 0.95**every
            damping *= factor if ratio < 0.25 else 1 / factor if ratio > 0.75 else 1
        previous, params = own * step, after
    assert damping != 0.5
    assert not fallback_leaf or min(shares) < 1
    assert int(state.rejected) == 0
    cost = 2 + (3 if fallback_leaf else 2) + 1 / 3
    np.testing.assert_allclose(state.cost, 8 * cost)


def test_adaptive_never_increases_the_loss(x64):
    """Not from a bad start and with a fallback that climbs; rejections raise the damping."""
    net = Net()
    optimizer = optgrad.kfac(adaptive=True, damping=1e-8, fallback=optax.sgd(-0.3))

    def body(carry, key):
        params, state = carry
        grad, extras = net.extras(params, key)
        updates, later = optimizer.update(grad, state, params, **extras)
        after = optax.apply_updates(params, updates)
        return (after, later), (extras["value"], net.loss(after), later.rejected, later.damping)

    params = jax.tree.map(lambda x: 3 * x, net.params)
    keys = jax.random.split(jax.random.key(0), 40)
    run = jax.jit(lambda p: jax.lax.scan(body, (p, optimizer.init(p)), keys))
    _, (before, after, rejected, damping) = run(params)
    assert np.all(after <= before)
    steps = np.diff(rejected, prepend=0)
    assert 0 < rejected[-1] < 40
    assert np.all((np.asarray(after) == np.asarray(before))[steps == 1])
    grown = np.asarray(damping) / np.concatenate([[1e-8], damping[:-1]])
    np.testing.assert_allclose(grown[steps == 1], 0.95**-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_adaptive_with_non_finite_losses(bad):
    """A zero step, counted, with the loss given or not."""
    net = Net()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), net.params)
    optimizer = optgrad.kfac(adaptive=True)
    grad, extras = net.extras(params, jax.random.key(0))
    unbounded = {"value_fn": lambda p: jnp.float32(bad)}
    for changes in (unbounded, {**unbounded, "value": None}, {"value": jnp.float32(jnp.nan)}):
        given = {**extras, **changes}
        update = jax.jit(lambda p, g=given: optimizer.update(grad, optimizer.init(p), p, **g))
        updates, state = update(params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        assert int(state.rejected) == 1


def test_adaptive_needs_functions():
    net = Net()
    optimizer = optgrad.kfac(adaptive=True)
    grad, extras = net.extras(net.params, jax.random.key(0))
    state = optimizer.init(net.params)
    for name in ("value_fn", "outputs_fn", "out_loss_fn"):
        with pytest.raises(ValueError, match=f"{name} = None.*curvature_args"):
            optimizer.update(grad, state, net.params, **{**extras, name: None})


# --- digits ------------------------------------------------------------------------------------


@functools.cache
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:1437]
    return jnp.asarray(data.data[order] / 16, jnp.float32), jnp.asarray(data.target[order])


def mlp(params, x, taps):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"] + taps["a"])
    outputs = hidden @ params["b"]["kernel"] + params["b"]["bias"]
    return outputs + taps["b"], {"a": x, "b": hidden}


def regularised(outputs, y):
    """Cross-entropy with L2 of 1e-4, of the outputs and the parameters."""
    logits, params = outputs
    penalty = 0.5e-4 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)) + penalty


def digits_run(optimizer, steps, seed=0, adaptive=False):
    """Training loss of the whole set before each step; MLP 64-32-10, batches of 256."""
    images, labels = digits()
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (64, 32)) / 8, "bias": jnp.zeros(32)},
        "b": {"kernel": jax.random.normal(keys[1], (32, 10)) / 32**0.5, "bias": jnp.zeros(10)},
    }

    def outputs(params, x):
        return mlp(params, x, {"a": 0.0, "b": 0.0})[0], params

    def body(carry, key):
        params, state = carry
        first, second = jax.random.split(key)
        chosen = jax.random.choice(first, len(images), (256,), replace=False)
        x, y = images[chosen], labels[chosen]

        def loss(params):
            return regularised(outputs(params, x), y)

        extras = {"kfac_stats": optgrad.layer_statistics(mlp, params, x, key=second)}
        value, grad = jax.value_and_grad(loss)(params)
        if adaptive:
            extras |= {"value": value, "value_fn": loss, "outputs_fn": lambda p: outputs(p, x)}
            extras |= {"out_loss_fn": lambda z: regularised(z, y)}
        updates, state = optimizer.update(grad, state, params, **extras)
        now = regularised(outputs(params, images), labels)
        return (optax.apply_updates(params, updates), state), now

    carry = (params, optimizer.init(params))
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jax.random.split(keys[2], steps + 1)))
    return np.asarray(run(carry)[1])


def test_adaptive_is_faster_early_on_digits():
    """kfac-jax's adaptive optimizer has 0.054 and 0.027 after 50 and 100 steps."""
    adaptive = digits_run(optgrad.kfac(adaptive=True), 100, adaptive=True)
    fixed = digits_run(optgrad.kfac(0.1, damping=1e-2), 100)
    assert adaptive[20] < 0.1
    assert adaptive[50] < 1.2 * 0.054
    assert adaptive[100] < 1.2 * 0.027
    assert np.all(adaptive[[20, 50, 100]] < 0.8 * fixed[[20, 50, 100]])
    assert np.all(fixed[[20, 50, 100]] < 1.2 * np.array([0.113, 0.087, 0.053]))


@pytest.mark.slow
def test_digits_reaches_the_specification():
    """After 300, 1000 and 3000 gradient equivalents, at two of them a step."""
    expected = np.array([0.0383, 0.0225, 0.0216])
    losses = digits_run(optgrad.kfac(0.03, damping=1e-3), 1500)
    assert np.all(losses[[150, 500, 1500]] < 1.5 * expected)
    losses = digits_run(optgrad.kfac(), 1500)
    assert np.all(losses[[150, 500, 1500]] < 1.1 * expected)

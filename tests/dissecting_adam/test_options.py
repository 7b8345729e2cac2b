"""The options: extras, β as a number, a traced scalar and a schedule, types, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import boxes

MOVING = ("svag", "m_svag", "adam_star", "adam_sign")
MINIBATCH = ("m_svag_mb", "adam_star_mb")
WITH_BETA = ("m_ssd", *MOVING, *MINIBATCH)
EXAMPLES = 5


def extras(name, gradient):
    return {"gradient_variance": 0.5 * gradient**2} if name in MINIBATCH else {}


# --- the variance within the minibatch -------------------------------------------------------


def minibatches(steps=40, size=6):
    """Per-example gradients (T, B, D), the coordinates of different scale and noise."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(steps, EXAMPLES, size)) * np.geomspace(0.1, 10, size)
    return (grads + 1) * np.geomspace(1e-3, 1e3, size)[::-1]


@pytest.mark.parametrize("name", MINIBATCH)
def test_both_extras_give_the_box(x64, name):
    """Per-example gradients, their variance, and the box with Eq. (44): one trajectory."""
    grads = minibatches()
    optimizer = getattr(optgrad, name)(1.0, beta=0.8)

    @jax.jit
    def run(grads):
        def step(states, grads):
            mean = grads.mean(0)
            of_examples = optimizer.update(mean, states[0], per_example_grads=grads)
            variance = optgrad.gradient_variance(grads)
            of_variance = optimizer.update(mean, states[1], gradient_variance=variance)
            return (of_examples[1], of_variance[1]), (of_examples[0], of_variance[0])

        state = optimizer.init(grads[0, 0])
        return jax.lax.scan(step, (state, state), grads)[1]

    of_examples, of_variance = map(np.asarray, run(jnp.asarray(grads)))
    np.testing.assert_array_equal(of_examples, of_variance)
    box = boxes.BOXES[name](0.8)
    wide = grads.astype(boxes.LONG)
    expected = [-box(g.mean(0), boxes.minibatch_variance(g)) for g in wide]
    np.testing.assert_allclose(of_examples, np.asarray(expected, np.float64), rtol=1e-10)


@pytest.mark.parametrize("name", MINIBATCH)
def test_given_variance_goes_before_examples(name):
    optimizer = getattr(optgrad, name)(1.0)
    gradient, state = jnp.ones(2), optimizer.init(jnp.ones(2))
    examples = jnp.array([[0.0, 0.0], [2.0, 2.0]])
    update = jax.jit(optimizer.update)
    both, _ = update(gradient, state, per_example_grads=examples, gradient_variance=jnp.zeros(2))
    np.testing.assert_array_equal(both, [-1.0, -1.0])
    one, _ = update(gradient, state, per_example_grads=examples)
    assert np.all(one > both)


@pytest.mark.parametrize("name", MINIBATCH)
def test_trees_of_examples(name):
    """Leaf by leaf the same as the leaves alone, `None` and masked leaves passed over."""
    examples = jnp.asarray(minibatches(1)[0], jnp.float32)
    tree = {"a": examples[:, :4].reshape(EXAMPLES, 2, 2), "b": (None, examples[:, 4], ())}
    optimizer = getattr(optgrad, name)(1.0)
    mean = jax.tree.map(lambda g: g.mean(0), tree)
    update = jax.jit(optimizer.update)
    updates, _ = update(mean, optimizer.init(mean), per_example_grads=tree)
    flat, _ = update(examples.mean(0), optimizer.init(examples[0]), per_example_grads=examples)
    np.testing.assert_allclose(updates["a"].ravel(), flat[:4], rtol=1e-6)
    np.testing.assert_allclose(updates["b"][1], flat[4], rtol=1e-6)
    masked = optax.masked(optimizer, {"a": True, "b": False}, mask_compatible_extra_args=True)
    part, _ = jax.jit(masked.update)(mean, masked.init(mean), mean, per_example_grads=tree)
    np.testing.assert_allclose(part["a"], updates["a"], rtol=1e-6)
    np.testing.assert_array_equal(part["b"][1], mean["b"][1])


GRADIENT = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
REFUSED = {
    "neither": ({}, ["gradient_variance", "per_example_grads", "neither"]),
    "one example": ({"per_example_grads": {"w": (1, 2, 3), "b": (1, 3)}}, ["B = 1", "B ≥ 2"]),
    "no batch axis": ({"per_example_grads": {"w": (2, 3), "b": (3,)}}, ["per_example_grads"]),
    "batch sizes": ({"per_example_grads": {"w": (4, 2, 3), "b": (5, 3)}}, ["per_example_grads"]),
    "examples' shape": (
        {"per_example_grads": {"w": (4, 2, 3), "b": (4, 2)}},
        ["per_example_grads", "(4, 2)", "(3,)", "batch axis"],
    ),
    "examples' structure": ({"per_example_grads": {"w": (4, 2, 3)}}, ["per_example_grads"]),
    "no examples": ({"per_example_grads": {"w": (0, 2, 3), "b": (0, 3)}}, ["per_example_grads"]),
    "variance's shape": (
        {"gradient_variance": {"w": (2, 3), "b": (1,)}},
        ["gradient_variance", "(1,)", "(3,)"],
    ),
    "variance of examples": (
        {"gradient_variance": {"w": (4, 2, 3), "b": (4, 3)}},
        ["gradient_variance", "(4, 2, 3)"],
    ),
    "variance's structure": ({"gradient_variance": [(2, 3), (3,)]}, ["gradient_variance"]),
}


@pytest.mark.parametrize("name", MINIBATCH)
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_extras(name, case):
    shapes, words = REFUSED[case]
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    extra = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    optimizer = getattr(optgrad, name)(0.1)
    with pytest.raises(ValueError, match=r"per_example_grads|gradient_variance") as error:
        optimizer.update(GRADIENT, optimizer.init(GRADIENT), GRADIENT, **extra)
    for word in words:
        assert word in str(error.value)


# --- β ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("m_ssd", "m_svag", "adam_sign", "m_svag_mb")]
    + [(name, {"variance": "unbiased"}) for name in ("svag", "m_svag", "adam_star")],
)
def test_beta_as_number_traced_and_schedule(name, options):
    """float32 cannot hold 0.9: what it holds instead moves a trajectory by no more than 1e-6."""
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(100, 8)) + 0.5, jnp.float32)
    zero = jnp.zeros(8)

    @jax.jit
    def run(traced, gradients):
        betas = (0.9, traced, lambda count: 0.9 + 0.0 * count)
        optimizers = [getattr(optgrad, name)(0.1, beta=b, **options) for b in betas]

        def step(states, gradient):
            extra = extras(name, gradient)
            pairs = [
                o.update(gradient, s, zero, **extra)
                for o, s in zip(optimizers, states, strict=True)
            ]
            updates, states = zip(*pairs, strict=True)
            return states, updates

        return jax.lax.scan(step, tuple(o.init(zero) for o in optimizers), gradients)[1]

    number, traced, schedule = (np.cumsum(u, axis=0) for u in run(jnp.float32(0.9), gradients))
    length = np.max(np.abs(number), axis=0)
    assert np.all(np.abs(traced - number) <= 1e-6 * length)
    assert np.all(np.abs(schedule - number) <= 1e-6 * length)


def test_beta_schedule_that_varies(x64):
    """The current β enters all formulas; the recursion here is the averages' documented one."""
    gradients = np.random.default_rng(0).normal(size=(60, 5)) + 0.5

    def beta_at(count):
        return 0.9 - 0.9 * (count % 20) / 19

    optimizer = optgrad.m_svag(1.0, beta=beta_at)

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state)
        return state, updates

    run = jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(gradients[0]), gradients))
    ours = run(jnp.asarray(gradients))[1]
    m, v = np.zeros(5, boxes.LONG), np.zeros(5, boxes.LONG)
    for t, gradient in enumerate(gradients.astype(boxes.LONG), start=1):
        mu = boxes.LONG(np.float64(beta_at(t - 1)))
        new = (1 - mu) / (1 - mu**t)
        deviation = gradient - m
        m = m + new * deviation
        v = (1 - new) * (v + new * deviation**2)
        expected = -m / (1 + boxes.kappa(mu, t) * v / m**2)
        np.testing.assert_allclose(ours[t - 1], expected.astype(np.float64), rtol=1e-10, atol=1e-13)
    assert beta_at(19) == 0  # where the latest gradient is all there is: γ = 1
    np.testing.assert_allclose(ours[19], -gradients[19], rtol=1e-12)


@pytest.mark.parametrize("name", ["m_ssd", *MOVING, *MINIBATCH])
def test_vmap_over_beta_and_rate(name):
    """A sweep in one compilation gives what the runs alone give."""
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) + 1, jnp.float32)

    def run(rate, beta):
        optimizer = getattr(optgrad, name)(rate, beta=beta)
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, **extras(name, gradient))
        return updates

    rates, betas = jnp.array([0.1, 1.0, 0.0]), jnp.array([0.0, 0.5, 0.99])
    swept = jax.jit(jax.vmap(run))(rates, betas)
    alone = jax.jit(lambda: jnp.stack([run(*x) for x in ((0.1, 0.0), (1.0, 0.5), (0.0, 0.99))]))()
    np.testing.assert_allclose(swept, alone, rtol=1e-5)


# --- types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BETA)
@pytest.mark.parametrize("state_dtype", ["bfloat16", jnp.float32])
def test_state_dtype(x64, name, state_dtype):
    """The state has the type asked for, updates the parameters'; close to the box all the same."""
    tolerance = 5e-5 if state_dtype == jnp.float32 else 0.05
    gradients = np.random.default_rng(0).normal(size=(60, 8)) + np.linspace(0.5, 3, 8)
    optimizer = getattr(optgrad, name)(1.0, beta=0.8, state_dtype=state_dtype)
    box = boxes.BOXES[name](0.8)
    params = jnp.zeros(8, jnp.float64)

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, params, **extras(name, gradient))
        return state, updates

    state, updates = jax.jit(
        lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)
    )(jnp.asarray(gradients))
    averages = [x.dtype for x in jax.tree.leaves(state) if x.ndim]
    assert averages == [jnp.dtype(state_dtype)] * (1 if name == "m_ssd" else 2)
    assert updates.dtype == jnp.float64
    expected = np.stack([-box(g, 0.5 * g**2) for g in gradients.astype(boxes.LONG)])
    same = np.isclose(updates, expected.astype(np.float64), atol=tolerance, rtol=tolerance)
    assert np.mean(same) > 0.98  # but for signs of momenta near 0


@pytest.mark.parametrize("name", MOVING)
def test_float16_state_of_small_gradients(name):
    """float16 reaches down to 6e-8: a mean of 1e-5 is not 0."""
    optimizer = getattr(optgrad, name)(1.0, state_dtype="float16")
    gradient = jnp.full(3, 1e-5)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(gradient), gradient)
    expected = -1.0 if name.startswith("adam") else -1e-5
    np.testing.assert_allclose(updates, expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("m_svag", jnp.float16), *((name, jnp.bfloat16) for name in ("ssd", *WITH_BETA))],
)
def test_low_precision_parameters_keep_float32_averages(name, dtype):
    """The same directions as for float32 parameters, rounded once."""
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)) + 1, dtype)
    optimizer = getattr(optgrad, f"scale_by_{name}")()

    @jax.jit
    def run(gradients):
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            wide = gradient.astype(jnp.float32)
            updates, state = optimizer.update(gradient, state, gradient, **extras(name, wide))
        return updates, state

    low, state = run(gradients)
    assert low.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("int32"), jnp.dtype("float32")}
    np.testing.assert_array_equal(low, run(gradients.astype(jnp.float32))[0].astype(dtype))


@pytest.mark.parametrize("name", ["ssd", *WITH_BETA])
def test_wide_gradients_of_narrow_parameters(x64, name):
    """float64 gradients of float32 parameters: types as ``init`` fixed them, leaf by leaf."""
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(())}
    optimizer = getattr(optgrad, name)(jnp.float32(0.1))
    gradients = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float64), params)
    state = optimizer.init(params)
    variance = extras(name, 1.0) and {"gradient_variance": gradients}
    updates, new_state = jax.jit(optimizer.update)(gradients, state, params, **variance)
    types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]  # noqa: E731
    assert types(updates) == types(params)
    assert types(new_state) == types(state)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BETA)
@pytest.mark.parametrize("beta", [1.0, -0.1, float("nan"), 2])
def test_beta_out_of_range(name, beta):
    with pytest.raises(ValueError, match=r"beta = .* \[0, 1\)"):
        getattr(optgrad, name)(0.1, beta=beta)
    with pytest.raises(ValueError, match="beta"):
        getattr(optgrad, f"scale_by_{name}")(beta=beta)


@pytest.mark.parametrize("name", ["ssd", *WITH_BETA])
@pytest.mark.parametrize("rate", [-1e-3, float("inf"), float("nan")])
def test_learning_rate_out_of_range(name, rate):
    with pytest.raises(ValueError, match=r"learning_rate = .* \[0, inf\)"):
        getattr(optgrad, name)(rate)


@pytest.mark.parametrize(
    ("option", "name"),
    [("variance", name) for name in MOVING]
    + [("factor", name) for name in ("adam_star", "adam_sign", "adam_star_mb")],
)
def test_unknown_option(option, name):
    message = rf"{option} = 'optmal'.*Accepted: "
    with pytest.raises(ValueError, match=message):
        getattr(optgrad, f"scale_by_{name}")(**{option: "optmal"})
    with pytest.raises(ValueError, match=message):
        getattr(optgrad, name)(0.1, **{option: "optmal"})

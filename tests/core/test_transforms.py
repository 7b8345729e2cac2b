"""The learning rate, casts and hyperparameters in time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.core import transforms

PARAMS = {"a": jnp.ones(2), "b": (jnp.ones((), jnp.bfloat16), None)}


def types(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


def recording():
    """A direction that shows what reaches it."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((params, extra))
        return updates, state + 1

    init = lambda params: jnp.zeros((), jnp.int32)  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update), seen


@pytest.mark.parametrize(
    "rate",
    [0.5, 0, 1, np.float32(0.25), jnp.float32(0.3), jnp.asarray(0.3, jnp.bfloat16)],
    ids=repr,
)
def test_minus_rate_times_direction(rate):
    optimizer = transforms.with_learning_rate(optax.identity(), rate)
    gradient = jax.tree.map(lambda p: 3 * p, PARAMS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    assert types(updates) == types(PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(updates["a"], -3 * float(rate), rtol=1e-6)
    np.testing.assert_allclose(float(updates["b"][0]), -3 * float(rate), rtol=2.0**-7)


def test_traced_and_vmapped_rate():
    def one(rate, gradient):
        optimizer = transforms.with_learning_rate(optax.identity(), rate)
        return optimizer.update(gradient, optimizer.init(gradient))[0]

    rates = jnp.array([0.0, 0.1, 10.0])
    for dtype in (jnp.float32, jnp.bfloat16):
        updates = jax.jit(jax.vmap(one, (0, None)))(rates, jnp.ones(2, dtype))
        assert updates.dtype == dtype
        np.testing.assert_allclose(updates[:, 0].astype(jnp.float32), -rates, rtol=2.0**-8)
    assert jax.grad(lambda r: one(r, jnp.ones(())))(0.1) == -1


def test_schedule_starts_at_zero_and_counts():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 3: 0.0})
    optimizer = transforms.with_learning_rate(optax.identity(), schedule)
    state, seen = optimizer.init(jnp.zeros(())), []
    for _ in range(5):
        updates, state = jax.jit(optimizer.update)(jnp.ones(()), state)
        seen.append(float(updates))
    expected = [-float(schedule(count)) for count in range(5)]
    assert seen == expected
    assert seen[0] == -1.0
    assert seen[-1] == 0.0


def test_extras_and_params_reach_the_direction():
    direction, seen = recording()
    optimizer = transforms.with_learning_rate(direction, 1.0)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=3.0, strange="x")
    assert seen == [(PARAMS, {"value": 3.0, "strange": "x"})]
    assert state[0] == 1


def test_direction_without_extras_is_accepted():
    """A plain two-argument transformation, handed extra arguments all the same."""
    optimizer = transforms.with_learning_rate(optax.trace(0.9), 1.0)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=1.0)
    np.testing.assert_array_equal(updates, [-1.0, -1.0])


@pytest.mark.parametrize("rate", [-0.1, float("inf"), float("nan"), -1])
def test_refused_rate(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        transforms.with_learning_rate(optax.identity(), rate)


@pytest.mark.parametrize("rate", [None, "0.1", True])
def test_no_rate(rate):
    with pytest.raises(TypeError, match="learning_rate"):
        transforms.with_learning_rate(optax.identity(), rate)


def test_cast_like(x64):
    like = {"a": jnp.ones(2, jnp.bfloat16), "b": [jnp.float32(1), None], "c": 1.0}
    tree = {"a": jnp.ones(2), "b": [jnp.ones(3), None], "c": jnp.ones((), jnp.float32)}
    cast = transforms.cast_like(tree, like)
    assert types(cast) == [jnp.bfloat16, jnp.float32, jnp.float64]
    assert cast["b"][0].shape == (3,)
    assert transforms.cast_like({}, {}) == {}
    count = transforms.cast_like(jnp.array(16_777_217), jnp.ones(()))  # no float32 holds it
    assert count.dtype == jnp.int64


def test_hyperparameter_at():
    count = jnp.array(3)
    assert transforms.hyperparameter_at(0.9, count) == 0.9
    assert transforms.hyperparameter_at(lambda c: 2 * c + 1, count) == 7
    low = transforms.hyperparameter_at(jnp.asarray(0.99, jnp.bfloat16), count)
    assert low.dtype == jnp.float32
    scheduled = transforms.hyperparameter_at(lambda c: jnp.asarray(0.99, jnp.float16), count)
    assert scheduled.dtype == jnp.float32
    assert transforms.hyperparameter_at(jnp.array(0), count).dtype == jnp.float32


def test_hyperparameter_in_64_bits(x64):
    assert transforms.hyperparameter_at(jnp.float32(0.9), jnp.array(0)).dtype == jnp.float64
    assert transforms.hyperparameter_at(jnp.asarray(0.9), jnp.array(0)) == 0.9


@pytest.mark.parametrize("name", ["m_svag", "adaptive_sgd", "ogr1d"])
def test_complex_parameters_as_two_real_ones(name):
    """With conjugated gradients the run is that of the real and the imaginary parts."""
    method = optgrad.get_method(name)
    target = jnp.array([1j, 2.0 - 1j])

    def complex_loss(z):
        return jnp.sum(jnp.abs(z - target) ** 2)

    def real_loss(parts):
        return complex_loss(jax.lax.complex(*parts))

    def descend(optimizer, loss, params, conjugate):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(30):
            gradient = jax.grad(loss)(params)
            gradient = jnp.conj(gradient) if conjugate else gradient
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    optimizer = optgrad.create(name, **method.test_hyperparams)
    start = jnp.array([1.0 + 2.0j, -0.5j])
    wrapped = optax.contrib.split_real_and_imaginary(optimizer)
    found = descend(wrapped, complex_loss, start, conjugate=True)
    pair = descend(optimizer, real_loss, [start.real, start.imag], conjugate=False)
    np.testing.assert_allclose(found, jax.lax.complex(*pair), 1e-4, 1e-5)
    assert complex_loss(found) < complex_loss(start)

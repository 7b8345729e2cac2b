"""The parameter-free peers: optax's own steps at optax's defaults, in whatever type."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

NAMES = [
    *("prodigy", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "schedule_free_adamw"),
    "cocob",
]
STEPS = 30
START = np.array([1.0, -2.0, 0.5], np.float32)


def loss(params):
    return jnp.sum(jnp.array([0.5, 2.0, 8.0]) * (params["w"].astype(jnp.float32) - 0.25) ** 2)


def followed(optimizer, dtype=jnp.float32):
    """The parameters after each step, and the last state."""

    def body(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"].astype(jnp.float32)

    optimizer = optax.with_extra_args_support(optimizer)
    params = {"w": jnp.asarray(START, dtype)}
    carry = params, optimizer.init(params)
    (_, state), every = jax.jit(lambda c: jax.lax.scan(body, c, length=STEPS))(carry)
    return np.asarray(every), state


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_optax_at_its_defaults(name):
    found, _ = followed(optgrad.create(name))
    expected, _ = followed(getattr(optax.contrib, name)())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.any(found[-1] != START)


# Their first steps are less than a unit in the last place of 16 bits.
TINY_STEPS = {"prodigy", "dadapt_adamw", "dog"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TINY_STEPS])
def test_float16_is_near_float32(name):
    """The state is wide, so that 1e-8 is not 0."""
    found, state = followed(optgrad.create(name), jnp.float16)
    assert all(x.dtype != jnp.float16 for x in jax.tree.leaves(state))
    expected, _ = followed(optgrad.create(name))
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_optax_alone_fails_in_float16(name):
    """Why types are widened: its scalars are of 16 bits, and (1e-6)² and 1e-8 are 0 there."""
    found, _ = followed(getattr(optax.contrib, name)(), jnp.float16)
    assert not np.all(np.isfinite(found))


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_has_a_default(name):
    parameters = optgrad.get_method(name).hyperparameters.values()
    assert all(p.default is not inspect.Parameter.empty for p in parameters)


def test_the_scale_of_the_gradients_does_not_matter_to_cocob():
    """Why its record has no learning rate."""
    for rate in (0.01, 100.0):
        found, _ = followed(optax.contrib.cocob(rate))
        np.testing.assert_allclose(found, followed(optgrad.create("cocob"))[0], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prodigy", {"estim_lr0": 0.0}, "estim_lr0 = 0.0"),
        ("dadapt_adamw", {"estim_lr0": -1.0}, "estim_lr0 = -1.0"),
        ("dog", {"reps_rel": 0.0}, "reps_rel = 0.0"),
        ("dowg", {"eps": 0.0}, "eps = 0.0"),
        ("cocob", {"eps": 0.0}, "eps = 0.0"),
        ("schedule_free_adamw", {"b1": 0.0}, "b1 = 0.0"),
        (
            "schedule_free_adamw",
            {"warmup_steps": 5, "learning_rate": lambda count: 0.1},
            "warmup_steps = 5 with a schedule",
        ),
    ],
)
def test_what_divides_by_0_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.create(name, **arguments)


def test_warm_up_of_schedule_free():
    """The first steps are shorter, the tenth is at the full rate."""
    warm, _ = followed(optgrad.create("schedule_free_adamw", warmup_steps=10))
    plain, _ = followed(optgrad.create("schedule_free_adamw"))
    assert np.all(np.abs(warm[1] - START) < 0.3 * np.abs(plain[1] - START))

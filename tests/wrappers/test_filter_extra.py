"""`filter_extra`: what is not named does not arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

LINE_SEARCH = ("value", "grad", "value_fn")


def recording(seen):
    """A transformation that notes the names of what it is given."""

    def update(updates, state, params=None, **extra):
        seen.append((params is not None, sorted(extra)))
        return updates, state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


def test_only_the_named_arguments_arrive():
    seen = []
    optimizer = optgrad.filter_extra(recording(seen), ("value", "grad"))
    state = optimizer.init(jnp.ones(2))
    _, state = optimizer.update(jnp.ones(2), state, jnp.ones(2), value=1.0, residual_fn=jnp.sum)
    optimizer.update(jnp.ones(2), state, params=jnp.ones(2), grad=2.0, value=1.0, other=3.0)
    optimizer.update(jnp.ones(2), state)
    assert seen == [(True, ["value"]), (True, ["grad", "value"]), (False, [])]
    assert state == 1


def test_a_transformation_without_extra_arguments():
    optimizer = optgrad.filter_extra(optax.scale(-1.0), ("value",))
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=1.0)
    np.testing.assert_array_equal(updates, -1)


@pytest.mark.parametrize(
    "search",
    [optax.scale_by_zoom_linesearch(10), optax.scale_by_backtracking_linesearch(20)],
    ids=["zoom", "backtracking"],
)
def test_line_searches_beside_a_method_that_takes_more(search):
    """Without it optax refuses what is the other's; with it the search is as if alone."""

    def loss(x):
        return jnp.sum((x - 1) ** 2 * jnp.array([1.0, 3.0]))

    def run(optimizer, **more):
        def body(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, value_fn=loss, **more
            )
            return (optax.apply_updates(params, updates), state), value

        start = jnp.array([3.0, -2.0])
        state = jax.tree.map(
            lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), optimizer.init(start)
        )
        return jax.jit(lambda: jax.lax.scan(body, (start, state), length=5))()[1]

    more = {"residual_fn": jnp.square, "outputs_fn": jnp.sin}
    with pytest.raises(TypeError):
        run(optax.chain(optax.scale(-1.0), search), **more)
    filtered = optax.chain(optax.scale(-1.0), optgrad.filter_extra(search, LINE_SEARCH))
    values = run(filtered, **more)
    np.testing.assert_array_equal(values, run(optax.chain(optax.scale(-1.0), search)))
    assert values[-1] < values[0] / 4


def test_hyperparameters_in_the_state_can_still_be_set():
    optimizer = optgrad.filter_extra(optgrad.inject("sgd", learning_rate=0.5), ())
    state = optimizer.init(jnp.ones(2))
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    updates, _ = optimizer.update(jnp.ones(2), state, jnp.ones(2), value=1.0)
    np.testing.assert_allclose(updates, -0.25)


@pytest.mark.parametrize(
    ("names", "message"),
    [("value", r"names = 'value' is a string"), (("value", 3), r"holds 3; accepted: strings")],
)
def test_bad_names(names, message):
    with pytest.raises(TypeError, match=message):
        optgrad.filter_extra(optax.sgd(0.1), names)

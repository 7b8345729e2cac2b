"""`on_subtree`: a method on a part of the parameters is that method on the part alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import problem
from contract.test_composition import KEPT, LEFT, part_update
from flax import nnx

import optgrad
from optgrad.core import layer_statistics, oracles

MASK = {KEPT: True, LEFT: False}


def one_per_kind():
    """A method for each set of extra arguments; which of them does not matter here."""
    kinds = {method.needs: method.name for method in reversed(optgrad.methods())}
    return sorted(kinds.values())


@pytest.mark.parametrize("name", one_per_kind())
@pytest.mark.parametrize("rest", [None, optax.sgd(0.1)], ids=["held", "rest"])
def test_every_kind_of_method_on_a_part_is_that_method_alone(name, rest):
    method = optgrad.get_method(name)
    wrapped = optgrad.on_subtree(problem.create(method), MASK, rest)
    standard = problem.standard()
    update = jax.jit(problem.make_update(method, wrapped), static_argnums=())

    def by_hand(grad, *arguments):
        part, state = part_update(name)(grad, *arguments)
        factor = -0.1 if rest else 0.0
        return {**part, LEFT: factor * grad[LEFT]}, state

    actual = problem.run(method, update, wrapped.init(standard.params), standard, steps=2)
    state = problem.create(method).init({KEPT: standard.params[KEPT]})
    expected = problem.run(method, by_hand, state, standard, steps=2)
    problem.assert_close(actual.updates, expected.updates)


# What the method sees -------------------------------------------------------------------------


def recording(seen):
    """A transformation that keeps what it is given, and halves the gradient."""

    def update(updates, state, params=None, **extra):
        seen.append({"updates": updates, "params": params, **extra})
        return jax.tree.map(lambda x: 0.5 * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


PARAMS = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array(3.0), "d": (jnp.ones(2), None)}}


def shapes(tree):
    return [x.shape for x in jax.tree.leaves(tree)]


def test_functions_are_of_the_part_and_trees_are_cut():
    seen = []
    optimizer = optgrad.on_subtree(recording(seen), {"a": True, "b": {"c": False, "d": True}})
    examples = jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS)
    trees = ("grad", "gradient_variance", "curvature_diagonal", "features", "like_the_parameters")
    functions = ("value_fn", "outputs_fn", "residual_fn", "curvature_fn", "inner_fn")
    calls = []

    def function(params, scale=1.0):
        calls.append(jax.tree.structure(params) == jax.tree.structure(PARAMS))
        return scale * sum(jnp.sum(x) for x in jax.tree.leaves(params))

    updates, _ = optimizer.update(
        PARAMS, optimizer.init(PARAMS), PARAMS, value=jnp.array(7.0), out_loss_fn=jnp.sum,
        per_example_grads=examples, number=jnp.array(1.0), nothing=None,
        **dict.fromkeys(trees, PARAMS), **dict.fromkeys(functions, function),
    )  # fmt: skip
    (found,) = seen
    for name in ("updates", "params", *trees):
        assert shapes(found[name]) == [(2,), (2,)], name
        assert isinstance(found[name]["b"]["c"], optax.MaskedNode)
    assert shapes(found["per_example_grads"]) == [(4, 2), (4, 2)]
    assert (found["value"], found["number"], found["nothing"]) == (7.0, 1.0, None)
    assert found["out_loss_fn"] is jnp.sum
    other = jax.tree.map(lambda x: x + 1, found["params"])
    for name in functions:  # 3 + 3 + 2 of the original, and 1 more for four numbers
        assert found[name](other) == 12
        assert found[name](other, scale=2.0) == 24
        gradient = jax.grad(found[name])(other)
        assert jax.tree.structure(gradient) == jax.tree.structure(other)
    assert all(calls)
    np.testing.assert_array_equal(updates["a"], [0.5, 1.0])
    assert updates["b"]["c"] == 0
    assert updates["b"]["d"][1] is None


def test_a_lone_array_of_parameters_does_not_take_scalars_for_its_like():
    for mask, shape in ((True, [(2,)]), (False, [])):
        seen = []
        optimizer = optgrad.on_subtree(recording(seen), mask)
        params = jnp.ones(2)
        optimizer.update(params, optimizer.init(params), params, value=jnp.array(1.0), grad=params)
        assert shapes(seen[0]["value"]) == [()]
        assert shapes(seen[0]["grad"]) == shape


def test_optax_line_searches_find_their_arguments():
    """optax hands value_fn those extra arguments that its signature names."""

    def value_fn(params, weight):
        return weight * sum(jnp.sum((x - 1) ** 4) for x in jax.tree.leaves(params))

    params = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(2.0)}
    optimizer = optgrad.on_subtree(optgrad.create("lbfgs"), {"a": True, "b": False})
    state = optimizer.init(params)
    value, grad = jax.value_and_grad(value_fn)(params, 2.0)
    updates, _ = optimizer.update(
        grad, state, params, value=value, grad=grad, value_fn=value_fn, weight=2.0
    )
    assert value_fn(optax.apply_updates(params, updates), 2.0) < value
    assert updates["b"] == 0


def test_layers_without_a_chosen_kernel_are_left_out_of_the_statistics():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    found = layer_statistics.layer_statistics(
        graph, params, jnp.ones((5, 3)), key=jax.random.PRNGKey(0)
    )
    first, second = sorted(found)
    seen = []

    def only(number):
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: f"/{number}/" in name_of(path) or "bias" in name_of(path), tree
        )

    def name_of(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    for number, layers in ((0, [first]), (1, [second])):
        optimizer = optgrad.on_subtree(recording(seen), only(number))
        optimizer.update(params, optimizer.init(params), params, kfac_stats=found)
        assert list(seen[-1]["kfac_stats"]) == layers
        assert seen[-1]["kfac_stats"][layers[0]] is found[layers[0]]


def test_the_rest_sees_its_own_part():
    seen, others = [], []
    optimizer = optgrad.on_subtree(recording(seen), {"a": True, "b": False}, rest=recording(others))
    updates, _ = optimizer.update(
        PARAMS, optimizer.init(PARAMS), PARAMS, grad=PARAMS,
        value_fn=lambda p: jnp.sum(p["a"]) + 10 * p["b"]["c"],
    )  # fmt: skip
    assert shapes(seen[0]["grad"]) == [(2,)]
    assert shapes(others[0]["grad"]) == [(), (2,)]
    other = jax.tree.map(lambda x: 0 * x, others[0]["params"])
    assert others[0]["value_fn"](other) == 3
    np.testing.assert_array_equal(updates["b"]["c"], 1.5)


# Numbers ------------------------------------------------------------------------------------------


def bowl(params, target=1.0):
    """Not separable: what the part's minimum is depends on what the rest is held at."""
    x, y = params["x"], params["y"]
    return jnp.sum((x - target) ** 2 * jnp.array([1.0, 30.0])) + jnp.sum(x) * y + (y - 2.0) ** 4


START = {"x": jnp.array([4.0, -3.0]), "y": jnp.array(0.5)}


def newton(damping=0.0):
    """A toy curvature method: dense Newton through Hessian products, on trees of any structure."""

    def update(updates, state, params=None, *, value_fn=None, **extra):
        flat, unravel = jax.flatten_util.ravel_pytree(updates)
        matrix = oracles.dense_matrix(oracles.hessian_product(value_fn, params), params)
        return unravel(-jnp.linalg.solve(matrix + damping * jnp.eye(flat.size), flat)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def run(optimizer, params=START, steps=3, loss=bowl):
    def body(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, optimizer.init(params)), length=steps)[0][0]


@pytest.mark.usefixtures("x64")
def test_newton_on_the_part_finds_the_minimum_with_the_rest_held():
    params = {"x": jnp.array([4.0, -3.0]), "y": jnp.array(0.5)}
    found = jax.jit(lambda p: run(optgrad.on_subtree(newton(), {"x": True, "y": False}), p, 1))(
        params
    )
    # ∂/∂x: 2·h·(x − 1) + y = 0
    np.testing.assert_allclose(found["x"], 1 - 0.5 / (2 * np.array([1.0, 30.0])), rtol=1e-12)
    assert found["y"] == 0.5


@pytest.mark.usefixtures("x64")
def test_chain_vmap_and_scan():
    """Under vmap over starts and a hyperparameter, within a chain, as one by one."""

    def final(damping, y):
        part = optgrad.on_subtree(newton(damping), lambda p: {"x": True, "y": False})
        optimizer = optax.chain(optax.clip_by_global_norm(50.0), part, optax.scale(0.5))
        return run(optimizer, {"x": jnp.array([4.0, -3.0]), "y": y})

    dampings, ys = jnp.array([0.0, 1.0, 5.0]), jnp.array([0.5, 2.0, -1.0])
    actual = jax.jit(jax.vmap(final))(dampings, ys)
    for i in range(3):
        expected = final(dampings[i], ys[i])
        np.testing.assert_allclose(actual["x"][i], expected["x"], rtol=1e-12)
    np.testing.assert_array_equal(actual["y"], ys)


def test_injected_hyperparameters():
    inner = optgrad.inject("damped_newton", damping=1e-3, adaptive=False)
    optimizer = optgrad.on_subtree(inner, {"x": True, "y": False}, optgrad.inject("sgd",
                                   learning_rate=0.0))  # fmt: skip
    state = optimizer.init(START)
    assert state.inner.hyperparams["damping"] == np.float32(1e-3)
    state.rest.hyperparams["learning_rate"] = jnp.asarray(0.1, jnp.float32)
    value, grad = jax.value_and_grad(bowl)(START)
    updates, state = jax.jit(
        lambda state: optimizer.update(grad, state, START, value=value, grad=grad, value_fn=bowl)
    )(state)
    np.testing.assert_allclose(updates["y"], -0.1 * grad["y"], rtol=1e-6)
    assert bowl({**START, "x": START["x"] + updates["x"]}) < value


def test_inject_around_the_wrapper():
    """`optax.inject_hyperparams` of a factory that wraps."""

    def factory(rate):
        return optgrad.on_subtree(optax.sgd(rate), {"x": True, "y": False})

    optimizer = optax.inject_hyperparams(factory)(rate=0.1)
    updates, _ = optimizer.update(START, optimizer.init(START), START, value_fn=bowl)
    np.testing.assert_allclose(updates["x"], [-0.4, 0.3], rtol=1e-6)
    assert updates["y"] == 0


def test_diagnostics_are_found():
    state = optgrad.on_subtree(optgrad.adaptive_sgd(), {"x": True, "y": False}).init(START)
    assert "step_size_geomean" in optgrad.diagnostics(state)


def test_a_part_within_a_part():
    inner = optgrad.on_subtree(newton(), lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree))
    optimizer = optgrad.on_subtree(inner, {"x": True, "y": False})
    actual = jax.jit(functools.partial(run, optimizer))()
    alone = optgrad.on_subtree(newton(), {"x": True, "y": False})
    expected = jax.jit(functools.partial(run, alone))()
    np.testing.assert_array_equal(actual["x"], expected["x"])


@pytest.mark.parametrize("chosen", [True, False])
def test_all_or_nothing(chosen):
    optimizer = optgrad.on_subtree(optgrad.create("damped_newton"), chosen)
    grad = jax.grad(bowl)(START)
    updates, _ = optimizer.update(grad, optimizer.init(START), START, value_fn=bowl)
    assert any(np.asarray(u).any() for u in jax.tree.leaves(updates)) == chosen


def test_flax_states_by_a_function_of_the_path():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    x = jnp.sin(jnp.arange(15.0)).reshape(5, 3)

    def value_fn(params):
        return jnp.mean((nnx.merge(graph, params)(x) - 1.0) ** 2)

    def kernels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), tree
        )

    optimizer = optgrad.on_subtree(optgrad.create("lbfgs"), kernels)
    found = jax.jit(lambda params: run(optimizer, params, 5, value_fn))(params)
    assert value_fn(found) < 0.97 * value_fn(params)
    before, after = nnx.to_pure_dict(params), nnx.to_pure_dict(found)
    np.testing.assert_array_equal(after["layers"][0]["bias"], before["layers"][0]["bias"])


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"x": True}, ValueError, r"mask does not fit the parameters: .*accepted: a tree of bools"),
        ({"x": True, "z": False}, ValueError, r"mask does not fit the parameters"),
        ({"x": True, "y": {"z": False}}, ValueError, r"mask does not fit the parameters"),
        ([True, False], ValueError, r"mask does not fit the parameters"),
        (lambda params: {"x": True}, ValueError, r"mask does not fit the parameters"),
        ({"x": 1.0, "y": False}, TypeError, r"mask\['x'\] = 1.0; accepted: bools"),
        ({"x": "yes", "y": False}, TypeError, r"mask\['x'\] = 'yes'"),
        ({"x": jnp.array(True), "y": False}, TypeError, r"mask\['x'\]"),
        (lambda p: {"x": lambda q: True, "y": False}, TypeError, r"accepted: bools"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        optgrad.on_subtree(newton(), mask).init(START)


def test_numpy_bools_are_bools():
    optimizer = optgrad.on_subtree(optax.sgd(0.1), {"x": np.bool_(True), "y": np.bool_(False)})
    assert optimizer.update(START, optimizer.init(START))[0]["y"] == 0


def test_functions_need_the_parameters():
    optimizer = optgrad.on_subtree(optax.sgd(0.1), {"x": True, "y": False})
    with pytest.raises(ValueError, match="params = None"):
        optimizer.update(START, optimizer.init(START), value_fn=bowl)

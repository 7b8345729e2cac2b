"""Methods compose with optax's chains, masks, partitions and gradient accumulation."""

import functools

import jax
import jax.numpy as jnp
import optax

import optgrad

from . import problem

KEPT, LEFT = "w", "b"  # leaves of the standard problem: with and without the method


def restricted(params, extras, subtree):
    """Extra arguments for a method that sees a part of the parameters.

    Functions of the parameters receive that part and fill in the rest; trees like the parameters
    are cut if ``subtree``, else left to the wrapper.
    """

    def restrict(extra):
        if callable(extra):
            return lambda part: extra({**params, KEPT: part[KEPT]})
        if subtree and isinstance(extra, dict) and extra.keys() == params.keys():
            return {KEPT: extra[KEPT]}
        return extra

    return {key: restrict(extra) for key, extra in extras.items()}


def updates_of(method, optimizer, steps=2):
    return problem.run_of(method, optimizer, steps).updates


def test_chain(method):
    """Clipping and weight decay ahead, a scale behind: the method sees what the chain gives it."""
    clip, decay = optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1)
    chained = optax.chain(clip, decay, problem.create(method), optax.scale(0.5))

    def by_hand(grad, state, params, *rest):
        shrink = min(1.0, 0.5 / float(optax.tree.norm(grad)))
        changed = jax.tree.map(lambda g, p: shrink * g + 0.1 * p, grad, params)
        updates, state = problem.standard_update(method.name)(changed, state, params, *rest)
        return jax.tree.map(lambda u: 0.5 * u, updates), state

    standard = problem.standard()
    state = problem.create(method).init(standard.params)
    expected = problem.run(method, by_hand, state, standard, steps=2).updates
    problem.assert_close(updates_of(method, chained), expected)


@functools.cache
def part_update(name):
    """The compiled update of a method that has the kept leaf only."""
    method = optgrad.get_method(name)
    optimizer = problem.create(method)

    def update(grad, state, params, extras, batch):
        functions = problem.functions(method, problem.quadratic_loss, params, batch)
        extras = restricted(params, {**extras, **functions}, subtree=True)
        return optimizer.update({KEPT: grad[KEPT]}, state, {KEPT: params[KEPT]}, **extras)

    return jax.jit(update)


def check_part(method, wrapped, rest):
    """A wrapper that applies the method to one leaf, against the method on that leaf alone."""
    standard = problem.standard()

    @jax.jit
    def update(grad, state, params, extras, batch):
        functions = problem.functions(method, problem.quadratic_loss, params, batch)
        extras = restricted(params, {**extras, **functions}, subtree=False)
        return wrapped.update(grad, state, params, **extras)

    def by_hand(grad, *arguments):
        part, state = part_update(method.name)(grad, *arguments)
        return {**part, LEFT: rest(grad[LEFT])}, state

    actual = problem.run(method, update, wrapped.init(standard.params), standard, steps=2)
    state = problem.create(method).init({KEPT: standard.params[KEPT]})
    expected = problem.run(method, by_hand, state, standard, steps=2)
    problem.assert_close(actual.updates, expected.updates)


def test_masked(method):
    """Under a mask the kept leaf is treated as if alone, the other's gradient passes through."""
    mask = {KEPT: True, LEFT: False}
    wrapped = optax.masked(problem.create(method), mask, mask_compatible_extra_args=True)
    check_part(method, wrapped, lambda grad: grad)


def test_partition(method):
    """In a partition each leaf is treated by its own method, as if alone."""
    wrapped = optax.partition(
        {"method": problem.create(method), "sgd": optax.sgd(0.1)},
        {KEPT: "method", LEFT: "sgd"},
        mask_compatible_extra_args=True,
    )
    check_part(method, wrapped, lambda grad: -0.1 * grad)


def test_multi_steps(method):
    """`optax.MultiSteps` over two gradients is one step with their mean, extras passed on."""
    held = []

    def by_hand(grad, state, *rest):
        held.append(grad)
        if len(held) < 2:
            return jax.tree.map(jnp.zeros_like, grad), state
        mean = jax.tree.map(lambda x, y: (x + y) / 2, *held)
        held.clear()
        return problem.standard_update(method.name)(mean, state, *rest)

    accumulated = optax.MultiSteps(problem.create(method), every_k_schedule=2)
    standard = problem.standard()
    state = problem.create(method).init(standard.params)
    expected = problem.run(method, by_hand, state, standard).updates
    problem.assert_close(updates_of(method, accumulated, problem.STEPS), expected)


def test_tree_map_params(method):
    """`optax.tree_map_params` finds all that is like the parameters, and nothing else."""
    optimizer, params = problem.create(method), problem.standard().params
    state = optimizer.init(params)
    marked = optax.tree_map_params(
        optimizer, lambda _: "like params", state, transform_non_params=lambda _: "other"
    )
    shapes = {x.shape for x in jax.tree.leaves(params)}
    for (path, leaf), (_, mark) in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree_util.tree_leaves_with_path(marked),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        of_params = where.endswith(("['b']", "['w']"))
        assert mark == ("like params" if of_params else "other"), where
        assert of_params or leaf.shape not in shapes, where

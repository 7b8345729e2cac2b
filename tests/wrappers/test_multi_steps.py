"""`MultiSteps`: a period of micro-batches is one step of the big batch, with its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import problem

import optgrad

K = 4
# One for each set of what it is handed.
WITH_EXTRAS = [*{m.needs: m for m in optgrad.methods() if m.needs - {"params"}}.values()]
NOT_AVERAGED = {"per_example_grads", "features", "kfac_stats"}  # and functions


def merged(batches):
    """The examples of consecutive micro-batches (K, B, …) as one batch."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)


def split_names(method):
    names = problem.names_of_extras(method)
    last = [n for n in names if problem.is_function(n) or n in NOT_AVERAGED]
    return [n for n in names if n not in last], last


# One big batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_EXTRAS, ids=lambda m: m.name)
def test_a_period_is_one_step_of_the_big_batch(method):
    """For methods that are handed a loss, a variance …; functions are the big batch's."""
    average, last = split_names(method)
    inner = problem.create(method)
    wrapped = optgrad.MultiSteps(inner, K, average=average, last=last)
    single = problem.quadratic(problem.standard().params, steps=2 * K)

    def extras_of(params, batch):
        return problem.gradient_and_extras(method, single.loss_fn, params, batch)

    @jax.jit
    def accumulated(params, state, batches):
        whole = extras_of(params, merged(batches))[1]

        def step(state, batch):
            grad, extras = extras_of(params, batch)
            extras |= {name: whole[name] for name in last}
            updates, state = wrapped.update(
                grad, state, params, num_examples=problem.EXAMPLES, **extras
            )
            return state, updates

        state, updates = jax.lax.scan(step, state, batches)
        return jax.tree.map(lambda x: x[-1], updates), state

    @jax.jit
    def at_once(params, state, batches):
        grad, extras = extras_of(params, merged(batches))
        return inner.update(grad, state, params, **extras)

    params = single.params
    state, expected_state = wrapped.init(params), inner.init(params)
    # 12 residuals of a rank below 9 parameters: 1/λ = 100 multiplies the gradient's rounding.
    rtol = 1e-3 if "residual_fn" in method.needs else 1e-5
    for period in range(2):
        batches = jax.tree.map(lambda x, p=period: x[p * K : (p + 1) * K], single.batches)
        actual, state = accumulated(params, state, batches)
        expected, expected_state = at_once(params, expected_state, batches)
        problem.assert_close(actual, expected, rtol=rtol)
        assert bool(wrapped.has_updated(state))
        params = optax.apply_updates(params, expected)
    problem.assert_close(state.inner_opt_state, expected_state, rtol=rtol)


def test_optax_hands_over_the_last_loss_and_none_within_a_chain():
    """What this wrapper is for: the step of f̄/‖ḡ‖² is not that of the last f."""
    polyak = optgrad.create("polyak", max_learning_rate=10.0)
    batches = ((jnp.array([2.0, 0.0]), 3.0), (jnp.array([0.0, 2.0]), 1.0))

    def last_updates(optimizer):
        state = optimizer.init(jnp.zeros(2))
        for gradient, value in batches:
            updates, state = optimizer.update(gradient, state, jnp.zeros(2), value=value)
        return updates

    np.testing.assert_allclose(last_updates(optgrad.MultiSteps(polyak, 2)), [-1, -1])
    np.testing.assert_allclose(last_updates(optax.MultiSteps(polyak, 2)), [-0.5, -0.5])
    ours = optax.chain(optgrad.MultiSteps(polyak, 2), optax.scale(2.0))
    np.testing.assert_allclose(last_updates(ours), [-2, -2])
    theirs = optax.chain(optax.MultiSteps(polyak, 2).gradient_transformation(), optax.scale(2.0))
    with pytest.raises((TypeError, ValueError), match="value"):
        last_updates(theirs)


# Means ----------------------------------------------------------------------------------------


def recording(names):
    """A transformation whose state is what it was handed last; its update is the gradient."""

    def init(params):
        empty = {name: params if name != "value" else jnp.zeros(()) for name in names}
        return {"grads": params, "calls": jnp.zeros((), jnp.int32), **empty}

    def update(updates, state, params=None, **extra):
        kept = {name: extra[name] for name in names}
        return updates, {"grads": updates, "calls": state["calls"] + 1, **kept}

    return optax.GradientTransformationExtraArgs(init, update)


def samples(sizes, seed=0):
    """Per-example gradients (n_j, 3) of micro-batches of these sizes, and their losses."""
    generator = np.random.default_rng(seed)
    return [(generator.normal(1, 2, (n, 3)), generator.normal(size=n)) for n in sizes]


def variance_of_mean(gradients):
    return gradients.var(axis=0, ddof=1) / len(gradients)


def feed(optimizer, state, groups, **weights):
    for index, (gradients, values) in enumerate(groups):
        mean = jnp.asarray(gradients.mean(axis=0))
        given = {name: value[index] for name, value in weights.items()}
        updates, state = optimizer.update(
            mean,
            state,
            jnp.zeros(3),
            value=values.mean(),
            grad=2 * mean,
            gradient_variance=jnp.asarray(variance_of_mean(gradients)),
            **given,
        )
    return updates, state


NAMES = ("value", "grad", "gradient_variance")


@pytest.mark.usefixtures("x64")
def test_equal_micro_batches_average_and_the_variance_is_that_of_the_mean():
    groups = samples([5] * K)
    optimizer = optgrad.MultiSteps(recording(NAMES), K, average=NAMES)
    updates, state = feed(optimizer, optimizer.init(jnp.zeros(3)), groups)
    mean = np.mean([g.mean(axis=0) for g, _ in groups], axis=0)
    variances = [variance_of_mean(g) for g, _ in groups]
    seen = state.inner_opt_state
    np.testing.assert_allclose(updates, mean, rtol=1e-13)
    np.testing.assert_allclose(seen["grad"], 2 * mean, rtol=1e-13)
    np.testing.assert_allclose(seen["value"], np.mean([v.mean() for _, v in groups]), rtol=1e-13)
    np.testing.assert_allclose(seen["gradient_variance"], np.mean(variances, 0) / K, rtol=1e-13)


def test_the_variance_without_numbers_of_examples_is_unbiased():
    """Its mean over 2000 periods is σ²/N; the micro-batches' own would give K times that."""
    draws = np.random.default_rng(0).normal(0, 1, (2000, K, 5)).astype(np.float32)
    optimizer = optgrad.MultiSteps(recording(NAMES[2:]), K, average=NAMES[2:])

    @jax.jit
    @jax.vmap
    def period(groups):
        state = optimizer.init(jnp.zeros(()))
        for group in groups:
            variance = optgrad.gradient_variance(group)
            _, state = optimizer.update(group.mean(), state, gradient_variance=variance)
        return state.inner_opt_state["gradient_variance"]

    mean = np.mean(np.asarray(period(draws)))
    assert abs(mean * 5 * K - 1) < 0.03  # standard error: √(2/16/2000) = 0.008


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(2, 7, 3, 30), (4, 4, 4, 4), (9, 2, 2, 2)])
def test_numbers_of_examples_give_the_big_batch_exactly(sizes):
    groups = samples(sizes)
    gradients, values = (np.concatenate(x) for x in zip(*groups, strict=True))
    names = ("value", "gradient_variance")
    optimizer = optgrad.MultiSteps(recording(names), K, average=names, last=("grad",))
    updates, state = feed(optimizer, optimizer.init(jnp.zeros(3)), groups, num_examples=sizes)
    seen = state.inner_opt_state
    np.testing.assert_allclose(updates, gradients.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(seen["value"], values.mean(), rtol=1e-12)
    expected = variance_of_mean(gradients)
    np.testing.assert_allclose(seen["gradient_variance"], expected, rtol=1e-12)


def test_the_mean_gradient_may_come_from_grad():
    """Where something is ahead in the chain, the variance is that of the gradient itself."""
    groups = [(g.astype(np.float32), v) for g, v in samples((2, 7, 3, 30))]
    optimizer = optgrad.MultiSteps(recording(NAMES), K, average=NAMES)
    state = optimizer.init(jnp.zeros(3))
    for gradients, values in groups:
        mean = jnp.asarray(gradients.mean(axis=0))
        _, state = optimizer.update(
            jnp.clip(mean, -0.1, 0.1), state, value=values.mean(), grad=mean,
            gradient_variance=jnp.asarray(variance_of_mean(gradients)),
            num_examples=len(gradients),
        )  # fmt: skip
    expected = variance_of_mean(np.concatenate([g for g, _ in groups]))
    np.testing.assert_allclose(state.extras["gradient_variance"], expected, rtol=1e-5)


def test_a_thousand_bfloat16_gradients_are_averaged_in_float32():
    gradients = jnp.asarray(np.random.default_rng(0).uniform(1, 1.01, (1000, 8)), jnp.bfloat16)
    optimizer = optgrad.MultiSteps(optax.identity(), 1000)
    params = jnp.zeros(8, jnp.bfloat16)

    def body(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, updates

    state, updates = jax.jit(lambda g: jax.lax.scan(body, optimizer.init(params), g))(gradients)
    exact = np.asarray(gradients, np.float64).mean(axis=0)
    assert state.acc_grads.dtype == jnp.float32
    np.testing.assert_allclose(state.acc_grads, exact, rtol=1e-5)
    assert updates.dtype == jnp.bfloat16
    assert not np.asarray(updates[:-1]).any()
    np.testing.assert_array_equal(updates[-1], exact.astype(jnp.bfloat16))


# Periods --------------------------------------------------------------------------------------


def run(optimizer, gradients, values=None):
    """Updates, and the state after each call, of a compiled loop over scalars."""
    values = jnp.zeros(len(gradients)) if values is None else values

    def body(state, given):
        gradient, value = given
        updates, state = optimizer.update(gradient, state, jnp.zeros(()), value=value)
        return state, (updates, state)

    start = optimizer.init(jnp.zeros(()))
    return jax.jit(lambda *given: jax.lax.scan(body, start, given))(gradients, values)[1]


def test_k_follows_a_schedule_of_finished_periods():
    optimizer = optgrad.MultiSteps(optax.identity(), lambda step: jnp.array([1, 3, 2])[step])
    updates, states = run(optimizer, jnp.array([1.0, 3.0, 5.0, 10.0, 4.0, 6.0]))
    np.testing.assert_array_equal(updates, [1, 0, 0, 6, 0, 5])
    np.testing.assert_array_equal(states.gradient_step, [1, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(states.mini_step, [0, 1, 2, 0, 1, 0])
    updated = jax.vmap(optimizer.has_updated)(states)
    np.testing.assert_array_equal(updated, [True, False, False, True, False, True])


def test_one_micro_batch_is_the_wrapped_optimizer_itself():
    inner, gradients = optax.adam(0.1), jnp.array([1.0, -2.0, 3.0, 0.5])
    actual, _ = run(optgrad.MultiSteps(inner, 1), gradients)
    expected, _ = run(optax.with_extra_args_support(inner), gradients)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_micro_batch_does_not_reach_the_next_period(bad):
    gradients = jnp.array([1.0, bad, 3.0, 1.0, 2.0, 6.0])
    optimizer = optgrad.MultiSteps(optax.identity(), 3)
    updates, states = run(optimizer, gradients, gradients)
    assert not np.isfinite(updates[2])
    np.testing.assert_array_equal(updates[jnp.array([0, 1, 3, 4, 5])], [0, 0, 0, 0, 3])
    assert states.extras["value"][-1] == 3
    poisoned, _ = run(optax.MultiSteps(optax.identity(), 3), gradients, gradients)
    assert np.isnan(poisoned[-1])  # 0·NaN: why there is a test


def test_skipped_micro_batches_never_were():
    gradients = jnp.array([jnp.nan, 1.0, jnp.nan, 3.0, jnp.nan, 5.0, 7.0])
    optimizer = optgrad.MultiSteps(
        recording(("value",)), 2, should_skip_update_fn=optax.skip_not_finite
    )
    updates, states = run(optimizer, gradients, 10 * gradients)
    np.testing.assert_array_equal(updates, [0, 0, 0, 2, 0, 0, 6])
    np.testing.assert_array_equal(states.inner_opt_state["value"][-1], 60)
    np.testing.assert_array_equal(states.inner_opt_state["calls"], [0, 0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(states.skip_state["should_skip"], np.isnan(gradients))
    reference = optax.MultiSteps(
        optax.identity(), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()
    expected, _ = run(optax.with_extra_args_support(reference), gradients)
    np.testing.assert_array_equal(updates, expected)


def test_a_micro_batch_without_examples_counts_nothing():
    optimizer = optgrad.MultiSteps(recording(("value",)), 3)
    state = optimizer.init(jnp.zeros(()))
    for gradient, count in ((jnp.nan, 0), (2.0, 3), (6.0, 1)):
        updates, state = optimizer.update(
            jnp.asarray(gradient), state, value=gradient, num_examples=count
        )
    assert updates == 3
    assert state.inner_opt_state["value"] == 3


def test_the_wrapped_update_is_computed_once_in_a_period():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    jax.block_until_ready(run(optgrad.MultiSteps(inner, 4), jnp.ones(12)))
    jax.effects_barrier()
    assert len(calls) == 3


def test_the_finished_periods_mean_loss_can_be_read():
    _, states = run(optgrad.MultiSteps(optax.sgd(0.1), 2), jnp.ones(4), jnp.array([1.0, 5, 2, 4]))
    np.testing.assert_array_equal(states.extras["value"], [1, 3, 2, 3])


# State ----------------------------------------------------------------------------------------


def test_vmap_over_a_hyperparameter():
    @functools.partial(jax.vmap, in_axes=(0, None))
    def final(rate, gradients):
        optimizer = optgrad.MultiSteps(optgrad.create("adam", learning_rate=rate), 2)
        return run(optimizer, gradients)[0].sum()

    gradients = jnp.array([1.0, 2.0, -1.0, 4.0])
    rates = jnp.array([0.1, 0.2])
    expected = [run(optgrad.MultiSteps(optax.adam(float(r)), 2), gradients)[0].sum() for r in rates]
    np.testing.assert_allclose(final(rates, gradients), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_types_are_fixed_from_the_start(dtype):
    params = {"a": jnp.ones(3, dtype), "b": [None, jnp.ones((), dtype)], "c": jnp.ones((0, 2))}
    optimizer = optgrad.MultiSteps(optgrad.create("m_svag_mb", learning_rate=0.1), 2,
                                   average=("value", "gradient_variance"))  # fmt: skip
    state = optimizer.init(params)

    def update(state):
        return optimizer.update(params, state, params, value=1.0, gradient_variance=params)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    updates, after = jax.eval_shape(update, state)
    assert types(after) == types(jax.eval_shape(lambda: state))
    wide = jnp.promote_types(dtype, jnp.float32)
    assert state.acc_grads["a"].dtype == state.extras["gradient_variance"]["a"].dtype == wide
    assert updates["a"].dtype == dtype


def test_compiles_once_and_reuses_the_state():
    params = {"a": jnp.zeros(5000)}
    optimizer = optgrad.MultiSteps(optax.adam(0.1), 2)
    traces = []

    def step(params, state, grads, value):
        traces.append(1)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    start = jax.tree.map(jnp.copy, params)
    lowered = compiled.lower(start, state, params, 1.0).compile()
    # parameters, mean gradient and two moments
    assert lowered.memory_analysis().alias_size_in_bytes >= 4 * 5000 * 4
    traces.clear()
    for value in (1.0, 2.0, 3.0, 4.0):
        start, state = compiled(start, state, params, value)
    assert len(traces) <= 1


@pytest.mark.parametrize("params", [{}, (), {"a": None}, {"m": optax.MaskedNode()}])
def test_trees_without_leaves(params):
    optimizer = optgrad.MultiSteps(optax.adam(0.1), 2)
    state = optimizer.init(params)
    for value in (1.0, 3.0):
        updates, state = optimizer.update(params, state, params, value=value)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state.extras["value"] == 2


def test_it_is_a_transformation_like_others():
    inner = optax.sgd(0.1)
    optimizer = optgrad.MultiSteps(inner, 2)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    assert optimizer.gradient_transformation() is optimizer
    init, update = optimizer
    assert init is optimizer.init
    assert update is optimizer.update
    assert optimizer.inner_opt.init is inner.init
    masked = optax.masked(optimizer, {"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    state = masked.init(params)
    for _ in range(2):
        updates, state = masked.update(params, state, params)
    np.testing.assert_allclose(updates["a"], -0.1)


def test_diagnostics_find_the_wrapped_optimizer():
    state = optgrad.MultiSteps(optgrad.adaptive_sgd(), 2).init(jnp.zeros(3))
    assert "step_size_geomean" in optgrad.diagnostics(state)


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"grad": 1.0}, ("grad", "average=(..., 'grad')")),
        ({"gradient_variance": 1.0}, ("gradient_variance", "average=(..., 'gradient_variance')")),
        ({"per_example_grads": jnp.ones(3)}, ("per_example_grads", "gradient_variance instead")),
        ({"features": 1.0}, ("features", "curvature_diagonal (features²) instead")),
        ({"value_fn": jnp.sum}, ("value_fn", "one micro-batch", "last=('value_fn',)")),
        *(
            (
                {name: jnp.sum},
                (name, "microbatch_size of optgrad.curvature_args", f"last=('{name}',)"),
            )
            for name in ("residual_fn", "outputs_fn", "out_loss_fn", "curvature_fn", "inner_fn")
        ),
        ({"kfac_stats": {}}, ("kfac_stats", "held at once", "microbatch_size of optgrad.curv")),
        ({"anything": lambda x: x}, ("anything", "last=('anything',)")),
    ],
)
def test_what_would_be_the_last_micro_batchs_alone_is_refused(extra, words):
    name = next(iter(extra))
    update = functools.partial(
        lambda optimizer: optimizer.update(
            jnp.ones(()), optimizer.init(jnp.ones(())), jnp.ones(()), **extra
        )
    )
    with pytest.raises(ValueError, match="MultiSteps") as error:
        update(optgrad.MultiSteps(optax.sgd(0.1), 2))
    assert all(word in str(error.value) for word in words)
    update(optgrad.MultiSteps(optax.sgd(0.1), 2, last=(name,)))  # on request


@pytest.mark.usefixtures("x64")
def test_micro_batches_of_the_loss_are_the_way_to_big_batches():
    """What the message says: the same as the big batch, where the last function alone is not."""
    batch = jnp.linspace(-1.0, 3.0, 8)
    params = {"a": jnp.array([2.0, -1.0])}

    def loss_fn(params, batch):
        return jnp.mean(jnp.sum((params["a"] - batch[:, None]) ** 4, axis=1))

    def step(size):
        step = optgrad.make_step("lbfgs", loss_fn, microbatch_size=size)
        return step(params, step.init(params), batch)[0]["a"]

    np.testing.assert_allclose(step(2), step(None), rtol=1e-12)


def test_other_extras_are_the_last_micro_batchs():
    optimizer = optgrad.MultiSteps(recording(("anything",)), 2)
    state = optimizer.init(jnp.zeros(()))
    for number in (1.0, 2.0):
        _, state = optimizer.update(jnp.ones(()), state, anything=jnp.array(number))
    assert state.inner_opt_state["anything"] == 2


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((0,), {}, ValueError, "every_k_schedule = 0"),
        ((2.5,), {}, TypeError, "every_k_schedule = 2.5"),
        ((2,), {"average": "value"}, TypeError, "average = 'value' is a string"),
        ((2,), {"average": ("value_fn",)}, ValueError, "value_fn is a function"),
        ((2,), {"average": ("per_example_grads",)}, ValueError, "held at once"),
        ((2,), {"average": ("residual_fn",)}, ValueError, "residual_fn is a function"),
        ((2,), {"average": ("kfac_stats",)}, ValueError, "held at once.*microbatch_size"),
    ],
)
def test_bad_arguments(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        optgrad.MultiSteps(optax.sgd(0.1), *arguments, **keywords)


def test_a_missing_loss_is_refused_by_the_wrapped_optimizer():
    optimizer = optgrad.MultiSteps(optgrad.create("polyak"), 2)
    with pytest.raises((TypeError, ValueError), match="value"):
        optimizer.update(jnp.ones(()), optimizer.init(jnp.ones(())), jnp.ones(()))

"""`curvature_args` and `make_step`: the extra arguments of one batch, and whole training steps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.core import layer_statistics, oracles

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

N = 7  # examples: prime, so that no size of micro-batches divides it
L2 = 0.1


# A problem with everything ----------------------------------------------------------------------


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (hidden @ params["out"]["kernel"])[:, 0]


def outputs(params, batch):
    """What L2 needs is among the outputs."""
    return network(params, batch["x"]), params


def out_loss(z, batch):
    prediction, params = z
    squares = 0.5 * jnp.mean((prediction - batch["y"]) ** 2)
    return squares + 0.5 * L2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def loss_fn(params, batch):
    return out_loss(outputs(params, batch), batch)


def residual(params, batch):
    return (network(params, batch["x"]) - batch["y"]) / math.sqrt(len(batch["x"]))


def make_batch(n=N, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(generator.standard_normal((n, 3)), float),
        "y": jnp.asarray(generator.standard_normal(n), float),
    }


def make_params(seed=1):
    generator = np.random.default_rng(seed)
    shapes = {"hidden": {"kernel": (3, 4), "bias": (4,)}, "out": {"kernel": (4, 1)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(0.5 * generator.standard_normal(shape), float),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def assert_close(actual, expected, rtol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), actual, expected
    )


# The extra arguments ------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_everything_at_once():
    params, batch = make_params(), make_batch()
    args = optgrad.curvature_args(
        loss_fn, outputs, out_loss, residual, per_example=True, variance=True, diagonal=True,
        kfac=lambda params, batch: {"sum": jnp.sum(batch["x"])}, curvature_batch=3,
        inner_batch=lambda batch, key: jax.tree.map(lambda x: x[2:], batch),
    )  # fmt: skip
    other = jax.tree.map(lambda p: p + 0.1, params)

    @jax.jit
    def given(params, batch):
        found = args(params, batch)
        functions = [name for name in found if callable(found[name])]
        return {k: v(v_at(k, found)) if k in functions else v for k, v in found.items()}

    def v_at(name, found):
        return found["outputs_fn"](other) if name == "out_loss_fn" else other

    found = given(params, batch)
    value, grad = jax.value_and_grad(loss_fn)(params, batch)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(N)]
    gradient = jax.jit(jax.grad(loss_fn))
    grads = [gradient(params, row) for row in rows]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    assert_close(found.pop("value"), value)
    assert_close(found.pop("grad"), grad)
    assert_close(found.pop("value_fn"), loss_fn(other, batch))
    assert_close(found.pop("outputs_fn"), outputs(other, batch))
    assert_close(found.pop("out_loss_fn"), loss_fn(other, batch))
    assert_close(found.pop("residual_fn"), residual(other, batch))
    assert_close(found.pop("curvature_fn"), loss_fn(other, jax.tree.map(lambda x: x[:3], batch)))
    assert_close(found.pop("inner_fn"), loss_fn(other, jax.tree.map(lambda x: x[2:], batch)))
    assert_close(found.pop("per_example_grads"), stacked)
    variance = jax.tree.map(lambda g: g.var(axis=0, ddof=1) / N, stacked)
    assert_close(found.pop("gradient_variance"), variance)
    assert_close(found.pop("kfac_stats"), {"sum": jnp.sum(batch["x"])})
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    diagonal = found.pop("curvature_diagonal")["out"]["kernel"]
    np.testing.assert_allclose(diagonal[:, 0], jnp.mean(hidden**2, axis=0) + L2, rtol=1e-12)
    assert not found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"loss_fn": loss_fn}, {"value", "grad", "value_fn"}),
        (
            {"outputs": outputs, "out_loss": out_loss},
            {"value", "grad", "value_fn", "outputs_fn", "out_loss_fn"},
        ),
        ({"residual": residual}, {"value", "grad", "value_fn", "residual_fn"}),
        (
            {"loss_fn": loss_fn, "curvature_batch": 4},
            {"value", "grad", "value_fn", "curvature_fn"},
        ),
    ],
    ids=["loss", "outputs", "residual", "curvature_batch"],
)
def test_what_is_given_decides_what_is_built(given, expected):
    """And the loss is composed where there is none."""
    params, batch = make_params(), make_batch()
    found = optgrad.curvature_args(**given)(params, batch)
    assert found.keys() == expected
    penalty = 0.5 * L2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    value = loss_fn(params, batch) - (penalty if "residual" in given else 0.0)
    np.testing.assert_allclose(found["value"], value, rtol=1e-12)
    assert_close(found["grad"], jax.grad(found["value_fn"])(params))


# Micro-batches --------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_micro_batches_are_the_whole_batch(size):
    """Values, gradients, both kinds of products and outputs, also where the size divides not."""
    params, batch = make_params(), make_batch()
    direction = make_params(5)

    @functools.partial(jax.jit, static_argnums=2)
    def everything(params, batch, size):
        args = optgrad.curvature_args(
            loss_fn, outputs, out_loss, per_example=True, variance=True, diagonal=True,
            curvature_batch=5, microbatch_size=size,
        )  # fmt: skip
        found = args(params, batch)
        hessian = oracles.hessian_product(found["value_fn"], params)(direction)
        gauss_newton = oracles.gauss_newton_product(
            found["outputs_fn"], found["out_loss_fn"], params
        )(direction)
        arrays = {k: v for k, v in found.items() if not callable(v)}
        other = jax.tree.map(lambda p: 2 * p, params)
        curvature = jax.value_and_grad(found["curvature_fn"])(other)
        return arrays, hessian, gauss_newton, curvature, found["outputs_fn"](other)

    assert_close(everything(params, batch, size), everything(params, batch, None), rtol=1e-11)


def test_the_gradient_of_micro_batches_is_added_up_in_float32():
    """A thousand terms in bfloat16 would stop growing at 256 times the first one."""
    params = jnp.zeros((), jnp.bfloat16)
    batch = jnp.full((1000, 1), 1.0, jnp.bfloat16)
    args = optgrad.curvature_args(
        lambda p, b: jnp.mean(p * b), lambda p, b: p * b, lambda z, b: jnp.mean(z * z),
        microbatch_size=1,
    )  # fmt: skip
    found = args(params, batch)
    assert found["grad"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(found["grad"]), 1.0, rtol=4e-3)
    product = oracles.gauss_newton_product(found["outputs_fn"], found["out_loss_fn"], params)
    np.testing.assert_allclose(product(jnp.ones(())), 2.0, rtol=1e-2)


def test_memory_is_that_of_one_micro_batch():
    """128 of 2048 examples at once: temporary memory of every product falls by 4 and more."""
    examples, width, layers, size = 2048, 16, 5, 128
    params = [jnp.eye(width) for _ in range(layers)]
    batch = jnp.ones((examples, width))

    def outputs(params, batch):
        for w in params:
            batch = jnp.tanh(batch @ w)
        return batch

    def out_loss(z, batch):
        return jnp.mean(z**2)

    def bytes_of(compute, size):
        args = optgrad.curvature_args(outputs=outputs, out_loss=out_loss, microbatch_size=size)
        compiled = jax.jit(lambda params, batch: compute(args(params, batch), params)).lower(
            params, batch
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    def hessian(found, params):
        product = oracles.hessian_product(found["value_fn"], params)
        return jax.lax.fori_loop(0, 3, lambda _, v: product(v), params)

    def gauss_newton(found, params):
        product = oracles.gauss_newton_product(found["outputs_fn"], found["out_loss_fn"], params)
        return jax.lax.fori_loop(0, 3, lambda _, v: product(v), params)

    inputs, activations = examples * width * 4, size * width * layers * 4
    for compute, times in (
        (lambda found, params: found["grad"], 2),
        (hessian, 4),
        (gauss_newton, 4),
    ):
        whole, divided = bytes_of(compute, None), bytes_of(compute, size)
        outputs_stored = 3 * inputs if compute is gauss_newton else 0  # z, Jv and what z pulls back
        assert whole > layers * inputs / 2
        assert divided < outputs_stored + times * activations, (whole, divided)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_a_sharded_batch_stays_sharded(explicit):
    """No all-gather of it: every micro-batch has examples of all devices."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])

    def place(x, *axes):
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    x, w = place(jnp.sin(jnp.arange(96.0)).reshape(32, 3), "data"), place(jnp.ones(3))

    def loss(w, x):
        return jnp.mean(jnp.sum(jnp.tanh(x * w), axis=1) ** 2)

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(w, x, size):
        return optgrad.curvature_args(loss, microbatch_size=size)(w, x)["grad"]

    compiled = gradient.lower(w, x, 8).compile()
    np.testing.assert_allclose(gradient(w, x, 8), gradient(w, x, None), rtol=1e-5)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.usefixtures("x64")
def test_trees_without_leaves_and_empty_parameters():
    found = optgrad.curvature_args(
        lambda p, b: jnp.mean(b), per_example=True, variance=True, microbatch_size=2
    )({}, jnp.arange(5.0))
    assert (found["value"], found["grad"]) == (2.0, {})


# Randomness ---------------------------------------------------------------------------------------


def random_loss(params, batch, key):
    kept = jax.random.bernoulli(key, 0.5, batch["y"].shape)
    return jnp.mean(kept * (network(params, batch["x"]) - batch["y"]) ** 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [None, 2])
def test_one_step_is_one_function_of_the_parameters(size):
    params, batch = make_params(), make_batch()
    args = optgrad.curvature_args(
        random_loss, per_example=True, variance=True, curvature_batch=lambda batch, key: batch,
        microbatch_size=size,
    )  # fmt: skip

    @jax.jit
    def evaluate(params, batch, key):
        found = args(params, batch, key)
        arrays = {name: x for name, x in found.items() if not callable(x)}
        again = jax.value_and_grad(found["value_fn"])(params)
        return arrays, again, found["curvature_fn"](params)

    values = []
    for key in jax.random.split(jax.random.PRNGKey(0), 2):
        found, (value, grad), other = evaluate(params, batch, key)
        np.testing.assert_allclose(found["value"], value, rtol=1e-12)
        np.testing.assert_allclose(found["value"], other, rtol=1e-12)
        assert_close(found["grad"], grad)
        rows = found["per_example_grads"]
        variance = jax.tree.map(lambda g: g.var(axis=0, ddof=1) / N, rows)
        assert_close(found["gradient_variance"], variance)
        dropped = [not np.asarray(rows["out"]["kernel"][i]).any() for i in range(N)]
        assert any(dropped) != all(dropped)  # each example has a key of its own
        values.append(float(found["value"]))
    assert values[0] != values[1]
    if size is None:
        expected = random_loss(params, batch, jax.random.split(jax.random.PRNGKey(0), 2)[1])
        np.testing.assert_allclose(values[1], expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_micro_batches_of_a_random_loss_have_keys_of_their_own():
    batch = jnp.zeros(6)
    args = optgrad.curvature_args(
        lambda p, b, rng: jnp.mean(p + b + jax.random.uniform(rng)), microbatch_size=2
    )
    key = jax.random.PRNGKey(3)
    draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)]
    found = args(jnp.zeros(()), batch, key)
    np.testing.assert_allclose(found["value"], np.mean(draws), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_key_that_nobody_takes_changes_nothing():
    """And a third argument with a default is the function's own affair."""

    def with_default(params, batch, weight=2.0):
        return weight * loss_fn(params, batch)

    params, batch = make_params(), make_batch()
    args = optgrad.curvature_args(with_default, variance=True, microbatch_size=3)
    with_key = args(params, batch, jax.random.PRNGKey(0))
    np.testing.assert_allclose(with_key["value"], 2 * loss_fn(params, batch), rtol=1e-12)
    assert_close(with_key["gradient_variance"], args(params, batch)["gradient_variance"])


def test_a_missing_key_is_refused():
    args = optgrad.curvature_args(random_loss)
    with pytest.raises(ValueError, match=r"key = None; accepted: a PRNG key, which random_loss"):
        args(make_params(), make_batch())


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "curvature_args needs grad: pass loss_fn"),
        ({"loss_fn": 3}, TypeError, "loss_fn = 3; accepted: a function"),
        ({"outputs": outputs}, ValueError, "outputs is given without out_loss"),
        ({"out_loss": out_loss}, ValueError, "out_loss is given without outputs"),
        (
            {"loss_fn": loss_fn, "diagonal": True},
            ValueError,
            "curvature_diagonal: pass outputs=... and out_loss=...",
        ),
        ({"residual": residual, "microbatch_size": 2}, ValueError, "needs a mean over examples"),
        ({"loss_fn": loss_fn, "microbatch_size": 0}, ValueError, "microbatch_size = 0"),
        ({"loss_fn": loss_fn, "microbatch_size": 2.0}, TypeError, "microbatch_size = 2.0"),
        ({"loss_fn": loss_fn, "curvature_batch": 0}, ValueError, "curvature_batch = 0; accepted"),
        ({"loss_fn": loss_fn, "inner_batch": "all"}, ValueError, "inner_batch = 'all'; accepted"),
        ({"loss_fn": loss_fn, "inner_batch": True}, ValueError, "inner_batch = True; accepted"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        optgrad.curvature_args(**arguments)


@pytest.mark.parametrize("size", [None, 2])
def test_losses_that_are_no_scalar_are_refused(size):
    args = optgrad.curvature_args(
        lambda p, b: (p["hidden"]["kernel"] - b["y"][0]) ** 2, microbatch_size=size
    )
    with pytest.raises(ValueError, match=r"the loss has the shapes \(3, 4\); accepted: a scalar"):
        args(make_params(), make_batch())
    args = optgrad.curvature_args(lambda p, b: (loss_fn(p, b), {}), microbatch_size=size)
    with pytest.raises(ValueError, match=r"the loss has the shapes .*accepted: a scalar"):
        args(make_params(), make_batch())


def test_outputs_that_mix_examples_are_refused_in_micro_batches():
    args = optgrad.curvature_args(
        outputs=lambda p, b: b["x"] @ b["x"].T * p["hidden"]["bias"][0],
        out_loss=lambda z, b: jnp.mean(z),
        microbatch_size=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"shapes \(2, 2\) for 2 examples and \(7, 7\) for 7"):
        args(make_params(), make_batch())["outputs_fn"](make_params())


# Whole steps --------------------------------------------------------------------------------------


def toy(names):
    """Gradient descent that fails unless it is given what these names say, and nothing else."""

    def update(updates, state, params=None, **extra):
        assert sorted(extra) == sorted(names), sorted(extra)
        return jax.tree.map(lambda g: -0.1 * g, updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("value", "grad", "value_fn")),
        ({"residual": residual}, ("value", "grad", "value_fn", "residual_fn")),
        ({"curvature_batch": 2}, ("value", "grad", "value_fn", "curvature_fn")),
        ({"needs": ("params", "gradient_variance")}, ("gradient_variance",)),
        ({"needs": ()}, ()),
    ],
)
def test_a_transformation_gets_what_was_given_or_what_it_needs(options, names):
    params, batch = make_params(), make_batch()
    step = optgrad.make_step(toy(names), loss_fn, **options)
    new, state, info = step(params, step.init(params), batch)
    value, grad = jax.value_and_grad(loss_fn)(params, batch)
    assert_close(new, jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), rtol=1e-5)
    np.testing.assert_allclose(info.value, value, rtol=1e-6)
    assert (state, info.diagnostics) == (1, {})
    assert step.optimizer.init(params) == 0


def kfac(params, batch, key):
    def apply(params, x, taps):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
                          + taps["hidden"])  # fmt: skip
        z = hidden @ params["out"]["kernel"] + taps["out"]
        return z, {"hidden": x, "out": hidden}

    return layer_statistics.layer_statistics(
        apply, params, batch["x"], key=key, likelihood="squared"
    )


def needs_of_all():
    """One method for each set of needs."""
    kinds = {method.needs: method.name for method in optgrad.methods()}
    return sorted(kinds.values())


@pytest.mark.parametrize("name", needs_of_all())
def test_every_kind_of_method_trains(name):
    method = optgrad.get_method(name)
    if method.needs & {"features"} and "curvature_diagonal" not in method.needs:
        pytest.skip("features are the caller's own")
    given = (loss_fn, outputs, out_loss)
    if "residual_fn" in method.needs:  # of a loss without L2
        given = (None, None, None, residual)
    step = optgrad.make_step(name, *given, kfac=kfac, **method.test_hyperparams)
    if "features" in method.needs:
        assert "features" not in step.args.names
    params, batch = make_params(), make_batch(24)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    state = step.init(params)
    values = []
    for key in jax.random.split(jax.random.PRNGKey(0), 8):
        params, state, info = step(params, state, batch, key)
        values.append(float(info.value))
    assert step._compiled._cache_size() == 1
    assert values[-1] < values[0]


def test_info_has_the_optimizers_diagnostics():
    step = optgrad.make_step("truncated_newton", loss_fn)
    params, batch = make_params(), make_batch()
    _, state, info = step(params, step.init(params), batch)
    assert info.diagnostics.keys() == optgrad.diagnostics(state).keys()
    assert info.diagnostics["gradient_equivalents"] > 1


def test_needs_decide_among_alternatives():
    chosen = optgrad.make_step("m_svag_mb", loss_fn, learning_rate=0.1).args.names
    assert chosen >= {"gradient_variance"}
    assert "per_example_grads" not in chosen
    assert optgrad.make_step("sgd", loss_fn, residual=residual, learning_rate=0.1).args.names == (
        frozenset()
    )
    lbfgs = optgrad.make_step("lbfgs", loss_fn, residual=residual)  # optax would refuse it
    assert lbfgs.args.names == {"value", "grad", "value_fn"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("levenberg_marquardt", (loss_fn,), "levenberg_marquardt needs residual_fn: pass residual"),
        (
            "hessian_free",
            (loss_fn,),
            r"hessian_free needs out_loss_fn: pass outputs=\.\.\. and out_loss=\.\.\.",
        ),
        ("truncated_newton", (), "truncated_newton needs grad: pass loss_fn"),
        ("m_svag_mb", (), "m_svag_mb needs grad: pass loss_fn"),
    ],
)
def test_what_is_missing_is_named(name, given, message):
    hyperparams = {"learning_rate": 0.1} if name == "m_svag_mb" else {}
    with pytest.raises(ValueError, match=message):
        optgrad.make_step(name, *given, **hyperparams)


def test_explicit_needs_are_checked():
    with pytest.raises(ValueError, match="the optimizer needs curvature_fn: pass curvature_batch="):
        optgrad.make_step(optax.sgd(0.1), loss_fn, needs=("curvature_fn",))
    with pytest.raises(ValueError, match="the optimizer needs features, which is not built here"):
        optgrad.make_step(optax.sgd(0.1), loss_fn, needs=("features",))


def test_wrong_hyperparameters_and_names():
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        optgrad.make_step("sgd", loss_fn, learning_rat=0.1)
    with pytest.raises(KeyError, match="did you mean"):
        optgrad.make_step("lbgfs", loss_fn)
    with pytest.raises(TypeError, match="learning_rate given with a transformation"):
        optgrad.make_step(optax.sgd(0.1), loss_fn, learning_rate=0.1)


def test_donated_buffers_are_reused():
    hidden = {"kernel": jnp.ones((500, 3)), "bias": jnp.zeros(3)}
    params = {"hidden": hidden, "out": {"kernel": jnp.ones((3, 1))}}
    batch = {"x": jnp.ones((4, 500)), "y": jnp.ones(4)}
    step = optgrad.make_step("momentum", loss_fn, donate=True, learning_rate=0.1)
    state = step.init(params)
    start = jax.tree.map(jnp.copy, params)
    memory = step._compiled.lower(start, state, batch, None).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * 1500  # parameters and momentum
    for _ in range(2):
        start, state, _ = step(start, state, batch)
    assert not params["hidden"]["kernel"].is_deleted()
    kept = optgrad.make_step("momentum", loss_fn, learning_rate=0.1)
    other, state = jax.tree.map(jnp.copy, params), kept.init(params)
    for _ in range(2):
        other, state, _ = kept(other, state, batch)
    assert_close(start, other, rtol=1e-6)


def test_an_optimizer_whose_state_is_the_parameters_can_be_donated():
    """optax.lookahead and others begin with the parameters themselves."""
    keeping = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, state)
    )
    step = optgrad.make_step(keeping, lambda p, b: jnp.mean(p * b), donate=True)
    params = jnp.ones(3)
    state = step.init(params)
    step(params, state, jnp.ones(3))


def test_steps_can_be_scanned_and_vmapped():
    batches = jax.tree.map(lambda x: x.reshape(4, 6, *x.shape[1:]), make_batch(24))

    def final(damping, scale):
        step = optgrad.make_step(optgrad.create("damped_newton", damping=damping), loss_fn)
        params = jax.tree.map(lambda p: scale * p, make_params())

        def body(carry, batch):
            params, state, info = step(*carry, batch)
            return (params, state), info.value

        return jax.lax.scan(body, (params, step.init(params)), batches)[1]

    dampings, scales = jnp.array([0.3, 3.0]), jnp.array([1.0, 0.5])
    together = jax.jit(jax.vmap(final))(dampings, scales)
    for i in range(2):
        np.testing.assert_allclose(together[i], final(dampings[i], scales[i]), rtol=1e-4)


def test_micro_batches_in_a_step():
    params, batch = make_params(), make_batch()
    results = []
    for size in (None, 3):
        step = optgrad.make_step(
            "hessian_free", outputs=outputs, out_loss=out_loss, microbatch_size=size
        )
        results.append(step(params, step.init(params), batch))
    assert_close(results[1][0], results[0][0], rtol=1e-4)


# Libraries of networks ----------------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
DATA = {"x": X, "y": np.sin(X[:, :1])}


def squared(z, batch):
    return 0.5 * jnp.mean((z - batch["y"]) ** 2)


def check_training(outputs, params, names=("hessian_free",), **options):
    """Hessian or Gauss-Newton products, or a line search, on a tree of this kind."""
    loss = jax.jit(lambda params: squared(outputs(params, DATA), DATA))
    for name in names:
        step = optgrad.make_step(name, outputs=outputs, out_loss=squared, **options)
        current, state = params, step.init(params)
        for _ in range(4):
            current, state, _ = step(current, state, DATA)
        assert loss(current) < 0.8 * loss(params)
        assert jax.tree.structure(current) == jax.tree.structure(params)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.0, rngs=rngs)  # state beside the parameters
            self.second = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(jnp.tanh(self.first(x))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def outputs(params, batch):
        return nnx.merge(graph, params, rest)(batch["x"])

    check_training(outputs, params, ("truncated_newton", "hessian_free", "lbfgs"))
    check_training(outputs, params, ("hessian_free",), microbatch_size=5)


def test_nnx_optimizer():
    """A user's own `nnx.Optimizer`, which takes the extra arguments as they are."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optgrad.create("truncated_newton"), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch):
            return jnp.mean((nnx.merge(graph, params, rest)(batch["x"]) - batch["y"]) ** 2)

        extra = optgrad.curvature_args(loss_fn)(params, batch)
        optimizer.update(model, extra["grad"], **extra)
        return extra["value"]

    values = [float(train_step(model, optimizer, DATA)) for _ in range(6)]
    design = np.concatenate([X, np.ones((16, 1), np.float32)], axis=1)
    best = np.linalg.lstsq(design, DATA["y"], rcond=None)[1][0] / 16
    assert values[-1] < values[0]
    np.testing.assert_allclose(values[-1], best, rtol=1e-3)


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(1)])
    params = model.init(jax.random.PRNGKey(0), X)

    def outputs(params, batch):
        return model.apply(params, batch["x"])

    check_training(outputs, params)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.PRNGKey(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def outputs(params, batch):
        return jax.vmap(eqx.combine(params, static))(batch["x"])

    check_training(outputs, params)


def test_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(jnp.tanh(hk.Linear(4)(x)))))
    params = net.init(jax.random.PRNGKey(0), X)

    def outputs(params, batch):
        return net.apply(params, batch["x"])

    check_training(outputs, params)

"""Reductions over shards: what is counted, what is refused, and that nothing is left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optgrad
from optgrad.core import linalg, partial_sums, shards, trees


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices("cpu")[:2]), ("data",))


CURVATURES = {"b": 0.5, "s": 2.0, "w": 1.0}


def params_of(size=8):
    return {
        "b": jnp.linspace(-1.0, 1.0, size, dtype=jnp.float32),
        "s": jnp.float32(0.5),
        "w": jnp.linspace(2.0, -1.0, 3 * size, dtype=jnp.float32).reshape(3, size),
    }


SPECS = {"b": P("data"), "s": P(), "w": P(None, "data")}


def gradient_of(params):
    return {key: CURVATURES[key] * x for key, x in params.items()}


def value_of(params):
    return sum(0.5 * CURVATURES[key] * jnp.sum(x**2) for key, x in params.items())


def run(optimizer, steps=3, value_fn=value_of):
    """Some steps on a quadratic, as a function of the parameters, to be mapped or not."""

    def steps_from(params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(
                gradient_of(params), state, params, value=value_fn(params)
            )
            params = optax.apply_updates(params, updates)
        return params

    return steps_from


def divided_value(params):
    whole = jax.lax.psum(value_of({k: v for k, v in params.items() if k != "s"}), "data")
    return whole + value_of({"s": params["s"]})


def mapped(function, mesh, specs=SPECS, out_specs=None, **kwargs):
    out_specs = specs if out_specs is None else out_specs
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out_specs, **kwargs)
    )


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)


def psums(function, *args):
    """The number of sums over devices in a traced function, however deep."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("psum_invariant[") + text.count("psum[") + text.count("psum2[")


@pytest.mark.parametrize(
    "inner",
    [
        optgrad.polyak(),
        optgrad.ogr1d(0.1, warmup_steps=1, per_tensor=True),
        optgrad.adaptive_sgd_c(noise="tensor"),
        optax.chain(optax.scale(0.5), optgrad.l4_momentum(0.2), optax.trace(0.5)),
        optgrad.MultiSteps(optgrad.ogr1ds(0.1, warmup_steps=1), 2),
        optgrad.inject("polyak", scaling=0.5),
        optgrad.on_subtree(optgrad.polyak(), {"b": False, "s": True, "w": True}),
    ],
    ids=["polyak", "per_tensor", "noise_of_tensor", "chain", "multi_steps", "inject", "subtree"],
)
def test_equals_one_device(inner, mesh):
    """State made within; leaves that are whole on every device are counted once."""
    expected = jax.jit(run(inner))(params_of())
    wrapped = run(optgrad.across_devices(inner, "data"), value_fn=divided_value)
    assert_close(mapped(wrapped, mesh)(params_of()), expected)


def test_two_axes():
    """Leaves divided along one axis, the other, both and none."""
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("fsdp", "tensor"))
    specs = {"b": P("fsdp"), "s": P(), "w": P(None, ("fsdp", "tensor")), "x": P("tensor")}
    curvatures = {"b": 1.0, "s": 2.0, "w": 0.5, "x": 1.5}
    params = params_of() | {"x": jnp.linspace(0.0, 1.0, 4, dtype=jnp.float32)}

    def step(optimizer, params):
        gradient = {key: curvatures[key] * x for key, x in params.items()}
        return optimizer.update(gradient, optimizer.init(params), params, value=3.0)[0]

    inner = optgrad.polyak()
    wrapped = optgrad.across_devices(inner, ("fsdp", "tensor"))
    nested = optgrad.across_devices(optgrad.across_devices(inner, "tensor"), "fsdp")
    expected = step(inner, params)
    for optimizer in (wrapped, nested):
        actual = mapped(lambda p, o=optimizer: step(o, p), mesh, specs)(params)
        assert_close(actual, expected)


def test_one_sum_of_many_leaves(mesh):
    """All scalars of a pass over the parameters are one sum over the devices."""
    params = {f"leaf_{i}": jnp.ones((8, 2)) for i in range(10)}
    specs = jax.tree.map(lambda _: P("data"), params)
    optimizer = optgrad.across_devices(optgrad.ogr1ds(0.1, warmup_steps=1), "data")

    def step(params):
        return optimizer.update(params, optimizer.init(params), params)[0]

    assert psums(mapped(step, mesh, specs), params) == 1


def test_without_the_wrapper(mesh):
    """Plain data parallelism: whole parameters, the mean gradient and loss of all devices."""
    generator = np.random.default_rng(0)
    targets = jnp.asarray(generator.standard_normal((8, 5)), jnp.float32)
    start = jnp.linspace(-1.0, 1.0, 5, dtype=jnp.float32)

    def loss(x, targets):
        return 0.5 * jnp.mean(jnp.sum(jnp.arange(1.0, 6.0) * (x - targets) ** 2, axis=1))

    methods = (
        optgrad.ogr1ds(0.1, warmup_steps=1),
        optgrad.tonga(0.1, rank=2, period=2),
        optgrad.csawg(0.05, window=2),
        optgrad.sps(),
        optgrad.truncated_newton(),
    )
    for optimizer in methods:

        def steps(x, targets, mean=lambda x: x, optimizer=optimizer):
            def value_fn(x):
                return mean(loss(x, targets))

            state = optimizer.init(x)
            for _ in range(2):
                value, gradient = jax.value_and_grad(value_fn)(x)
                updates, state = optimizer.update(
                    gradient, state, x, value=value, grad=gradient, value_fn=value_fn
                )
                x = optax.apply_updates(x, updates)
            return x

        def on_device(x, targets, steps=steps):
            return steps(x, targets, lambda x: jax.lax.pmean(x, "data"))

        parallel = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        assert_close(jax.jit(parallel)(start, targets), jax.jit(steps)(start, targets))


def test_init_outside_and_inside(mesh):
    """The state of the whole parameters, or of the shards within: the same."""
    optimizer = optgrad.across_devices(optgrad.ogr_subspace(0.1, d=2), "data")
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params_of(), SPECS
    )
    outside = optimizer.init(params)
    specs = jax.tree.map(lambda x: getattr(x.sharding, "spec", P()), outside)
    inside = mapped(optimizer.init, mesh, out_specs=specs)(params)
    assert_close(inside, outside)


def test_random_basis_of_shards(mesh):
    """Each device draws its own entries, and the directions are orthonormal over all of them."""
    optimizer = optgrad.across_devices(optgrad.ogr_subspace(0.1, d=3, basis="push"), "data")

    def products(params):
        basis = optimizer.init(params).basis
        with shards.across(("data",)):
            gram = linalg.gram(basis.rows, basis.rows)
        return basis.rotation @ gram @ basis.rotation.T, basis.rows

    rows = {"b": P(None, "data"), "s": P(), "w": P(None, None, "data")}
    gram, rows = mapped(products, mesh, out_specs=(P(), rows))(params_of())
    np.testing.assert_allclose(gram, np.eye(3), atol=1e-5)
    assert len(np.unique(rows["b"])) == rows["b"].size


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, 3, (), ("data", 1)])
def test_refuses_what_is_no_axis(name):
    with pytest.raises(TypeError, match=r"axis_name = .* accepted: the name of a mesh axis"):
        optgrad.across_devices(optgrad.polyak(), name)


def test_refuses_an_unbound_axis(mesh):
    optimizer = optgrad.across_devices(optgrad.polyak(), "model")
    with pytest.raises(ValueError, match="axis_name = 'model': 'model' is not bound here"):
        run(optimizer)(params_of())
    with pytest.raises(ValueError, match="'model' is not bound"):
        mapped(run(optimizer, value_fn=divided_value), mesh)(params_of())
    both = optgrad.across_devices(optgrad.polyak(), ("data", "model"))
    with pytest.raises(ValueError, match="'model' is not bound"):
        mapped(run(both, value_fn=divided_value), mesh)(params_of())


def test_refuses_untracked_shards(mesh):
    step = run(optgrad.across_devices(optgrad.polyak(), "data"), value_fn=divided_value)
    with pytest.raises(ValueError, match="check_vma=True, its default"):
        mapped(step, mesh, check_vma=False)(params_of())
    with pytest.raises(ValueError, match="axis_name = 'data': it is not known"):
        jax.vmap(run(optgrad.across_devices(optgrad.polyak(), "data")), axis_name="data")(
            jax.tree.map(lambda x: jnp.stack([x, x]), params_of())
        )


def test_refuses_what_differs_between_devices(mesh):
    optimizer = optgrad.across_devices(optgrad.polyak(), "data")
    with pytest.raises(ValueError, match=r"value differs .* accepted: .*pmean\(value"):
        mapped(run(optimizer), mesh)(params_of())

    def with_a_gradient_of_its_own(params):
        gradient = gradient_of(params)
        gradient["s"] += jnp.sum(params["b"])
        return optimizer.update(gradient, optimizer.init(params), params, value=1.0)[0]

    with pytest.raises(ValueError, match=r"updates\['s'\] differs .* the mean gradient"):
        mapped(with_a_gradient_of_its_own, mesh)(params_of())


@pytest.mark.parametrize(
    "inner",
    [
        optax.clip_by_global_norm(1.0),
        optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.polyak_sgd(),
    ],
    ids=["clip", "lamb", "adafactor", "if_finite", "polyak_sgd"],
)
def test_refuses_reductions_of_others(inner, mesh):
    optimizer = optgrad.across_devices(inner, "data")
    with pytest.raises(ValueError, match="reduction over one device's shard"):
        mapped(run(optimizer, value_fn=divided_value), mesh)(params_of())


@pytest.mark.parametrize("name", ["newton", "bfgs", "ogr_full", "nonlinear_cg"])
def test_refuses_what_needs_whole_arrays(name, mesh):
    method = optgrad.get_method(name)
    optimizer = optgrad.across_devices(method.factory(**method.test_hyperparams), "data")

    def step(params):
        gradient = gradient_of(params)
        functions = {"value_fn": divided_value, "grad": gradient, "value": divided_value(params)}
        return optimizer.update(gradient, optimizer.init(params), params, **functions)[0]

    with pytest.raises(ValueError, match=r"axis_name = 'data': .* needs whole arrays"):
        mapped(step, mesh)(params_of())
    assert not shards.are_summed()  # whatever was raised


def test_nothing_is_left_behind(mesh):
    """Outside of the wrapper a sum is that of the shard, before and after."""
    optimizer = optgrad.across_devices(optgrad.polyak(), "data")

    def step(params):
        before = shards.axes_of(params["b"])
        optimizer.update(gradient_of(params), optimizer.init(params), params, value=1.0)
        assert before == shards.axes_of(params["b"]) == ()
        return jnp.sum(trees.inner_products((params, params))[0])[None]

    sums = mapped(step, mesh, out_specs=P("data"))(params_of() | {"s": jnp.float32(0.0)})
    whole = sum(jnp.sum(x**2) for k, x in params_of().items() if k != "s")
    np.testing.assert_allclose(jnp.sum(sums), whole, rtol=1e-6)
    with pytest.raises(RuntimeError), shards.across(("data",)), shards.across(("model",)):
        raise RuntimeError
    assert not shards.are_summed()


# --- partial sums ----------------------------------------------------------------------------


def loop(x):
    return jax.lax.fori_loop(0, 3, lambda _, c: (c[1], c[0] + jnp.sum(x)), (x[0] * 0, x[0] * 0))[0]


PARTIAL = {
    "sum": lambda x: x * jnp.sum(x),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + y, y), x[0] * 0, x * jnp.max(x))[0],
    "while": loop,
    "condition": lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: -x),
    "jit": lambda x: x * jax.jit(jnp.sum)(x),
    "custom": lambda x: x * jax.nn.logsumexp(x),
    "norm": lambda x: x / jnp.linalg.norm(x),
}
WHOLE = {
    "entries": lambda x: jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), jax.nn.relu(x)),
    "summed": lambda x: x * jax.lax.psum(jnp.sum(x), "data"),
    "rows": lambda x: jnp.tensordot(jnp.ones(2), jnp.stack([x, 2 * x]), axes=1),
    "loop": lambda x: jax.lax.fori_loop(
        0, 3, lambda _, c: c + jax.lax.psum(jnp.sum(x), "data"), 0.0
    ) + x,
    "unused": lambda x: (jnp.sum(x), x)[1],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(1, n) for n in PARTIAL] + [(0, n) for n in WHOLE])
def test_partial_sums(kind, name, mesh):
    function = (PARTIAL if kind else WHOLE)[name]
    found = []

    def traced(x):
        with shards.across(("data",)):
            found.extend(partial_sums.outputs(jax.make_jaxpr(function)(x)))
        return x

    mapped(traced, mesh, P("data"))(jnp.arange(1.0, 17.0))
    assert found == [bool(kind)]

"""The stochastic Polyak step size against its formula, smoothing, and optax' form of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad

from . import loss_runs as runs


def box(cap, c=0.5, lower_bound=0.0):
    """Transcription of SPS_max."""

    def step(f, g, w, loss):
        del w, loss
        return -min(max(f - lower_bound, 0.0) / (c * (g @ g)), cap) * g

    return step


def smooth_box(first, tau, share, c=0.5):
    """Transcription of the smoothed form, γ_{b,k} = τ^(b/N)·γ_{k−1}."""
    last = first

    def step(f, g, w, loss):
        nonlocal last
        del w, loss
        last = min(f / (c * (g @ g)), tau**share * last)
        return -last * g

    return step


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("cap", "c", "lower_bound"), [(1.0, 0.5, 0.0), (0.1, 1.0, 0.1), (1.5, 0.7, runs.OFFSET)]
)
def test_follows_the_formula(x64, noise, cap, c, lower_bound):
    optimizer = optgrad.sps(cap, c=c, lower_bound=lower_bound)
    runs.assert_follows(optimizer, box(cap, c, lower_bound), noise=noise)


@pytest.mark.parametrize(
    ("first", "tau", "share", "c"), [(1.0, 2.0, 0.01, 0.5), (0.01, 2.0, 0.1, 1.0)]
)
def test_smoothing_follows_the_formula(x64, first, tau, share, c):
    optimizer = optgrad.sps(first, c=c, tau=tau, batch_share=share)
    runs.assert_follows(optimizer, smooth_box(first, tau, share, c))


@pytest.mark.parametrize(("c", "cap"), [(0.5, 0.3), (0.2, 0.9), (1.3, 10.0)])
def test_optax_form(x64, c, cap):
    """`optax.scale_by_polyak` with the cap c·γ_b, divided by c afterwards."""
    theirs = optax.chain(
        optax.scale_by_polyak(max_learning_rate=c * cap, variant="sps+"), optax.scale(-1 / c)
    )
    single = runs.quadratic()
    actual = runs.run(optgrad.sps(cap, c=c), single, steps=60)[0]
    expected = runs.run(theirs, single, steps=60)[0]
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_polyak_with_other_names(x64):
    """polyak(scaling=1/c, max_learning_rate=c·γ_b)."""
    single = runs.quadratic()
    expected = runs.run(optgrad.polyak(0.1, scaling=2.0, max_learning_rate=0.4), single)[0]
    actual = runs.run(optgrad.sps(0.8, c=0.5, lower_bound=0.1), single)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_exact_step_of_one_half():
    """c = ½ reaches the minimum of an isotropic quadratic at once, c = 0.2 overshoots it."""
    w = jnp.array([1.0, -2.0])
    for c, remains in ((0.5, 0.0), (1.0, 0.5), (0.2, -1.5)):
        updates, _ = runs.one_step(optgrad.sps(10.0, c=c), 4 * w, 2 * w @ w)
        np.testing.assert_allclose(w + updates, remains * w, atol=1e-5)


def test_small_c_diverges_on_a_full_batch(x64):
    single = runs.quadratic(0.0)
    diverging, _ = runs.run(optgrad.sps(1e9, c=0.2, lower_bound=runs.OFFSET), single)
    converging, _ = runs.run(optgrad.sps(1e9, c=0.5, lower_bound=runs.OFFSET), single)
    start = np.linalg.norm(single.start)
    assert np.linalg.norm(diverging[-1]) > 1e3 * start
    assert np.linalg.norm(converging[-1]) < 1e-3 * start


def test_growth_in_an_epoch():
    """Where the loss always asks for more, the step size grows τ-fold in N/b steps."""
    optimizer = optgrad.sps(0.1, tau=3.0, batch_share=0.05)
    state = optimizer.init(jnp.zeros(1))
    for _ in range(20):
        _, state = runs.one_step(optimizer, [1.0], 1e6, state=state)
    np.testing.assert_allclose(state.step_size, 0.3, rtol=1e-5)


def test_smoothing_forgets_zeros():
    """A batch without a loss or a gradient stops one step only; the paper's recursion ends."""
    optimizer = optgrad.sps(0.1, tau=2.0, batch_share=0.1)
    state = optimizer.init(jnp.zeros(1))
    lengths = []
    for gradient, value in ((1.0, 5.0), (0.0, 5.0), (1.0, -1.0), (1.0, np.nan), (1.0, 5.0)):
        updates, state = runs.one_step(optimizer, [gradient], value, state=state)
        lengths.append(-float(updates[0]))
    growth = 2**0.1
    np.testing.assert_allclose(lengths, [0.1 * growth, 0, 0, 0, 0.1 * growth**2], rtol=1e-6)
    assert (state.count, state.skipped) == (4, 1)


def test_vmapped_smoothing():
    """Growth and share may be traced."""

    def length(tau, share):
        optimizer = optgrad.sps(0.5, tau=tau, batch_share=share)
        return runs.one_step(optimizer, [1.0], 1e6)[0][0]

    taus, shares = jnp.array([2.0, 4.0]), jnp.array([0.5, 0.25])
    actual = jax.jit(jax.vmap(length))(taus, shares)
    np.testing.assert_allclose(actual, -0.5 * np.array([2**0.5, 4**0.25]), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_learning_rate": 0.0}, "max_learning_rate = 0.0"),
        ({"c": 0.0}, "c = 0.0"),
        ({"lower_bound": np.nan}, "lower_bound = nan"),
        ({"tau": 2.0}, "tau = 2.0 and batch_share = None; accepted: both"),
        ({"batch_share": 0.1}, "tau = None and batch_share = 0.1; accepted: both"),
        ({"tau": 0.5, "batch_share": 0.1}, "tau = 0.5"),
        ({"tau": 2.0, "batch_share": 1.5}, "batch_share = 1.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.sps(**arguments)


@pytest.mark.parametrize(("cap", "least"), [(0.1, 4e-28), (10.0, 3e-29)])
def test_rosenbrock(x64, cap, least):
    """The specification's values after 20,000 steps."""
    assert runs.on_rosenbrock(optgrad.sps(cap))[0] == pytest.approx(least, rel=0.15)

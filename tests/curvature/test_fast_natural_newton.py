"""Natural Newton: the formula, the composition, and the noisy quadratic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optgrad
from optgrad.experiments.reproduce import survey_toys

SIZE = 20
HORIZONS = (10, 30, 100, 300)


def noisy_quadratic(seed=0):
    """H of condition 100, C of condition 10⁴ along other axes and trace 2, and θ₀ with f = 100."""
    rng = np.random.default_rng(seed)
    axes, others = (np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    H = (axes * np.logspace(0, -2, SIZE)) @ axes.T
    C = (others * np.logspace(0, -4, SIZE)) @ others.T
    start = rng.normal(size=SIZE)
    return H, 2.0 * C / np.trace(C), start * np.sqrt(100 / (0.5 * start @ H @ start))


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma2", [1e-3, 1.0, 1e3])
def test_two_forms_of_the_formula(sigma2):
    """H⁻¹[I + CH⁻²/σ²]⁻¹ = [I + H⁻¹CH⁻¹/σ²]⁻¹H⁻¹, and both are the posterior mean.

    That is of H⁻¹g for a gradient g ~ N(0, σ²H²) seen with noise of covariance C.
    """
    H, C, _ = noisy_quadratic()
    inverse, identity = np.linalg.inv(H), np.eye(SIZE)
    covariance = inverse @ C @ inverse
    form = np.linalg.solve(identity + covariance / sigma2, inverse)
    other = inverse @ np.linalg.inv(identity + C @ inverse @ inverse / sigma2)
    posterior = inverse @ (sigma2 * H @ H) @ np.linalg.inv(sigma2 * H @ H + C)
    scale = np.max(np.abs(form))
    np.testing.assert_allclose(other, form, atol=1e-8 * scale)
    np.testing.assert_allclose(posterior, form, atol=1e-8 * scale)


def gradients(steps=25):
    H, C, start = noisy_quadratic()
    rng = np.random.default_rng(1)
    return H @ start + rng.normal(size=(steps, SIZE)) @ np.linalg.cholesky(C).T


def run(transformation, stream, value_fn):
    """Updates at θ = 0, where the gradients come from the stream; and the last state."""
    params = jnp.zeros(SIZE)

    def body(state, g):
        found, state = transformation.update(g, state, params, value_fn=value_fn)
        return state, found

    scan = jax.jit(lambda s: jax.lax.scan(body, s, jnp.asarray(stream)))
    state, found = scan(transformation.init(params))
    return np.asarray(found), state


@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
def test_follows_the_formula(x64, covariance):
    """With the whole Hessian and as many directions as parameters."""
    H, _, _ = noisy_quadratic()
    stream = gradients()
    transformation = optgrad.scale_by_fast_natural_newton(
        "hessian", damping=0.0, covariance=covariance, rank=SIZE, gamma=0.8, shrinkage=0.7
    )
    found, state = run(transformation, stream, lambda x: 0.5 * x @ H @ x)
    C, weight = np.zeros((SIZE, SIZE)), 0.0
    for t, g in enumerate(stream):
        d = np.linalg.solve(H, g)
        C = 0.8 * C + np.outer(d, d)
        if covariance == "low_rank":
            used, lam = C, 0.7 * np.trace(C) / (SIZE + 10)
        else:  # an average
            weight = 0.8 * weight + 1.0
            used = np.diag(np.diag(C)) / weight
            lam = 0.7 * np.trace(used) / SIZE
        expected = np.linalg.solve(np.eye(SIZE) + used / lam, d)
        np.testing.assert_allclose(found[t], expected, rtol=1e-8, atol=1e-8 * np.max(np.abs(d)))
    assert (state.count, state.rejected) == (25, 0)
    assert state.cost == 25 * (1 + 2 * SIZE)


CHAINS = {
    "lanczos": lambda: optgrad.scale_by_lanczos_saddle_free(5, 0.2, use_prev=False, seed=3),
    "cg": lambda: optgrad.scale_by_truncated_newton(5, damping=0.2),
    "hessian": lambda: optgrad.scale_by_damped_newton(0.2),
}


@pytest.mark.parametrize("inner", list(CHAINS))
def test_is_a_chain(x64, inner):
    """Of the Newton direction alone and `scale_by_tonga`; and costs what the direction costs."""
    H, _, _ = noisy_quadratic()
    loss, stream = (lambda x: 0.5 * x @ H @ x), gradients()
    arguments = {"k": 5, "damping": 0.2, "rank": 3, "period": 4, "gamma": 0.9, "seed": 3}
    whole = optgrad.fast_natural_newton(0.5, inner, shrinkage=2.0, **arguments)
    chain = optax.chain(CHAINS[inner](), optgrad.scale_by_tonga(3, 4, 0.9, 2.0), optax.scale(-0.5))
    found, state = run(whole, stream, loss)
    expected, states = run(chain, stream, loss)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state[0].cost, states[0].cost)
    summary = optgrad.diagnostics(state)
    np.testing.assert_allclose(summary["gradient_equivalents"], states[0].cost)
    np.testing.assert_allclose(summary["covariance_damping"], states[1].damping)
    assert {"covariance_trace", "covariance_max", "rejected_steps"} <= summary.keys()


@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
def test_what_is_not_finite_is_no_sample(covariance):
    """A loss without numbers or such a gradient: no step, counted, the covariance as before."""
    loss = lambda x: 0.5 * jnp.sum(x**2)  # noqa: E731
    transformation = optgrad.scale_by_fast_natural_newton(k=3, covariance=covariance)
    params = jnp.arange(1.0, 6.0)
    _, before = transformation.update(params, transformation.init(params), params, value_fn=loss)
    bad = (
        (params, lambda x: jnp.nan * jnp.sum(x**2)),
        (params.at[1].set(jnp.nan), loss),
        (params.at[1].set(jnp.inf), loss),
    )
    for g, value_fn in bad:
        updates, after = transformation.update(g, before, params, value_fn=value_fn)
        assert not np.any(updates)
        assert (after.count, after.rejected) == (2, 1)
        jax.tree.map(np.testing.assert_array_equal, after.covariance, before.covariance)
    updates, _ = transformation.update(0.0 * params, before, params, value_fn=loss)
    assert not np.any(updates)


def test_saddles_repel_it():
    """With the Lanczos direction; the damped Hessian's sign of the curvature attracts."""
    toy = survey_toys.TOYS["S2"]
    options = {"damping": 0.01, "shrinkage": 100.0}
    found = survey_toys.solve(toy, optgrad.fast_natural_newton(0.5, k=2, **options), 200)
    assert found.steps is not None
    stuck = survey_toys.solve(toy, optgrad.fast_natural_newton(0.5, "hessian", **options), 200)
    assert stuck.steps is None
    assert abs(stuck.value) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": "newton"}, "inner = 'newton'"),
        ({"k": 0}, "= 0 is not accepted"),
        ({"damping": -1.0}, "damping = -1.0"),
        ({"covariance": "dense"}, "covariance = 'dense'"),
        ({"rank": 0}, "rank = 0"),
        ({"period": 0}, "period = 0"),
        ({"gamma": 1.0}, "gamma = 1.0"),
        ({"shrinkage": 0.0}, "shrinkage = 0.0"),
        ({"hvp": "none"}, "hvp = 'none'"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optgrad.fast_natural_newton(**{"learning_rate": 1.0, **arguments})


# --- the noisy quadratic -------------------------------------------------------------------------


def expected_losses(P, rate, H, C, start):
    """E f of θ ← θ − α·P·g at the four horizons: exact, since the recursion is linear."""
    M, noise = np.eye(SIZE) - rate * P @ H, rate**2 * P @ C @ P.T
    second, found = np.outer(start, start), []
    for t in range(1, HORIZONS[-1] + 1):
        second = M @ second @ M.T + noise
        if t in HORIZONS:
            found.append(0.5 * np.trace(H @ second))
    return found


@functools.cache
def tuned_losses():
    """Of each preconditioner, with rate and σ² of the least geometric mean over the horizons."""
    H, C, start = noisy_quadratic()
    identity, inverse = np.eye(SIZE), np.linalg.inv(H)
    shrunk = lambda A, s: np.linalg.inv(identity + A / s)  # noqa: E731
    newton_covariance = inverse @ C @ inverse
    forms = {
        "sgd": lambda s: identity,
        "newton": lambda s: inverse,
        "natural": lambda s: shrunk(C, s),
        "slide": lambda s: shrunk(newton_covariance, s),  # as printed: without the last H⁻¹
        "derived": lambda s: shrunk(newton_covariance, s) @ inverse,
    }
    found = {}
    for name, form in forms.items():
        runs = []
        for sigma2 in (1.0,) if name in ("sgd", "newton") else np.logspace(-4, 3, 8):
            P = form(sigma2)
            top = np.max(np.abs(np.linalg.eigvals(P @ H)))
            runs += [
                expected_losses(P, a / top, H, C, start)
                for a in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5)
            ]
        runs = np.array(runs)
        found[name] = runs[np.argmin(np.mean(np.log(runs), axis=1))]
    return found


def test_order_of_the_methods():
    """The specification's order: the derived formula first, the printed one no better than SGD,
    Newton behind in the end."""
    found = tuned_losses()
    means = {name: np.exp(np.mean(np.log(x))) for name, x in found.items()}
    assert means["derived"] < 0.8 * min(x for name, x in means.items() if name != "derived")
    assert means["natural"] < means["sgd"]
    assert means["slide"] > 0.97 * means["sgd"]
    assert found["newton"][-1] == max(x[-1] for x in found.values())
    assert found["derived"][0] < 0.6 * found["newton"][0] < found["sgd"][0]


@pytest.mark.slow
def test_online_estimate(x64):
    """The library's covariance instead of the true one: a floor below that of Newton at 2/3 of its
    rate, and a slower beginning; far from what the true covariance gives."""
    H, C, start = map(jnp.asarray, noisy_quadratic())
    root = jnp.linalg.cholesky(C)
    loss = lambda x: 0.5 * x @ H @ x  # noqa: E731

    def curve(optimizer):
        def one(key):
            def body(carry, key):
                params, state = carry
                g = H @ params + root @ jax.random.normal(key, (SIZE,))
                updates, state = optimizer.update(g, state, params, value_fn=loss)
                params = params + updates
                return (params, state), loss(params)

            keys = jax.random.split(key, HORIZONS[-1])
            return jax.lax.scan(body, (start, optimizer.init(start)), keys)[1]

        keys = jax.random.split(jax.random.PRNGKey(1), 16)
        return np.asarray(jax.jit(jax.vmap(one))(keys).mean(0))[np.array(HORIZONS) - 1]

    newton = curve(optgrad.damped_newton(0.2, damping=1e-9))
    natural = curve(
        optgrad.fast_natural_newton(0.3, "hessian", damping=1e-9, gamma=0.9, shrinkage=10.0)
    )
    assert np.mean(natural[2:]) < 0.95 * np.mean(newton[2:])
    assert natural[0] > newton[0]
    assert np.min(natural) > tuned_losses()["derived"][-1]

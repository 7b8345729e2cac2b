"""Two Rosenbrock functions in one, in NumPy by hand and in JAX on a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

START = np.array([-1.2, 0.6, 1.0, -0.4])  # x₁, x₂, y₁, y₂
_ROOT2 = np.sqrt(2.0)


def residuals(z):
    """With F = ½Σr² = Σ 100(y − x²)² + (1 − x)²."""
    x, y = z[:2], z[2:]
    return _ROOT2 * np.concatenate([10 * (y - x**2), 1 - x])


def jacobian(z):
    x = z[:2]
    eye, zero = np.eye(2), np.zeros((2, 2))
    return _ROOT2 * np.block([[-20 * np.diag(x), 10 * eye], [-eye, zero]])


def value(z):
    return 0.5 * residuals(z) @ residuals(z)


def gradient(z):
    return jacobian(z).T @ residuals(z)


def gauss_newton(z):
    return jacobian(z).T @ jacobian(z)


def hessian(z):
    second = np.diag(np.concatenate([-20 * _ROOT2 * residuals(z)[:2], np.zeros(2)]))
    return gauss_newton(z) + second


# --- the same on a tree -------------------------------------------------------------------------


def tree(z, dtype=None):
    z = jnp.asarray(z, dtype)
    return {"x": z[:2], "y": (z[2], z[3:])}


def vector(params):
    """Of one tree, or of the trees of every step."""
    y1, y2 = params["y"]
    return np.concatenate([params["x"], np.asarray(y1)[..., None], y2], axis=-1)


def residual_fn(params):
    x, (y1, y2) = params["x"], params["y"]
    y = jnp.concatenate([y1[None], y2])
    return {"curved": _ROOT2 * 10 * (y - x**2), "flat": _ROOT2 * (1 - x)}


def half_squares(outputs):
    return 0.5 * sum(jnp.sum(r * r) for r in jax.tree.leaves(outputs))


def value_fn(params):
    return half_squares(residual_fn(params))


def extras(params):
    value, grad = jax.value_and_grad(value_fn)(params)
    return {
        "value": value,
        "grad": grad,
        "value_fn": value_fn,
        "residual_fn": residual_fn,
        "outputs_fn": residual_fn,
        "out_loss_fn": half_squares,
    }


def run(optimizer, steps, start=START, dtype=None):
    """Parameters before every step and after the last, values at them, and the states after."""

    def body(carry, _):
        params, state = carry
        given = extras(params)
        updates, state = optimizer.update(given["grad"], state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, value_fn(params), state)

    params = tree(start, dtype)

    @jax.jit
    def whole(params):
        carry = (params, optimizer.init(params))
        return value_fn(params), jax.lax.scan(body, carry, None, length=steps)[1]

    first, (path, values, states) = whole(params)
    path = np.concatenate([vector(params)[None], vector(path)])
    return path, np.concatenate([[first], values]), states

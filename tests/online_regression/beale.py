"""The lattice of the author's notebooks: 3-D Beale, 125 starts, 50 steps, gradient noise 0.1."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def beale_3d(x):
    def beale(a, b):
        return sum((c - a + a * b**k) ** 2 for k, c in enumerate((1.5, 2.25, 2.625), start=1))

    return beale(x[0], x[1]) + beale(x[2], x[1])


def geometric_means(optimizer, seeds=4, steps=50):
    """The geometric mean of the final values over the starts, for each noise seed."""

    def run(start, key):
        def step(carry, key):
            x, state = carry
            noise = 0.1 * jax.random.normal(key, x.shape, x.dtype)
            updates, state = optimizer.update(jax.grad(beale_3d)(x) + noise, state, x)
            return (optax.apply_updates(x, updates), state), None

        keys = jax.random.split(key, steps)
        return beale_3d(jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0])

    starts = jnp.array(list(itertools.product((-2.0, -1.0, 0.0, 1.0, 2.0), repeat=3)))
    keys = jax.random.split(jax.random.key(0), (seeds, len(starts)))
    final = jax.jit(jax.vmap(jax.vmap(run), in_axes=(None, 0)))(starts, keys)
    return np.exp(np.mean(np.log(np.asarray(final, np.float64)), axis=1))

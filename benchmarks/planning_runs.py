"""Step-size planning on the Rosenbrock function: 10,000 updates from 64 starts in one program.

    python benchmarks/planning_runs.py

Prints the seconds of the second, compiled run, beside SGD's in the same loop.
"""

import time

import jax
import jax.numpy as jnp
import optax

import optgrad
from optgrad.experiments.functions import rosenbrock

UPDATES, STARTS = 10_000, 64


def seconds(optimizer: optax.GradientTransformationExtraArgs) -> float:
    """Of one run of all starts, compiled before."""

    def run(start: jax.Array) -> jax.Array:
        def step(carry, _):
            w, state = carry
            value, gradient = jax.value_and_grad(rosenbrock)(w)
            updates, state = optimizer.update(gradient, state, w, value=value)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (start, optimizer.init(start)), None, length=UPDATES)[0][0]

    starts = jnp.array([-1.0, 0.0]) + 0.1 * jax.random.normal(jax.random.key(0), (STARTS, 2))
    program = jax.jit(jax.vmap(run))
    jax.block_until_ready(program(starts))
    begin = time.perf_counter()
    jax.block_until_ready(program(starts))
    return time.perf_counter() - begin


def main() -> None:
    """Prints a line for each setting."""
    settings = {
        "sgd": optax.with_extra_args_support(optax.sgd(1e-3)),
        "csawg, paper": optgrad.csawg(1e-3, paper=True),
        "csawg": optgrad.csawg(1e-3),
        "csawg_repeated, paper": optgrad.csawg_repeated(1e-3, paper=True),
        "csawg_repeated": optgrad.csawg_repeated(1e-3),
    }
    for name, optimizer in settings.items():
        print(f"{name:24s} {seconds(optimizer):6.2f} s")


if __name__ == "__main__":
    main()

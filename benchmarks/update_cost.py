"""What one step of each method costs, as a ratio to Adam's, beside its memory traffic's ratio.

    python benchmarks/update_cost.py [--leaves 20] [--leaf-size 100000] [--repeats 30]
        [--rounding nearest|stochastic] [NAME …]

A donated, compiled ``update`` + ``apply_updates``. Methods and Adam take turns, so that whatever
else the machine does meets both; the ratio is that of the fastest repetitions. The traffic counts
every vector that a step must read (parameters, gradient, state) or write (parameters, state).
Methods that call functions of the parameters, or keep matrices over them, are left out. With
--rounding the methods (not Adam in the denominator) keep their state in bfloat16; the columns of
the state and the traffic stay those of float32.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optgrad
from optgrad.registry import Method


def make_run(method: Method, params: Any, rounding: str | None = None) -> Callable[[], None]:
    """A function that makes one step in place."""
    hyperparams = {
        name: value
        for name, value in method.test_hyperparams.items()
        if method.hyperparameters[name].default is method.hyperparameters[name].empty
    }
    if method.tunes is not None and method.tunes.hyperparameter == "learning_rate":
        hyperparams.setdefault("learning_rate", 1e-3)
    optimizer = optgrad.create(method.name, **hyperparams)
    if rounding:
        optimizer = optgrad.low_precision_state(optimizer, rounding=rounding)
    extras = {"gradient_variance": params} if "gradient_variance" in method.needs else {}
    extras |= {"value": jnp.ones(())} if "value" in method.needs else {}

    def step(params: Any, state: Any, gradient: Any, extras: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params, **extras)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    gradient = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
    extras = jax.tree.map(jnp.abs, extras)
    held = [jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, optimizer.init(params))]

    def run() -> None:
        held[:] = compiled(*held, gradient, extras)
        jax.block_until_ready(held)

    return run


def main() -> None:
    """Prints a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods; default: all that can be measured")
    parser.add_argument("--leaves", type=int, default=20)
    parser.add_argument("--leaf-size", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rounding", help="nearest or stochastic: the state in bfloat16")
    arguments = parser.parse_args()
    leaf = jnp.linspace(-1.0, 1.0, arguments.leaf_size)
    params = {f"leaf_{i:03d}": leaf + i for i in range(arguments.leaves)}
    adam = optgrad.get_method("adam")
    adam_vectors = 3 + 2 * adam.state_vectors(1)
    print(f"{'method':24}{'state':>7}{'time/Adam':>11}{'traffic/Adam':>14}")
    for method in optgrad.methods():
        if arguments.names and method.name not in arguments.names:
            continue
        if method.is_dense or "value_fn" in method.needs:
            continue
        runs = (make_run(adam, params), make_run(method, params, arguments.rounding))
        fastest = [float("inf"), float("inf")]
        for repeat in range(arguments.repeats + 25):  # the first ones compile and warm up
            for i, run in enumerate(runs):
                start = time.perf_counter()
                run()
                if repeat >= 25:
                    fastest[i] = min(fastest[i], time.perf_counter() - start)
        vectors = 3 + 2 * method.state_vectors(leaf.size * arguments.leaves)
        print(
            f"{method.name:24}{method.state_vectors(1):7g}{fastest[1] / fastest[0]:11.2f}"
            f"{vectors / adam_vectors:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

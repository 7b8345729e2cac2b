"""How to call an optimizer: donated or not, in a scan or in a loop, flattened or as a tree.

    python benchmarks/ways_to_step.py [METHOD ...] [--rounds 10]

prints, per method and parameter tree, the microseconds of one step (``update`` and
``apply_updates``) called in the usual way: compiled, parameters and state donated, one call a step.
Beside it, as ratios to that in the same rounds: the same without donation; twenty steps in one
`jax.lax.scan`; and with `optax.flatten` around the optimizer.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optgrad
from optgrad.experiments.bench import programs, timing, trees

STEPS = 20  # of a scan
TREES = ("hundred", "small400")


def loop(program: programs.StepProgram, optimizer: Any, *, donated: bool) -> timing.Run:
    """One call a step."""

    def step(params: Any, state: Any, grad: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1) if donated else ())
    held = jax.tree.map(jnp.copy, (program.params, optimizer.init(program.params)))

    def run() -> Any:
        nonlocal held
        held = compiled(*held, program.grad)
        return held

    return run


def scanned(program: programs.StepProgram) -> timing.Run:
    """Twenty steps a call."""

    def steps(carry: Any, grad: Any) -> Any:
        return jax.lax.scan(lambda c, _: (program.step(*c, grad, {}), None), carry, length=STEPS)[0]

    compiled = jax.jit(steps, donate_argnums=0)
    held = jax.tree.map(jnp.copy, (program.params, program.state))

    def run() -> Any:
        nonlocal held
        held = compiled(held, program.grad)
        return held

    return run


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=["adam", "m_svag", "adaptive_sgd", "ogr1d"])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0]}\n")
    header = ("method", "parameters", "µs a step", "not donated", "in a scan", "flattened")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for tree in map(trees.get_tree, TREES):
        for name in arguments.methods:
            method = optgrad.get_method(name)
            program = programs.StepProgram(method, trees.parameters(tree.shapes()))
            flat = optax.flatten(program.optimizer)
            spent = timing.interleaved(
                {
                    "usual": loop(program, program.optimizer, donated=True),
                    "not donated": loop(program, program.optimizer, donated=False),
                    "scan": scanned(program),
                    "flat": loop(program, flat, donated=True),
                },
                arguments.rounds,
            )
            spent["scan"] = [seconds / STEPS for seconds in spent["scan"]]
            usual = spent.pop("usual")
            cells = [f"{timing.ratios(s, usual).median:.2f}" for s in spent.values()]
            row = [name, tree.title, f"{1e6 * timing.spread(usual).median:,.0f}", *cells]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

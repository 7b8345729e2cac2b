"""Where the time of an evaluation interval goes: the model, and everything that is not the model.

    python benchmarks/interval_profile.py [--dataset mnist] [--method momentum] [--data-dir DATA]

prints, per network, the milliseconds of one training step within an interval, and of its parts
alone: forward and backward pass on a batch that is there, the method's update, drawing the indices
of the batches, gathering the batches from the data set; what is left is dispatch and whatever the
parts did in less time alone. Then the milliseconds of one evaluation of all splits, and how often
the training step was compiled. All are timed in turn, and the median of the rounds counts.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from throughput import CASES, Case

import optgrad
from optgrad.experiments import data, engine, problems
from optgrad.experiments.bench import sweep, timing


def in_a_loop(step: Callable[[Any, Any], Any], carry: Any, steps: int, *, scans: bool) -> Any:
    """A function that takes so many steps, as the harness does: one scan, or a host loop."""
    indices = jax.numpy.arange(steps)
    if scans:
        compiled = jax.jit(lambda c: jax.lax.scan(lambda c, i: (step(c, i), None), c, indices)[0])
        return lambda: compiled(carry)
    single = jax.jit(step)

    def run() -> Any:
        found = carry
        for index in range(steps):
            found = single(found, index)
        return found

    return run


def parts(
    problem: problems.Problem, trainer: engine.Trainer, steps: int
) -> Mapping[str, timing.Run]:
    """What is timed, by name."""
    scans = trainer.executable.scans
    init_key, batch_key = jax.random.split(jax.random.key(0))
    params = jax.jit(problem.init)(init_key)
    optimizer = optgrad.create(trainer.method.name, learning_rate=sweep.RATE)
    state = optimizer.init(params)
    draw = jax.jit(lambda data: problem.batches(data, batch_key, 0, steps))
    drawn = draw(problem.data)
    batch = jax.jit(problem.batch)(problem.data, jax.tree.map(lambda x: x[0], drawn))
    gradient = jax.tree.map(lambda p: 0.1 * p, params)

    def model(params: Any, index: Any) -> Any:
        del index
        grads = jax.grad(problem.loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 1e-9 * g, params, grads)  # so that all is needed

    def update(carry: Any, index: Any) -> Any:
        del index
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    def gather(batch: Any, index: Any) -> Any:
        del batch
        return problem.batch(problem.data, jax.tree.map(lambda x: x[index], drawn))

    evaluated = trainer.executable.init(
        {"learning_rate": jax.numpy.float32(sweep.RATE)}, jax.numpy.uint32(0)
    )
    return {
        "interval": sweep.interval(trainer, 1),
        "model": in_a_loop(model, params, steps, scans=scans),
        "update": in_a_loop(update, (params, state), steps, scans=scans),
        "drawing": lambda: draw(problem.data),
        "gathering": in_a_loop(gather, batch, steps, scans=scans),
        "evaluation": lambda: trainer.executable.evaluate(evaluated),
    }


def measured(case: Case, problem: problems.Problem, method: str, rounds: int) -> list[str]:
    """A row of the table."""
    record = optgrad.get_method(method)
    trainer = engine.Trainer(problem, record, eval_every=case.steps, vectorize="map")
    spent = timing.interleaved(parts(problem, trainer, case.steps), rounds)
    steps = {name: 1e3 * timing.spread(s).median / case.steps for name, s in spent.items()}
    evaluation = steps.pop("evaluation") * case.steps
    whole = steps.pop("interval")
    rest = whole - sum(steps.values())
    return [
        f"{case.model} on {case.dataset}, {case.batch_size}",
        f"{whole:.3g}",
        *(f"{value:.3g} ({value / whole:.1%})" for value in (*steps.values(), rest)),
        f"{evaluation:.3g}",
        str(trainer.executable.compilations),
    ]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="one of digits, mnist, cifar10 alone")
    parser.add_argument("--method", default="momentum")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of an interval")
    parser.add_argument("--data-dir", type=Path, default=None)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0]}, {arguments.method}; ms per training step, share of the interval\n")
    header = ("network, batch", "interval", "model", "update", "drawing", "gathering", "rest",
              "evaluation", "compilations")  # fmt: skip
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for case in CASES:
        if arguments.dataset not in {None, case.dataset}:
            continue
        chosen = dataclasses.replace(case, steps=arguments.steps or case.steps)
        problem = problems.image_classification(
            data.load(case.dataset, arguments.data_dir), case.model, batch_size=case.batch_size
        )
        row = measured(chosen, problem, arguments.method, arguments.rounds)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

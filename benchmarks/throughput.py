"""What the harness costs: beside a loop written by hand, and a sweep beside a lone run.

    python benchmarks/throughput.py [--quick] [--data-dir DATA]

prints, per network, the milliseconds of one training step: of a minimal loop over the same batches
(one scan over an interval; for convolutional nets on a CPU one jitted step at a time), of the
harness with one run, and of one run among several in the way that the harness chooses by itself;
with their ratios. All shuffle and draw their batches. The three are timed in turn, and the median
of the rounds counts, for ratios that of the rounds' own.
"""

import argparse
import dataclasses
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import optax

import optgrad
from optgrad.experiments import data, engine, measurement, problems
from optgrad.experiments.bench import sweep as sweep_cost

RATE = 0.01
RUNS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A network on images, and how many steps are timed together."""

    dataset: str
    model: str
    batch_size: int
    steps: int


CASES = (
    Case("digits", "mlp_small", 64, 500),
    Case("mnist", "mlp", 128, 100),
    Case("cifar10", "cifar10_cnn", 64, 10),
)


def by_hand(problem: problems.Problem, steps: int, *, scans: bool) -> Callable[[], None]:
    """A minimal loop: momentum, on the batches that the harness draws for seed 0."""
    optimizer = optax.sgd(RATE, momentum=0.9)
    init_key, batch_key = jax.random.split(jax.random.key(0))
    params = jax.jit(problem.init)(init_key)
    state = optimizer.init(params)
    draw = jax.jit(lambda data: problem.batches(data, batch_key, 0, steps))

    def step(carry, one, data):
        params, state = carry
        loss, gradient = jax.value_and_grad(problem.loss)(params, problem.batch(data, one))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def interval(carry, drawn, data):
        return jax.lax.scan(lambda carry, one: step(carry, one, data), carry, drawn)

    @jax.jit
    def single(carry, drawn, index, data):
        return step(carry, jax.tree.map(lambda x: x[index], drawn), data)

    def run() -> None:
        carry, drawn = (params, state), draw(problem.data)
        if scans:
            carry, _ = interval(carry, drawn, problem.data)
        else:
            for index in range(steps):
                carry, _ = single(carry, drawn, index, problem.data)
        jax.block_until_ready(carry)

    return run


def measured(case: Case, problem: problems.Problem, rounds: int) -> list[str]:
    """A row of the table."""

    def trainer(vectorize: str) -> engine.Trainer:
        return engine.Trainer(
            problem, optgrad.get_method("momentum"), eval_every=case.steps, vectorize=vectorize
        )

    lone = trainer("map")
    sweep = trainer("auto")
    sweep.choose({"learning_rate": RATE}, RUNS, 10**9)  # so long that it is measured
    loops = {
        "hand": (by_hand(problem, case.steps, scans=lone.executable.scans), 1),
        "harness": (sweep_cost.interval(lone, 1), 1),
        "sweep": (sweep_cost.interval(sweep, RUNS), RUNS),
    }
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):  # the first compiles
        for name, (run, runs) in loops.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            if round_:
                spent[name].append((time.perf_counter() - started) / case.steps / runs)
    hand, harness, one = (1e3 * statistics.median(spent[name]) for name in loops)

    def ratio(name: str, other: str) -> str:  # of the same round, for the machine may have others
        return f"{statistics.median(map(operator.truediv, spent[name], spent[other])):.2f}"

    return [
        f"{case.model} on {case.dataset}",
        str(case.batch_size),
        *(f"{value:.3g}" for value in (hand, harness)),
        ratio("harness", "hand"),
        f"{one:.3g}",
        ratio("sweep", "harness"),
        measurement.WAYS[sweep.vectorize],
    ]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="digits alone, three rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dataset", help="one of them alone")
    parser.add_argument("--data-dir", type=Path, default=None)
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    print(f"{jax.devices()[0]}, momentum; ms per step of one run, {RUNS} runs in a sweep\n")
    header = ("network", "batch", "by hand", "harness", "ratio", f"one of {RUNS}", "ratio", "way")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    chosen = [c for c in CASES if arguments.dataset in {None, c.dataset}]
    for case in chosen[:1] if arguments.quick else chosen:
        problem = problems.image_classification(
            data.load(case.dataset, arguments.data_dir), case.model, batch_size=case.batch_size
        )
        print(f"| {' | '.join(measured(case, problem, rounds))} |", flush=True)


if __name__ == "__main__":
    main()

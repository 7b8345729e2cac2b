"""How the engine should run a study: vmap or map over runs, scan or a host loop over steps.

    python benchmarks/vectorization.py [--runs 4] [--repeats 3]

prints, per network, the milliseconds that one step of one run takes in each way; the ways are timed
in turn, the median of the repeats counts. `optgrad.experiments.engine` chooses by these numbers.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import optgrad
from optgrad.experiments import data, engine, problems

# model, image side, channels, options, batch size, steps
CASES = (
    ("mlp", 8, 1, {"hidden": (16,)}, 64, 200),
    ("mlp_small", 8, 1, {}, 64, 200),
    ("mlp", 28, 1, {}, 128, 10),
    ("cifar10_cnn", 32, 3, {"channels": (16, 24, 32)}, 8, 2),
    ("all_cnn_c", 16, 3, {"width": 8}, 8, 2),
)
WAYS = (("map", True), ("vmap", True), ("map", False), ("vmap", False))  # vectorize, scans


def synthetic(side: int, channels: int) -> data.Dataset:
    """Random images: only their size matters here."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (512, side, side, channels)).astype(np.uint8)
    labels = random.randint(0, 10, 512).astype(np.int32)
    names = tuple("0123456789")
    return data.Dataset("synthetic", images, labels, images[:64], labels[:64], names)


def seconds(trainer: engine.Trainer, runs: engine.Runs) -> float:
    """Wall time of one interval of all runs, evaluation left out."""
    groups = [runs]
    if trainer.vectorize == "map":
        groups = [
            engine.Runs({k: v[i] for k, v in runs.hyperparams.items()}, seed)
            for i, seed in enumerate(runs.seeds)
        ]
    states = [(trainer.executable.init(g.hyperparams, g.seeds), g) for g in groups]
    jax.block_until_ready([state for state, _ in states])
    started = time.perf_counter()
    for state, group in states:
        jax.block_until_ready(trainer.executable.advance(state, group.hyperparams, group.seeds))
    return time.perf_counter() - started


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0]}, {arguments.runs} runs of m_svag; ms per step of one run\n")
    print("| network | batch | map, scan | vmap, scan | map, host loop | vmap, host loop |")
    print("|---|---|---|---|---|---|")
    count = arguments.runs
    runs = engine.Runs(
        {"learning_rate": np.full(count, 0.01, np.float32)}, np.arange(count, dtype=np.uint32)
    )
    for model, side, channels, options, batch_size, steps in CASES:
        problem = problems.image_classification(
            synthetic(side, channels), model, batch_size=batch_size, model_options=options
        )
        trainers = []
        for vectorize, scans in WAYS:
            trainer = engine.Trainer(
                problem, optgrad.get_method("m_svag"), eval_every=steps, vectorize=vectorize
            )
            trainer.executable.scans = scans
            seconds(trainer, runs)  # compiles
            trainers.append(trainer)
        times: list[list[float]] = [[] for _ in trainers]
        for _ in range(arguments.repeats):  # in turn, so that all see the same machine
            for spent, trainer in zip(times, trainers, strict=True):
                spent.append(seconds(trainer, runs))
        cells = [f"{1e3 * statistics.median(t) / steps / count:.3g}" for t in times]
        name = f"{model} {options or ''} {side}x{side}x{channels}"
        print(f"| {name} | {batch_size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

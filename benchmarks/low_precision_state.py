"""What an optimizer's state in bfloat16 costs in quality and saves in memory, on real MNIST.

    python benchmarks/low_precision_state.py --data-dir DATA [--steps 1000] [--seeds 3] [NAME …]

Trains the network 784-100-10 with each setting of `SETTINGS`: with the state as it is (float32),
and through `optgrad.low_precision_state` with both roundings. Prints a Markdown table: bytes of
state per parameter, mean ± standard deviation over the seeds of the training loss (of the last
interval) and the test accuracy, and the mean ± standard error of the differences to float32 of the
same seed.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

import optgrad
from optgrad.experiments import data, engine, problems

# The label of the decays, the method, its arguments, and whether even the position is in 16 bits.
SETTINGS: tuple[tuple[str, str, Mapping[str, Any], bool], ...] = (
    ("b2 = 0.9", "adam", {"learning_rate": 1e-3, "b2": 0.9}, False),
    ("b2 = 0.999", "adam", {"learning_rate": 1e-3}, False),
    ("β = 0.9", "adam_star", {"learning_rate": 1e-3}, False),
    ("β = 0.999", "adam_star", {"learning_rate": 1e-3, "beta": 0.999}, False),
    ("β = 0.9", "m_svag", {"learning_rate": 0.3}, False),
    ("β = 0.999", "m_svag", {"learning_rate": 0.3, "beta": 0.999}, False),
    ("β' = 0.99", "adaptive_sgd", {}, False),
    ("β' = 0.999", "adaptive_sgd", {"beta_variance": 0.999}, False),
    ("β' = 0.999, trusted", "adaptive_sgd", {"beta_variance": 0.999, "position": "trusted"}, True),
    ("β = 0.9", "adaptive_sgd_c", {}, False),
    ("β = 0.999", "adaptive_sgd_c", {"beta": 0.999}, False),
    ("β = 0.999", "ogr_diagonal", {"beta": 0.999}, False),
)
ROUNDINGS = (None, "nearest", "stochastic")


def narrowed(method: optgrad.Method, rounding: str | None, everything: bool) -> optgrad.Method:
    """The record with its state in bfloat16; as it is without a rounding."""
    if rounding is None:
        return method

    @functools.wraps(method.factory)  # its arguments are looked up by name
    def factory(**hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        keep = () if everything else None
        inner = method.factory(**hyperparams)
        return optgrad.low_precision_state(inner, rounding=rounding, keep=keep)

    return dataclasses.replace(method, factory=factory)


def state_bytes(method: optgrad.Method, hyperparams: Mapping[str, Any]) -> float:
    """Bytes of state per parameter."""
    size = 100_000
    params = jax.ShapeDtypeStruct((size,), np.float32)
    state = jax.eval_shape(method.factory(**hyperparams).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / size


def trained(
    problem: problems.Problem,
    method: optgrad.Method,
    hyperparams: Mapping[str, Any],
    steps: int,
    seeds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Training loss and test accuracy [%] of each seed at the end; NaN where a run diverged."""
    trainer = engine.Trainer(problem, method, hyperparams, eval_every=steps // 4)
    history = trainer.train(engine.Runs({}, np.arange(seeds)), steps)
    return history.metrics["train_loss"][:, -1], 100 * history.metrics["test_accuracy"][:, -1]


def mean_and_spread(values: np.ndarray, digits: int, *, of_mean: bool = False) -> str:
    """``mean ± standard deviation``, or the standard error of the mean."""
    if not np.isfinite(values).all():
        return f"{np.sum(~np.isfinite(values))} of {len(values)} diverged"
    spread = np.std(values, ddof=1) / (np.sqrt(len(values)) if of_mean else 1)
    sign = "+" if of_mean else ""
    return f"{np.mean(values):{sign}.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods; default: all in SETTINGS")
    parser.add_argument("--data-dir", help="folder with MNIST's files")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    dataset = data.load("mnist", arguments.data_dir)
    problem = problems.image_classification(
        dataset, "mlp", batch_size=64, model_options={"hidden": (100,)}
    )
    started = time.perf_counter()
    print(
        "| method | decays | state | bytes | training loss | test accuracy [%] | Δ loss | Δ acc. |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for decays, name, hyperparams, everything in SETTINGS:
        if arguments.names and name not in arguments.names:
            continue
        reference = None
        for rounding in ROUNDINGS:
            method = narrowed(optgrad.get_method(name), rounding, everything)
            loss, accuracy = trained(problem, method, hyperparams, arguments.steps, arguments.seeds)
            differences = ["–", "–"]
            if reference is not None:
                pairs = zip((loss, accuracy), reference, (4, 2), strict=True)
                differences = [mean_and_spread(x - y, n, of_mean=True) for x, y, n in pairs]
            reference = reference or (loss, accuracy)
            cells = (
                name,
                decays,
                rounding or "float32",
                f"{state_bytes(method, hyperparams):.0f}",
                mean_and_spread(loss, 4),
                mean_and_spread(accuracy, 2),
                *differences,
            )
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()

"""How long a training step takes, for budgets in seconds and curves over them."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optgrad.experiments import checkpoint
from optgrad.experiments.engine import Trainer

_INTERVALS = 5  # that are timed, after one that compiles


def seconds_per_step(
    trainer: Trainer, hyperparams: Mapping[str, Any], waves: checkpoint.Waves
) -> float:
    """Seconds of a training step, measured once in a study: kept in its journal, and read there.

    Args:
      trainer: of the optimizer.
      hyperparams: traced ones, at which it is measured.
      waves: where the measurement is kept, or comes from; it counts as a wave of no steps.
    """
    wave = waves.next({k: np.array(v) for k, v in hyperparams.items()}, np.array(0), 0)
    found = wave.finished()
    if found is None:
        found = [[{"seconds_per_step": _measure(trainer, hyperparams)}]]
        wave.finish(found)
    return found[0][0]["seconds_per_step"]


def _measure(trainer: Trainer, hyperparams: Mapping[str, Any]) -> float:
    """The median over some intervals of a lone run, after compiling and without evaluation."""
    program, data = trainer.program, trainer.problem.data
    values = {name: jnp.asarray(value, jnp.float32) for name, value in hyperparams.items()}
    seed = jnp.asarray(0, jnp.uint32)
    # As the trainer compiles them where its runs go one after the other: on disk for it then.
    draw, interval = jax.jit(program.draw), jax.jit(program.interval, donate_argnums=0)
    step = jax.jit(program.step, donate_argnums=0)
    state = jax.jit(program.init)(values, seed)
    seconds = []
    for _ in range(1 + _INTERVALS):
        began = time.perf_counter()
        drawn = draw(state.step, seed, data)
        if trainer.scans:
            state, _ = interval(state, values, drawn, data)
        else:
            for index in range(trainer.eval_every):
                state, _ = step(state, values, drawn, index, data)
        jax.device_get(state.step)  # waits for it
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:])) / trainer.eval_every

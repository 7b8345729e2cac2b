"""Random studies that are killed at random moments: nothing may be lost, nothing may change."""

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from optgrad import registry

METRICS = "metrics.csv"
MOST_KILLS = 5  # of one study
_ARRAYS = {"params", "value", "gradient_variance", "per_example_grads"}
# What was compiled for one run would make the next one too fast to be killed.
_UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
_REFUSED = 2  # the exit status of a study that never began
_DEVICES = "--xla_force_host_platform_device_count=4"

OnStudy = Callable[[str], None]


class LostError(RuntimeError):
    """A study came out differently after it had been killed, or left something behind."""


class RefusedError(RuntimeError):
    """What was drawn does not go together: a variance within batches of one example, say."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """What a soak went through."""

    studies: int
    kills: int
    seconds: float


def methods() -> list[str]:
    """The methods that the studies are drawn from: no functions, and quick to compile."""
    return [
        method.name
        for method in registry.methods()
        if method.needs <= _ARRAYS
        and not method.is_dense
        and method.family != "curvature"
        and "subspace" not in method.name
    ]


def random_study(draws: random.Random) -> list[str]:
    """Arguments of a small ``optgrad compare``.

    Examples:
      >>> random_study(random.Random(0))[:2]
      ['compare', '--optimizers']
    """
    chosen = draws.sample(methods(), draws.choice([1, 1, 2]))
    steps = draws.choice([40, 80, 120, 240])
    fields: dict[str, object] = {
        "eval_every": steps // draws.choice([4, 10]),  # even: updates of two batches
        "seeds": draws.randint(1, 3),
        "tuning.protocol": draws.choice(["random", "halton"]),
        "tuning.samples": draws.randint(1, 3),
        "vectorize": draws.choice(["auto", "vmap", "map"]),
        "guard": draws.choice([0, 3]),
        "ema": draws.choice([0.0, 0.9]),
        "accumulate": draws.choice([1, 1, 2]),
        "checkpoint_seconds": 0,
    }
    problem = draws.choice(["digits", "digits", "noisy_quadratic", "rosenbrock"])
    if problem == "digits":
        fields["model"] = "mlp_small"
        fields["batch_size"] = draws.choice([16, 32, 64])
        fields["precision"] = draws.choice(["float32", "bfloat16"])
    else:
        fields["problem"] = problem
    if draws.random() < 0.3:
        fields["mesh"] = "runs=2,data=2" if problem == "digits" else "runs=4"
    records = [registry.get_method(name) for name in chosen]
    tuned = [one.tunes.hyperparameter if one.tunes else "" for one in records]
    decays_itself = any("weight_decay" in one.hyperparameters for one in records)
    if set(tuned) == {"learning_rate"}:
        fields["schedule.kind"] = draws.choice(["constant", "cosine"])
        fields["weight_decay"] = (
            0.0 if "problem" in fields or decays_itself else draws.choice([0.0, 1e-3])
        )
    arguments = ["compare", "--optimizers", ",".join(chosen), "--steps", str(steps)]
    for name, value in fields.items():
        arguments += ["--set", f"{name}={value}"]
    return arguments


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for `soak`, which stays only if something was lost."""
    folder = Path(tempfile.mkdtemp(prefix="optgrad-soak-"))
    try:
        yield folder
    except LostError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rmdir()


def soak(minutes: float, seed: int, folder: Path, on_study: OnStudy = lambda line: None) -> Tally:
    """Runs random studies until the time is over, each undisturbed and killed.

    Each kill is a SIGKILL at a random moment; then the study is resumed.

    Args:
      minutes: no study begins after them.
      seed: of what is drawn.
      folder: empty; the last study stays there if something was lost.
      on_study: told of every study that came through.

    Raises:
      LostError: if metrics differ in a bit, or a process leaves more than its results.
    """
    draws, began = random.Random(seed), time.monotonic()
    studies = kills = 0
    while not studies or time.monotonic() - began < 60 * minutes:
        study = random_study(draws)
        try:
            found = _killed(study, folder, draws)
        except RefusedError as error:
            on_study(f"refused: {error}")
            continue
        studies, kills = studies + 1, kills + found
        on_study(f"{studies}: {found} kills: optgrad {' '.join(study)}")
        for path in folder.iterdir():
            shutil.rmtree(path)
    return Tally(studies, kills, time.monotonic() - began)


def _killed(study: Sequence[str], folder: Path, draws: random.Random) -> int:
    """Runs a study undisturbed and killed, compares the two, and gives the number of kills."""
    began = time.monotonic()
    _run([*study, "--output", "undisturbed"], folder)
    length = time.monotonic() - began
    expected = (folder / "undisturbed" / METRICS).read_bytes()
    kills, most = 0, draws.randint(1, MOST_KILLS)
    unfinished, results = folder / "killed.partial" / "study.json", folder / "killed"
    while not results.exists() or unfinished.exists():
        # One that was killed before it began cannot be resumed.
        begin = [*study, "--output", "killed"]
        moment = draws.uniform(0.1, 0.9) * length if kills < most else None
        kills += not _run(["resume", "killed"] if unfinished.exists() else begin, folder, moment)
    if (results / METRICS).read_bytes() != expected:
        raise LostError(f"after {kills} kills the metrics of {' '.join(study)} differ: {folder}")
    left = sorted(path.name for path in folder.iterdir())
    if left != ["killed", "undisturbed"]:
        raise LostError(f"after {kills} kills {' '.join(study)} left {left} in {folder}")
    return kills


def _run(arguments: Sequence[str], folder: Path, seconds: float | None = None) -> bool:
    """Whether the command came to its end before it was killed."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
    process = subprocess.Popen(
        [sys.executable, "-m", "optgrad", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **_UNCACHED},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL: nothing of it can react
        process.communicate()
        return False
    except BaseException:  # a Ctrl-C leaves no process behind
        process.kill()
        process.wait()  # before its folder is deleted
        raise
    if process.returncode == _REFUSED and not any(folder.iterdir()):
        raise RefusedError(f"optgrad {' '.join(arguments)}: {output}")
    if process.returncode:
        raise LostError(f"optgrad {' '.join(arguments)} in {folder} failed: {output}")
    return True

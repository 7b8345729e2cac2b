"""Kills a study at random moments, resumes it each time, and compares it with one that was not.

    python benchmarks/random_kills.py --kills 20

Each kill is a SIGKILL at a moment that is uniform over what the whole study takes. Ends with an
error unless every finished study has the metrics, bit for bit, of the one that ran undisturbed, and
leaves nothing else behind.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STUDY = [
    "compare", "--optimizers", "adam,m_svag", "--steps", "400", "--eval-every", "20",
    "--seeds", "2", "--rates", "0.03,0.01", "--set", "checkpoint_seconds=0",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    """``optgrad`` with these arguments."""
    return [sys.executable, "-m", "optgrad", *arguments]


def run(arguments: list[str], folder: Path, seconds: float | None = None) -> bool:
    """Whether the command came to its end before it was killed."""
    process = subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL: nothing of it can react
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"{arguments} failed: {output}")
    return True


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        run(command(*STUDY, "--output", "undisturbed"), folder)
        length = time.perf_counter() - began
        expected = (folder / "undisturbed" / "metrics.csv").read_bytes()
        kills = studies = 0
        begin = [*STUDY, "--output", "killed"]
        unfinished = folder / "killed.partial" / "study.json"
        while kills < options.kills or unfinished.exists():
            # One that was killed before it began cannot be resumed.
            arguments = ["resume", "killed"] if unfinished.exists() else begin
            moment = moments.uniform(0.0, length) if kills < options.kills else None
            if not run(command(*arguments), folder, moment):
                kills += 1
                if unfinished.exists() or not (folder / "killed").exists():
                    continue  # otherwise it was killed after its work was done
            if (folder / "killed" / "metrics.csv").read_bytes() != expected:
                raise SystemExit(f"after {kills} kills the metrics differ")
            studies += 1
            left = sorted(x.name for x in folder.iterdir())
            if left != ["killed", "undisturbed"]:
                raise SystemExit(f"left behind: {left}")
            for path in (folder / "killed").iterdir():
                path.unlink()
            (folder / "killed").rmdir()
    print(f"{kills} kills in {studies} studies of {length:.0f} s: all metrics bit-identical")


if __name__ == "__main__":
    main()

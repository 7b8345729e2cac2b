"""Two real processes on loopback: the numbers of one, whoever of them is killed in between."""

import csv
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from optgrad.experiments import distributed

ARGUMENTS = [
    "compare", "--optimizers", "adam", "--steps", "20", "--eval-every", "1", "--seeds", "2",
    "--rates", "0.01,0.1", "--tuning", "grid", "--set", "model_options.hidden=[3]",
    "--set", "checkpoint_seconds=0",
]  # fmt: skip


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "120"}


def start(folder, *arguments, devices=2):
    return subprocess.Popen(
        [sys.executable, "-m", "optgrad", *map(str, arguments)],
        cwd=folder, env=environment(devices), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_two(folder, *arguments, others=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--timeout", 60)
    return [
        start(folder, *given, *common, "--process-id", i)
        for i, given in enumerate((arguments, others or arguments))
    ]


def finish(*processes):
    """(exit code, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def metrics(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {k: [row[k] for row in rows] for k in rows[0]}


def assert_same(found, expected):
    for name, values in expected.items():
        if name in {"optimizer", "stage"}:
            assert found[name] == values
        else:
            numbers = [np.array(x, float) for x in (found[name], values)]
            np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one_even_if_one_is_killed(tmp_path):
    """And the study goes on, from the state that the first process has kept."""
    one = start(tmp_path, *ARGUMENTS, "--vectorize", "vmap", "--output", "one", devices=1)
    two = start_two(tmp_path, *ARGUMENTS, "--mesh", "runs=2,data=2", "--output", "two")
    state = tmp_path / "two.partial" / "state"
    deadline = time.monotonic() + 100
    while not (state.is_dir() and any(x.name.isdecimal() for x in state.iterdir())):
        assert time.monotonic() < deadline
        assert two[0].poll() is None, two[0].communicate()
        time.sleep(0.05)
    two[1].kill()
    (code, _, stderr), _ = finish(*two)
    assert code not in {0, None}
    assert "optgrad resume two" in stderr
    assert "another process ended" in stderr
    assert not (tmp_path / "two").exists()

    (code, _, stderr), (other_code, printed, _) = finish(*start_two(tmp_path, "resume", "two"))
    assert (code, other_code) == (0, 0), stderr
    assert "optimizer" not in printed  # gloo prints that it is connected
    assert [code for code, *_ in finish(one)] == [0]
    assert_same(metrics(tmp_path / "two"), metrics(tmp_path / "one"))
    assert not (tmp_path / "two.partial").exists()
    assert "4 at a time" in (tmp_path / "two" / "report.md").read_text("utf-8")


@pytest.mark.slow
def test_different_commands_are_refused(tmp_path):
    two = start_two(
        tmp_path, *ARGUMENTS, "--output", "two", others=[*ARGUMENTS, "--batch-size", "32"]
    )
    (code, _, _), (other_code, _, stderr) = finish(*two)
    assert other_code == 2
    assert "batch_size = 32 in this process, and 64 in process 0; accepted: the same" in stderr
    assert code != 0


@pytest.mark.slow
def test_a_missing_process_is_no_hang(tmp_path):
    process = start(
        tmp_path, *ARGUMENTS, "--coordinator", "127.0.0.1:9", "--num-processes", 2,
        "--process-id", 1, "--timeout", 2,
    )  # fmt: skip
    ((code, _, stderr),) = finish(process)
    assert code not in {0, None}
    assert "process 1 waits for the others at 127.0.0.1:9, 2 s at most" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "coordinator = 'localhost'; accepted: HOST:PORT"),
        (("localhost:80", 2, 2), "process-id = 2 of num-processes = 2; accepted: 0 to 1"),
    ],
)
def test_impossible_places_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)


def test_agreement():
    distributed.check_agreement({"steps": 1, "output": "a"}, {"steps": 1, "output": "b"})
    with pytest.raises(ValueError, match="steps = 2 in this process, and 1 in process 0"):
        distributed.check_agreement({"steps": 2}, {"steps": 1})


@pytest.mark.parametrize("content", [None, {"a": [1.5, "ü"]}, list(range(1000))])
def test_a_broadcast_among_one(content):
    assert distributed.broadcast(content) == content

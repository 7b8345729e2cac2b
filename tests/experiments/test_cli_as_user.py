"""The command line in processes of its own: on a terminal, interrupted, and refusing."""

import os
import re
import signal
import struct
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TINY = [
    "compare", "--problem", "rosenbrock", "--steps", "100", "--seeds", "2", "--tuning", "grid",
    "--rates", "1000,0.001",
]  # fmt: skip
# What a shell starts in the background (these tests, perhaps) is deaf to Ctrl-C, and its children.
HEARS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from optgrad.__main__ import main
sys.exit(main())
"""
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}


def start(*arguments, cwd):
    """A user's command, whose output is piped."""
    return subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def finish(process):
    """Exit status, stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def frames_on_a_terminal(*arguments, cwd, columns=80):
    """Exit status, and all that a terminal of that width was sent, without colours."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in {"COLUMNS", "LINES"}}
    process = subprocess.Popen(
        [sys.executable, "-m", "optgrad", *arguments], cwd=cwd,
        env={**environment, "TERM": "xterm-256color"}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())


def test_the_progress_on_a_terminal_of_80_columns(tmp_path):
    """What runs, how far, how fast, how long still, the best so far and what diverged."""
    code, text = frames_on_a_terminal(
        *TINY, "--optimizers", "sgd,adam", "--output", "out", cwd=tmp_path
    )
    assert code == 0, text
    clock = r"\d:\d\d:\d\d"
    bar = rf"━ +(\d+)% {clock} elapsed, ({clock}|-:--:--) left, \d+ steps/s"
    shares = [int(found[0]) for found in re.findall(bar, text)]
    assert shares == sorted(shares)
    assert shares[-1] > 50
    assert re.search(r"sgd: tuning (1000|0\.001), seed [01], step \d+", text)
    assert re.search(r"optimizer +stage +rate +step +best test excess +diverged runs", text)
    assert re.search(r"sgd +tuning +0\.001 +\d+ +[\d.e+-]+ +2\b", text)  # both of 1000 diverged
    assert "Results, curves and report: out" in text
    assert "Traceback" not in text


def test_interrupted_resumed_and_reported(tmp_path):
    """Ctrl-C, as its last line says to go on, and a report of what came out."""
    command = [*TINY, "--optimizers", "adam,momentum", "--output", "out"]
    process = start(*command, "--set", "checkpoint_seconds=0", "--steps", 20_000, cwd=tmp_path)
    for line in process.stderr:
        if "momentum: tuning" in line:
            break
    process.send_signal(signal.SIGINT)
    _, _, err = finish(process)
    assert process.returncode != 0
    assert "go on with: optgrad resume out" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]

    code, out, err = finish(start("resume", "out", cwd=tmp_path))
    assert code == 0, err
    assert "Results, curves and report: out" in out
    code, out, err = finish(start("report", "out", "--output", "page", cwd=tmp_path))
    assert code == 0, err
    assert "Page, Markdown and pictures: page" in out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "page"}
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "config.toml", "report.html", "report.md", "figures"
    }  # fmt: skip
    assert "momentum" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_what_there_is_and_what_is_refused(tmp_path):
    """Every process starts at once; a refusal is one line, names the field and leaves nothing."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        for part in ("train", "t10k"):
            (broken / f"{part}-{kind}-ubyte").write_bytes(b"no image")
    listed = {("problems",): "rosenbrock", ("reproduce",): "dissecting-adam"}
    wrong = ("--set", "stepz=3", "--dataset", "mnits", "--optimizers", "adm")
    refused = {
        ("compare", *wrong): (
            "stepz = 3: no such field; did you mean 'steps'",
            "dataset = 'mnits'",
            "did you mean 'adam'",
        ),
        ("compare", "--model", "mpl"): ("model = 'mpl'",),
        ("compare", "--dataset", "mnist", "--data-dir", "broken"): ("train-images-idx3-ubyte",),
    }
    processes = {arguments: start(*arguments, cwd=tmp_path) for arguments in listed | refused}
    for arguments, process in processes.items():
        code, out, err = finish(process)
        if arguments in listed:
            assert (code, err) == (0, ""), arguments
            assert listed[arguments] in out
        else:
            assert (code, out) == (2, ""), arguments
            assert "optgrad: " in err, arguments  # orbax may log a line of its own before it
            for part in refused[arguments]:
                assert part in err
            assert "Traceback" not in err
    left = {path.name for path in tmp_path.iterdir()} - {"broken"}
    assert not [path for name in left for path in (tmp_path / name).iterdir()]  # empty "results"

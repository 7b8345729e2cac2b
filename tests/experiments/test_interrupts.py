"""Ctrl-C: one line and status 130, and a second one that does not wait; in processes of their own.

That a comparison goes on where it was interrupted is tested in test_cli_as_user.py.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from optgrad.experiments import interrupts

# Stands for XLA while it compiles: nothing of Python runs in this thread until it is done. The
# package is not imported, which would take longer than the test.
BUSY = """
import gc, hashlib, signal, sys, time, types
package = types.ModuleType("optgrad")
package.__path__ = [sys.argv[1]]
sys.modules["optgrad"] = package
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background is deaf to it
import typer
from optgrad.experiments import interrupts
def collecting(phase, info):
    gc.callbacks.clear()
    print("ready", flush=True)
    time.sleep(60)  # Python drops an exception from here
try:
    if sys.argv[2] == "unexplained":
        with interrupts.watched():
            print("ready", flush=True)
            time.sleep(60)
    with interrupts.watched(), interrupts.explained(lambda: "how to go on", at_once="at once"):
        if sys.argv[2] == "collecting":
            gc.callbacks.append(collecting)
            gc.collect()
            time.sleep(60)
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))
        print("done", flush=True)
except typer.Exit as ending:
    sys.exit(ending.exit_code)
"""
SECONDS_OF_WORK = 1_500_000  # iterations, one to three seconds
HOURS_OF_WORK = 2_000_000_000


@pytest.fixture
def busy():
    """Starts the process with so many iterations of work."""
    begun = []

    def start(iterations):
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", BUSY, Path(interrupts.__file__).parents[1], str(iterations)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        assert begun[-1].stdout.readline() == "ready\n"
        time.sleep(0.2)  # until it is in there
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_the_line_comes_when_what_runs_has_ended(busy):
    process = busy(SECONDS_OF_WORK)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == interrupts.STATUS == 130
    assert "done" not in out
    assert err.splitlines()[-1] == "how to go on"
    assert "Traceback" not in err


def test_a_second_one_ends_it_at_once(busy):
    """After a line that says so, if the user waited that long."""
    process = busy(HOURS_OF_WORK)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "at once\n")


def test_two_at_once(busy):
    process = busy(HOURS_OF_WORK)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)  # two that are pending together are one
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "at once\n")


def test_one_within_a_callback_of_the_garbage_collector_is_not_lost(busy):
    """Without the watching, Python says "Exception ignored in" and goes on; JAX has a callback."""
    process = busy("collecting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "how to go on\n")


def test_one_that_nobody_explains_is_named(busy):
    """Between the commands' own lines: while the command line is built, say."""
    process = busy("unexplained")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Interrupted\n")


def test_the_innermost_speaks_and_others_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(interrupts, "_has_advised", False)
    with (
        pytest.raises(typer.Exit) as ending,
        interrupts.explained(lambda: "outer"),
        interrupts.explained(lambda: "inner"),
    ):
        raise KeyboardInterrupt
    assert ending.value.exit_code == 130
    assert capsys.readouterr().err == "inner\n"


def test_nothing_is_changed_afterwards():
    """The handler and the descriptor of signals, in the process of the tests."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts.watched():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1

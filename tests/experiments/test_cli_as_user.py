"""The command line in processes of its own: on a terminal, interrupted, and refusing."""

import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

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


def start(*arguments, cwd, **environment):
    """A user's command, whose output is piped."""
    return subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *map(str, arguments)],
        cwd=cwd, env={**ENVIRONMENT, **environment},
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


def interrupt_when(process, text):
    """Ctrl-C as soon as a line of stderr has that text; what it printed until then."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            break
    process.send_signal(signal.SIGINT)
    return "".join(seen)


def test_interrupted_resumed_and_reported(tmp_path):
    """Ctrl-C, twice; each time the last line is the command that goes on; and a report of it."""
    command = [*TINY, "--optimizers", "adam,momentum", "--output", "my out"]
    process = start(*command, "--set", "checkpoint_seconds=0", "--steps", 20_000, cwd=tmp_path)
    interrupt_when(process, "momentum: tuning")
    _, _, err = finish(process)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["my out.partial"]

    printed = err.splitlines()[-1].partition("go on with: optgrad ")[2]
    assert printed == "resume 'my out'"
    process = start(*shlex.split(printed), cwd=tmp_path)
    interrupt_when(process, "momentum: ")
    _, _, err = finish(process)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"Interrupted; go on with: optgrad {printed}"

    code, out, err = finish(start(*shlex.split(printed), cwd=tmp_path))
    assert code == 0, err
    assert "Results, curves and report: my out" in out
    code, out, err = finish(start("report", "my out", "--output", "page", cwd=tmp_path))
    assert code == 0, err
    assert "Page, Markdown and pictures: page" in out
    assert {path.name for path in tmp_path.iterdir()} == {"my out", "page"}
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "config.toml", "report.html", "report.md", "figures"
    }  # fmt: skip
    assert "momentum" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "shown", "said"),
    [
        (["reproduce", "dissecting-adam", "fig2", "--output", "out"], "fig2", "no results"),
        (["bench", "step", "adam", "m_svag", "--tree", "one", "--output", "out"],
         "one leaf", "no results"),
        (["bench", "compile", "kfac", "m_svag", "--output", "out"], "100 leaves", "no results"),
        (["soak", "--minutes", "5"], "the first study", "0 studies came through"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_resumed_says_that_nothing_was_written(tmp_path, command, shown, said):
    """And leaves nothing; its progress was shown before, as lines in this pipe."""
    (tmp_path / "here").mkdir()
    process = start(*command, cwd=tmp_path / "here", TMPDIR=str(tmp_path))
    seen = interrupt_when(process, shown)
    code, _, err = finish(process)
    assert (code, "Traceback" in seen + err) == (130, False), seen + err
    assert err.splitlines()[-1].startswith("Interrupted; ")
    assert said in err.splitlines()[-1]
    assert not [*(tmp_path / "here").iterdir()]
    assert not [*tmp_path.glob("optgrad-soak-*")]


def test_a_comparison_that_has_not_computed_anything_leaves_nothing(tmp_path):
    """Ctrl-C while the very first program is compiled: there is nothing to resume."""
    slow = ["--problem", "rosenbrock", "--set", "problem_options.dimension=200"]
    process = start(
        "compare", *slow, "--optimizers", "newton", "--steps", 10, "--output", "out", cwd=tmp_path
    )
    while not (tmp_path / "out.partial" / "study.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.splitlines()[-1] == (
        "Interrupted before anything was computed; nothing was written"
    ), err
    assert [*tmp_path.iterdir()] == []


def test_completion_is_installed(tmp_path):
    """Into files of the user's, which bash then reads: a real bash completes."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    environment = {**ENVIRONMENT, "HOME": str(tmp_path),
                   "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # fmt: skip
    optgrad = Path(sys.executable).with_name("optgrad")
    run = subprocess.run(
        [optgrad, "--install-completion", "bash"], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert ".bash_completions" in (tmp_path / ".bashrc").read_text()
    (script,) = (tmp_path / ".bash_completions").iterdir()
    tab = f"""
        source {script}
        COMP_WORDS=({optgrad} compare --optimizers adam,m_sv); COMP_CWORD=3
        function=$(complete -p optgrad | sed 's/.*-F //; s/ .*//')
        $function {optgrad}
        echo "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(
        [bash, "-c", tab], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["adam,m_svag", "adam,m_svag_mb"], run.stderr


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

"""Ctrl-C: one line says what is left and how to go on, and a second Ctrl-C does not wait."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from optgrad.experiments import terminal

STATUS = 130  # what shells give for a command that Ctrl-C ended
_PATIENCE = 1.0  # seconds, after which it is said that something must end first
_SHOW_CURSOR = b"\x1b[?25h"

# Innermost last: what is said when a command ends, and when the process is ended at once.
_advice: list[tuple[Callable[[], str], str]] = []
_has_advised = False
_has_heard = False


@contextlib.contextmanager
def explained(advice: Callable[[], str], at_once: str = "Interrupted") -> Iterator[None]:
    """Ends a command at a Ctrl-C: one line on stderr, status 130, no traceback.

    Of several, one in another, the innermost speaks.

    Args:
      advice: gives the line: what is left, and how to go on.
      at_once: the line if a second Ctrl-C does not let the command end.
    """
    _advice.append((advice, at_once))
    try:
        yield
    except KeyboardInterrupt:
        _advise()
        raise typer.Exit(STATUS) from None
    finally:
        _advice.pop()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within, a second Ctrl-C ends the process at once, whatever it is doing.

    Python reacts to a signal between two of its instructions. While XLA compiles there is none for
    seconds, so a thread of its own listens, too. Nothing that was kept is lost: studies survive a
    SIGKILL at any moment.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # deaf to Ctrl-C, as in the background of a shell, or someone else's to handle
        return
    global _has_advised, _has_heard  # noqa: PLW0603  signals reach the process, not an object
    _has_advised = _has_heard = False
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    threading.Thread(target=_listen, args=(ours,), daemon=True).start()
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _on_signal)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        # What still goes on at exit, writing perhaps, is ended by another Ctrl-C without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL if _has_heard else signal.default_int_handler)
        pythons.close()  # which ends the thread


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _has_heard  # noqa: PLW0603
    if _has_heard:
        _quit()
    _has_heard = True
    raise KeyboardInterrupt


def _listen(ours: socket.socket) -> None:
    """Counts the signals, one byte each, until the other end is closed."""
    heard = 0
    with contextlib.suppress(OSError), ours:
        while number := ours.recv(1):
            if number[0] != signal.SIGINT:
                continue
            heard += 1
            if heard > 1:
                _quit()
            ours.settimeout(_PATIENCE)
            try:
                if not ours.recv(1, socket.MSG_PEEK):
                    return
            except TimeoutError:
                where = terminal.console if terminal.console.is_terminal else terminal.errors
                where.print(
                    "Stopping when what runs now has ended; Ctrl-C again stops at once",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip
            ours.settimeout(None)


def _advise() -> None:
    global _has_advised  # noqa: PLW0603
    if not _has_advised and _advice:
        _has_advised = True
        terminal.errors.print(_advice[-1][0](), markup=False, highlight=False, soft_wrap=True)


def _quit() -> None:
    """Ends the process; the locks of its streams may be held, so they are not used."""
    text = "" if _has_advised or not _advice else f"{_advice[-1][1]}\n"
    with contextlib.suppress(OSError):
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(1, _SHOW_CURSOR + b"\n")
        os.write(2, text.encode(errors="replace"))
    os._exit(STATUS)

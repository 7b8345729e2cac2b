"""Ctrl-C: one line says what is left and how to go on, and a second Ctrl-C does not wait."""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import typer

from optgrad.experiments import terminal

_PLAIN = "Interrupted"
STATUS = 130  # what shells give for a command that Ctrl-C ended
_PATIENCE = 1.0  # seconds, after which it is said that something must end first
_AGAIN = 0.05  # seconds
_SHOW_CURSOR = b"\x1b[?25h"

# Innermost last: what is said when a command ends, and when the process is ended at once.
_advice: list[tuple[Callable[[], str], str]] = []
_has_advised = False


@contextlib.contextmanager
def explained(advice: Callable[[], str], at_once: str = _PLAIN) -> Iterator[None]:
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
    """Within, no Ctrl-C is lost, and a second one ends the process at once, whatever it does.

    Python reacts to a signal between two of its instructions. While XLA compiles there is none for
    seconds, so a thread of its own listens, too. Where the next instruction is in a callback of the
    garbage collector, as JAX has one, Python drops the exception; then it is raised again. Nothing
    that was kept is lost at an end at once: studies survive a SIGKILL at any moment.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # deaf to Ctrl-C, as in the background of a shell, or someone else's to handle
        return
    global _has_advised  # noqa: PLW0603  signals reach the process, not an object
    _has_advised = False
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    listener = _Listener(ours)
    hook, sys.unraisablehook = sys.unraisablehook, listener.on_dropped
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, listener.on_signal)
    listener.start()
    try:
        yield
    finally:
        if listener.has_raised:
            _advise()
            _end()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pythons.close()  # which ends the thread


class _Listener(threading.Thread):
    """Counts the signals, one byte each, until the other end of its socket is closed."""

    def __init__(self, ours: socket.socket) -> None:
        super().__init__(daemon=True)
        self._ours = ours
        self.has_raised = False
        self._raises_again = False  # the next call of on_signal is not the user's
        self._own = 0  # bytes to come that are not

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Is called in the main thread, between two instructions of Python."""
        if self.has_raised and not self._raises_again:
            _quit()
        self.has_raised, self._raises_again = True, False
        raise KeyboardInterrupt

    def on_dropped(self, dropped: Any) -> None:
        """Is told of exceptions that Python drops."""
        if dropped.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(dropped)
            return
        # Not here: it would be dropped again.
        threading.Timer(_AGAIN, self._raise_again).start()

    def _raise_again(self) -> None:
        self._raises_again = True
        self._own += 1
        if hasattr(signal, "pthread_kill"):  # which ends what the main thread waits for
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()

    def run(self) -> None:
        """Says that something has to end first, and ends the process at a second Ctrl-C."""
        heard = 0
        with contextlib.suppress(OSError), self._ours as ours:
            while number := ours.recv(1):
                if number[0] != signal.SIGINT:
                    continue
                if self._own:
                    self._own -= 1
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
    if not _has_advised:
        _has_advised = True
        line = _advice[-1][0]() if _advice else _PLAIN
        terminal.errors.print(line, markup=False, highlight=False, soft_wrap=True)


def _end() -> None:
    """Ends the process: its threads may be computing, and crash if Python is taken from them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(STATUS)


def _quit() -> None:
    """Ends the process; the locks of its streams may be held, so they are not used."""
    text = "" if _has_advised else f"{_advice[-1][1] if _advice else _PLAIN}\n"
    with contextlib.suppress(OSError):
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(1, _SHOW_CURSOR + b"\n")
        os.write(2, text.encode(errors="replace"))
    os._exit(STATUS)

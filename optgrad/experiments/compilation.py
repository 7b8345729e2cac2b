"""Compilation: kept on disk between invocations, and timed."""

import os
import tempfile
import time
from pathlib import Path

import jax
import pooch

_CACHE_BYTES = 2 * 1024**3
_SHORTEST = 0.1  # seconds; what compiles faster is not kept
_WRITING = 60.0  # seconds, within which another process may still be about to write the rest

_spent = 0.0


def cache_on_disk(folder: Path | None = None) -> None:
    """Keeps compiled programs in a folder, 2 GiB of them at most, for the next process.

    JAX's own settings have precedence: ``JAX_COMPILATION_CACHE_DIR`` for another folder,
    ``JAX_ENABLE_COMPILATION_CACHE=false`` for none. A program that is read back gives the same
    numbers: it is the same machine code.

    Args:
      folder: default: that of the user's caches; one that cannot be written is not used.
    """
    folder = folder or Path(pooch.os_cache("optgrad")) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _remove_halves(folder)
    except OSError:
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))  # type: ignore[no-untyped-call]
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)  # type: ignore[no-untyped-call]
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)  # type: ignore[no-untyped-call]


def without_cache() -> None:
    """Compiles everything anew in this process; to be called before anything is compiled."""
    jax.config.update("jax_enable_compilation_cache", False)  # type: ignore[no-untyped-call]


def _remove_halves(folder: Path) -> None:
    """Removes programs of which a killed process wrote a part: jax would warn for ever after."""
    for program in folder.glob("*-cache"):
        time_of_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not time_of_use.exists() and time.time() - program.stat().st_mtime > _WRITING:
            program.unlink(missing_ok=True)


def seconds() -> float:
    """Spent in this process, since this module was imported, on compiling or reading compiled."""
    return _spent


def _add(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    global _spent  # noqa: PLW0603  jax.monitoring calls back into the process, not an object
    if event == "/jax/core/compile/backend_compile_duration":
        _spent += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)

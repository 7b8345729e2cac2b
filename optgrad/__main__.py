"""The command ``optgrad``; ``python -m optgrad`` is the same."""

import importlib
import logging
import sys


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    # Of a failed write, orbax' threads log tracebacks before the error comes that says it.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with importlib.import_module("optgrad.experiments.interrupts").watched():
            importlib.import_module("optgrad.experiments.cli").app(obj=_keep_compiled)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "optgrad":
            raise
        sys.exit(
            f"optgrad: the command line needs {package}, which is not installed; "
            'install it with: pip install "optgrad[experiments]"'
        )


def _keep_compiled() -> None:
    """Before a command runs; its help, and completion, are not to wait for JAX."""
    importlib.import_module("optgrad.experiments.compilation").cache_on_disk()


if __name__ == "__main__":
    main()

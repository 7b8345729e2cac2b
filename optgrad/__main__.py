"""The command ``optgrad``; ``python -m optgrad`` is the same."""

import importlib
import logging
import sys


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    try:
        cli = importlib.import_module("optgrad.experiments.cli")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "optgrad":
            raise
        sys.exit(
            f"optgrad: the command line needs {package}, which is not installed; "
            'install it with: pip install "optgrad[experiments]"'
        )
    # Of a failed write, orbax' threads log tracebacks before the error comes that says it.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    importlib.import_module("optgrad.experiments.compilation").cache_on_disk()
    cli.app()


if __name__ == "__main__":
    main()

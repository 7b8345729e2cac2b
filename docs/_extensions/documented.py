"""Every public name of optgrad is documented: what is not fails a build with ``-W``."""

import inspect
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import optgrad

_LOGGER = logging.getLogger(__name__)


def undocumented(module: Any = optgrad) -> Iterator[str]:
    """Names of a module's ``__all__``, and of its classes' public members, without a docstring."""
    for name in module.__all__:
        public = getattr(module, name)
        if not inspect.getdoc(public) or (inspect.isclass(public) and not public.__doc__):
            yield name
        if inspect.isclass(public):
            yield from (f"{name}.{member}" for member in _undocumented_members(public))


def _undocumented_members(public: type) -> Iterator[str]:
    for name, member in vars(public).items():
        if name.startswith("_"):
            continue
        if (inspect.isroutine(member) or isinstance(member, property)) and not member.__doc__:
            yield name


def _check(app: Sphinx, environment: Any) -> None:
    """Warns of names without a docstring, and of names that are on no page."""
    for name in undocumented():
        _LOGGER.warning("optgrad.%s has no docstring", name)
    listed = {entry[0] for entry in environment.get_domain("py").get_objects()}
    for name in optgrad.__all__:
        if not inspect.ismodule(getattr(optgrad, name)) and f"optgrad.{name}" not in listed:
            _LOGGER.warning("optgrad.%s is on no page", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the check to the end of reading."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

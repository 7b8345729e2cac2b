"""Names for the shell's completion.

They are read from the source with regular expressions, in milliseconds: to ask the registry means
to import JAX, and nobody waits seconds for a Tab. A test compares them with the real ones.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_EXPERIMENTS = _PACKAGE / "experiments"
_METHOD = re.compile(r'\bMethod\(\s*(?:name=)?"(\w+)"')
_BASELINES = "baselines"
_BASELINE_FILES = ("baselines.py", "parameter_free.py")

Complete = Callable[[str], list[str]]


def families() -> list[str]:
    """The packages that define methods, and the baselines."""
    return [_BASELINES, *dict.fromkeys(path.parent.name for path in _family_files())]


def methods() -> list[str]:
    """All registered methods, by name."""
    return sorted(name for path in _method_files() for name in _found(path, _METHOD))


def problems() -> list[str]:
    """What ``--problem`` knows beside files."""
    return _named("catalogue.py", "ProblemKind")


def models() -> list[str]:
    """What ``--model`` knows."""
    return _named("models.py", "Architecture")


def trees() -> list[str]:
    """What ``bench step --tree`` knows."""
    return _named("bench/trees.py", "Tree")


def datasets() -> list[str]:
    """What ``--dataset`` knows."""
    return ["digits", *_named("data.py", "_Source")]


def papers() -> list[str]:
    """What can be reproduced."""
    return list(_paper_modules())


def figures(paper: str) -> list[str]:
    """Figures and tables of a paper; none of a paper that is not known."""
    module = _paper_modules().get(paper)
    if module is None:
        return []
    keys = re.compile(r'^        "(\w+)": FigureMaker\(', re.MULTILINE)
    return ["all", *_found(_EXPERIMENTS / "reproduce" / f"{module}.py", keys)]


def beginning(names: Callable[[], list[str]]) -> Complete:
    """Completes one name.

    Examples:
      >>> beginning(datasets)("cifar")
      ['cifar10', 'cifar100']
    """
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def listed(names: Callable[[], list[str]]) -> Complete:
    """Completes the last of several names, separated by commas; none is offered twice.

    Examples:
      >>> listed(datasets)("mnist,cifar")
      ['mnist,cifar10', 'mnist,cifar100']
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        return [f"{before}{comma}{n}" for n in names() if n.startswith(last) and n not in taken]

    return complete


def one_of(*accepted: str) -> Complete:
    """Completes one of a few words."""
    return beginning(lambda: list(accepted))


def _family_files() -> Iterator[Path]:
    """The files of families that register a method."""
    for path in sorted(_PACKAGE.glob("*/*.py")):
        if path.parent != _EXPERIMENTS and _found(path, _METHOD):
            yield path


def _method_files() -> Iterator[Path]:
    yield from (_PACKAGE / name for name in _BASELINE_FILES)
    yield from _family_files()


def _paper_modules() -> dict[str, str]:
    """Paper -> module, as the package of the reproductions has them."""
    source = (_EXPERIMENTS / "reproduce" / "__init__.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "([\w-]+)": "(\w+)",$', source, re.MULTILINE))


def _named(file: str, kind: str) -> list[str]:
    """The first arguments of all calls of a class in a file of this package."""
    return _found(_EXPERIMENTS / file, re.compile(rf'\b{kind}\(\s*(?:name=)?"(\w+)"'))


def _found(path: Path, pattern: re.Pattern[str]) -> list[str]:
    return pattern.findall(path.read_text(encoding="utf-8"))

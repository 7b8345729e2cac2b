"""Every record is complete, and says what its factory does."""

import inspect
import re

import optgrad
from optgrad.registry import EXTRAS

from . import problem, upstream


def sections(docstring):
    """The headings of a docstring's sections, and the text under each."""
    parts = re.split(
        r"^(Args|Returns|Raises|Examples|References|Deviations[^:\n]*):", docstring, flags=re.M
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_record_is_complete(method):
    """Name, title, reference, equation and family are there; needs are of the vocabulary."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
    for text in (method.title, method.reference, method.equation, method.family):
        assert text == text.strip() != ""
    assert method.needs <= EXTRAS.keys()
    assert method in optgrad.methods(method.family)
    assert optgrad.get_method(method.name) is method
    assert method.state_vectors(10) >= 0
    assert method.cost > 0


def test_hyperparameters_are_named(method):
    """`tunes`, `static_args` and `test_hyperparams` are parameters of the factory, in range."""
    names = {*method.static_args, *method.test_hyperparams}
    assert names <= method.hyperparameters.keys()
    if method.tunes is not None:
        name, low, high = method.tunes
        assert name in method.hyperparameters
        assert name not in method.static_args
        assert 0 < low < high
        assert low <= problem.tuned(method)[1] <= high


def test_factory_has_a_docstring(method):
    """One line, at least, on the factory and on its direction."""
    for factory in (method.factory, method.scale_by):
        if factory is not None:
            assert inspect.getdoc(factory)


def test_statics_are_the_arguments_that_cannot_be_traced(method):
    """A default that is no real number (an option, a size, a type) is declared static."""
    for name, parameter in method.hyperparameters.items():
        if isinstance(parameter.default, bool | str | int):
            assert name in method.static_args, name


@problem.OWN
def test_factory_is_public(method):
    """``optgrad.<name>`` and ``optgrad.scale_by_<name>`` are the record's."""
    assert getattr(optgrad, method.name) is method.factory
    assert method.name in optgrad.__all__
    if method.scale_by is not None:
        assert getattr(optgrad, f"scale_by_{method.name}") is method.scale_by
        assert f"scale_by_{method.name}" in optgrad.__all__


@problem.OWN
def test_docstring_sections(method):
    """Every argument is described; returns, errors, a runnable example and the source are there."""
    found = sections(inspect.getdoc(method.factory))
    assert found.keys() >= {"Args", "Returns", "Raises", "Examples", "References"}
    assert all(text.strip() for text in found.values())
    described = re.findall(r"^  (\w+):", found["Args"], flags=re.MULTILINE)
    assert described == list(method.hyperparameters)
    assert ">>>" in found["Examples"]
    assert ".. math::" in inspect.getdoc(method.factory)


@problem.OWN
def test_own_families_have_no_expected_failures(method):
    """A failure of an own method is a bug."""
    assert method.name not in {name for name, _ in upstream.FAILURES}

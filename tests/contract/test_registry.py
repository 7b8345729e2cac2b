"""Names are looked up; wrong ones are refused by an error that suggests the nearest."""

import dataclasses

import pytest

import optgrad
from optgrad import registry


def required(method):
    """Names of the factory's arguments without a default."""
    return [k for k, p in method.hyperparameters.items() if p.default is p.empty]


def test_methods_are_in_families():
    families = list(dict.fromkeys(method.family for method in optgrad.methods()))
    by_family = [method for family in families for method in optgrad.methods(family)]
    assert sorted(m.name for m in by_family) == sorted(m.name for m in optgrad.methods())
    assert len({m.name for m in by_family}) == len(by_family)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"family = 'baseline'.*did you mean 'baselines'"):
        optgrad.methods("baseline")


@pytest.mark.parametrize("function", [optgrad.get_method, optgrad.create, optgrad.inject])
def test_unknown_method(function):
    with pytest.raises(KeyError, match="unknown method 'm_svga'; did you mean 'm_svag'") as error:
        function("m_svga")
    assert isinstance(error.value, ValueError)
    assert not str(error.value).startswith(('"', "'"))


@pytest.mark.parametrize("function", [optgrad.create, optgrad.inject])
def test_unknown_hyperparameter(method, function):
    """The message names the method, the argument and what is nearest."""
    name = next(iter(method.hyperparameters))
    wrong = name[:-1] + "_"
    with pytest.raises(TypeError, match=f"{method.name} .*'{wrong}'; did you mean .*'{name}'"):
        function(method.name, **method.test_hyperparams, **{wrong: 1.0})


@pytest.mark.parametrize("function", [optgrad.create, optgrad.inject])
@pytest.mark.methods_where(predicate=required)
def test_missing_hyperparameter(method, function):
    """The message names the method and what is missing."""
    names = required(method)
    given = {k: v for k, v in method.test_hyperparams.items() if k not in names}
    with pytest.raises(TypeError, match=f"{method.name} requires {', '.join(names)}"):
        function(method.name, **given)


def test_second_registration_is_refused(method):
    with pytest.raises(ValueError, match=f"'{method.name}' is registered already"):
        optgrad.register(method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needs": frozenset({"gradient_varianc"})}, "did you mean 'gradient_variance'"),
        ({"static_args": ("learning_rat",)}, "did you mean 'learning_rate'"),
        ({"test_hyperparams": {"learning_rat": 1.0}}, "did you mean 'learning_rate'"),
        ({"tunes": optgrad.Tunable("learning_rat", 0.1, 1.0)}, "did you mean 'learning_rate'"),
    ],
    ids=["needs", "static_args", "test_hyperparams", "tunes"],
)
def test_wrong_record_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(optgrad.get_method("m_svag"), **change)


def test_records_are_frozen():
    method = optgrad.get_method("m_svag")
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"
    assert registry.get_method("m_svag") is method

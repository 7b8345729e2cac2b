"""The reproduction of the survey slides: every figure in quick mode, and what must come out."""

import sys
import types

import numpy as np
import pytest

from optgrad.experiments import data as data_lib
from optgrad.experiments import reproduce
from optgrad.experiments.reproduce import (
    local_mnist,
    survey_mnist,
    survey_profile,
    survey_regression,
    survey_runs,
    survey_saddle_network,
    survey_saddles,
)
from optgrad.experiments.reproduce import report as report_lib

PAPER = reproduce.get_reproduction("survey-slides")
QUICK = reproduce.Settings(quick=True)
COLUMNS = {
    "saddles": ["method", "distance", "steps", "x", "y"],
    "network": ["hidden", "method", "epoch", "error", "loss", "index", "lowest"],
    "toys": ["method", "toy", "dtype", "steps", "value", "gradient_equivalents", "increases"],
    "profile": ["problem", "solver", "lowest", "cost_0.001", "cost_1e-07"],
    "regression": ["method", "seed", "gradient_equivalents", "loss"],
    "mnist": ["method", "tuned", "best", "seed", "gradient_equivalents", "train_loss",
              "test_accuracy"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def digits_for_mnist(monkeypatch):
    """No test depends on files, nor on a network."""
    digits = data_lib.load("digits")
    monkeypatch.setattr(local_mnist, "load", lambda settings: digits)


def ignore(fraction):
    assert 0 <= fraction <= 1


def test_every_figure_has_its_columns():
    assert set(COLUMNS) == set(PAPER.figures)


@pytest.fixture
def a_lean_sif2jax(monkeypatch):
    """Without one constrained problem that takes most of a minute to import, and is not used."""
    place = "sif2jax.cutest._constrained_minimisation.cleuven7"
    monkeypatch.setitem(sys.modules, place, types.SimpleNamespace(CLEUVEN7=object))


@pytest.mark.slow
@pytest.mark.usefixtures("a_lean_sif2jax")
@pytest.mark.parametrize("name", COLUMNS)
def test_figures(name):
    result = PAPER.figures[name].make(QUICK, ignore)
    assert list(result.rows[0]) == COLUMNS[name]
    assert all(list(row) == COLUMNS[name] for row in result.rows)
    assert result.findings
    assert result.figure.axes
    text = report_lib.markdown(PAPER, {name: result}, QUICK)
    assert all(f.measured in text for f in result.findings)


@pytest.mark.slow
def test_escape_laws():
    """Newton is attracted; saddle-free Newton needs a step for each doubling of the distance."""
    result = survey_saddles.escape(reproduce.Settings(), ignore)
    assert all(f.verdict == "holds" for f in result.findings)
    newton = [r for r in result.rows if r["method"] == "Newton"]
    assert all(r["steps"] is None and abs(r["x"]) + abs(r["y"]) < 1e-6 for r in newton)


@pytest.mark.parametrize("module", [survey_mnist, survey_saddle_network], ids=["mnist", "network"])
def test_without_the_data_a_section_says_so(monkeypatch, module):
    def load(settings):
        raise data_lib.DataNotFoundError("nowhere\nat all")

    monkeypatch.setattr(local_mnist, "load", load)
    make = getattr(module, "mnist", None) or module.saddles
    result = make(QUICK, ignore)
    assert "Skipped" in result.text
    assert result.findings[0].measured == "skipped: nowhere"


def test_without_the_packages_a_section_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sif2jax", None)
    result = survey_profile.profile(QUICK, ignore)
    assert "pip install sif2jax optimistix" in result.text
    assert result.findings[0].verdict == "not tried"


def test_costs_of_traces():
    """The best value so far counts, and what is over the budget does not."""
    trace = survey_profile.Trace(np.array([0.0, 1.0, 2.0, 1e9]), np.array([4.0, 3.0, 1.0, 0.0]))
    assert trace.cost_of(3.5) == 1
    assert trace.cost_of(1.0) == 2
    assert trace.cost_of(0.0) == np.inf
    assert survey_runs.first_cost(np.array([1.0, 2.0]), np.array([5.0, 4.0]), 4.5) == 2
    other = survey_profile.Trace(np.array([0.0, 5.0]), np.array([4.0, 0.5]))
    costs = survey_profile.solve_costs({"p": {"a": trace, "b": other}}, 0.2)
    np.testing.assert_array_equal([costs["a"][0], costs["b"][0]], [np.inf, 5.0])


def test_regression_data_has_the_noise_floor():
    x, y = survey_regression.data()
    truth = np.sin(3 * x[:, 0]) + 0.5 * x[:, 0]
    assert 0.5 * np.mean((y - truth) ** 2) == pytest.approx(survey_regression.FLOOR, rel=0.2)
    params = survey_regression.initial_params(0)
    assert sum(leaf.size for layer in params for leaf in layer.values()) == 321

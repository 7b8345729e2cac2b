"""The reproduction of Yao's paper: every figure in quick mode, and what the numbers must be."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad.experiments import data as data_lib
from optgrad.experiments import engine, reproduce
from optgrad.experiments.reproduce import (
    planning_convex,
    planning_mnist,
    planning_quadratics,
    planning_repeated,
    planning_rivals,
    planning_rosenbrock,
    planning_runs,
)
from optgrad.experiments.reproduce import report as report_lib

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

PAPER = reproduce.get_reproduction("step-size-planning")
QUICK = reproduce.Settings(quick=True)
COLUMNS = {
    "fig3": ["method", "iteration", "error"],
    "fig4": ["window", "iteration", "alpha_stiff", "alpha_slow"],
    "fig5": ["method", "evaluation", "error"],
    "fig6": ["method", "iteration", "w_1", "w_2"],
    "fig7": ["method", "iteration", "error"],
    "fig8": ["window", "iteration", "alpha_1", "alpha_2"],
    "fig9": ["method", "setting", "evaluation", "error"],
    "starts": [
        "method", "verify", "learning_rate", "starts", "solved", "diverged", "median_error",
        "rejected_per_run",
    ],
    "quadratics": [
        "method", "verify", "d", "gamma_l", "runs", "diverged", "excess", "rejected_per_run",
        "evaluations_to_1e-10",
    ],
    "noise": [
        "method", "verify", "batch", "learning_rate", "runs", "diverged", "excess",
        "rejected_per_run",
    ],
    "mnist": [
        "method", "verify", "learning_rate", "runs", "diverged", "test_loss", "test_accuracy",
        "train_loss",
    ],
}  # fmt: skip
SLOW = {"quadratics", "noise", "starts", "mnist"}  # many programs to compile


@pytest.fixture(autouse=True)
def digits_for_mnist(monkeypatch):
    """No test depends on files, nor on a network."""
    digits = data_lib.load("digits")
    monkeypatch.setattr(planning_mnist.local_mnist, "load", lambda settings: digits)


def verdicts(result):
    return {f.statement: f.verdict for f in result.findings}


# Every figure ---------------------------------------------------------------------------------


def test_all_figures_are_there():
    assert list(PAPER.figures) == list(COLUMNS)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in COLUMNS]
)
def test_figure_in_quick_mode(name, tmp_path):
    check_figure(name, tmp_path)


@pytest.mark.parametrize("name", ["quadratics", "noise"])
def test_figure_of_invented_runs(name, tmp_path, monkeypatch):
    """Everything but the compiled programs, of which there are dozens."""
    methods = []

    def follow(loss, method, starts, evaluations, **options):
        methods.append((method, options["fixed"].get("verify", False)))
        count = len(starts)
        decay = np.random.default_rng(len(methods)).uniform(0.9, 1.2, (count, 1))
        observed = decay ** np.arange(evaluations + 1)
        return planning_runs.Runs(observed, observed, None, np.ones_like(observed))

    monkeypatch.setattr(planning_runs, "follow", follow)
    check_figure(name, tmp_path)
    planned = {"csawg", "csawg_repeated"}
    assert {m for m in methods if m[0] in planned} == {(m, v) for m in planned for v in (0, 1)}
    assert {("sgd", False), ("momentum", False)} <= set(methods)


def test_mnist_of_invented_histories(tmp_path, monkeypatch):
    trained = []

    class Trainer:
        def __init__(self, problem, method, hyperparams, *, eval_every):
            trained.append((method.name, hyperparams.get("verify", False)))
            self.eval_every = eval_every

        def train(self, runs, steps):
            evaluations = np.arange(0, steps + 1, self.eval_every)
            curve = np.tile(np.linspace(2, 0.5, len(evaluations)), (len(runs.seeds), 1))
            if trained[-1] == ("csawg", False):
                curve[:, 1:] = np.nan
            names = ("test_loss", "test_accuracy", "train_loss")
            diverged = np.zeros(len(runs.seeds), int)
            return engine.History(evaluations, dict.fromkeys(names, curve), diverged, 0.0)

    monkeypatch.setattr(planning_mnist.engine, "Trainer", Trainer)
    result = planning_mnist.mnist(reproduce.Settings(), lambda fraction: None)
    planned = {(m, v) for m in ("csawg", "csawg_repeated") for v in (False, True)}
    assert set(trained) == {("sgd", False), ("momentum", False), *planned}
    lost = [r for r in result.rows if r["diverged"]]
    assert {(r["method"], r["verify"]) for r in lost} == {("K2", False), ("K10", False)}
    assert all(r["test_loss"] is None and r["diverged"] == r["runs"] for r in lost)
    assert verdicts(result)["Runs that diverge, without and with verification"] == "holds"
    report_lib.write(PAPER, {"mnist": result}, QUICK, tmp_path / "out")
    assert "| K2 | diverged | diverged | diverged |" in (tmp_path / "out" / "report.md").read_text()


def check_figure(name, tmp_path):
    done = []
    before = jax.config.jax_enable_x64
    result = PAPER.figures[name].make(QUICK, done.append)
    assert jax.config.jax_enable_x64 == before
    assert done == sorted(done)
    assert 0 < done[-1] <= 1
    assert result.rows
    for row in result.rows:
        assert list(row) == COLUMNS[name]
        for key, value in row.items():
            if not isinstance(value, str) and value is not None:
                assert np.isfinite(value), (key, row)
    assert result.findings
    for finding in result.findings:
        assert all((finding.statement, finding.reference, finding.measured, finding.verdict))
        assert "nan" not in finding.measured
    report_lib.write(PAPER, {name: result}, QUICK, tmp_path / "out")
    with open(tmp_path / "out" / f"{name}.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(result.rows)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"optgrad reproduce step-size-planning {name} --quick" in text
    assert str(tmp_path) not in text


def test_without_mnist_its_section_says_so(monkeypatch, tmp_path):
    def load(settings):
        raise data_lib.DataNotFoundError("mnist is in none of the places")

    monkeypatch.setattr(planning_mnist.local_mnist, "load", load)
    result = planning_mnist.mnist(QUICK, lambda fraction: None)
    report_lib.write(PAPER, {"mnist": result}, QUICK, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Skipped: MNIST is not at hand" in text
    assert "mnist is in none of the places" in text
    assert "--data-dir" in text


# What is measured -----------------------------------------------------------------------------


def test_repeated_planning_reaches_zero_as_the_paper_says():
    """Iterations 79 and 17, counted from 0; 465 and 458 gradient evaluations."""
    runs = planning_repeated.repeated_runs(True)
    assert planning_repeated.zero_at(runs[10]) == (80, 465)
    assert planning_repeated.zero_at(runs[2]) == (18, 458)
    assert planning_repeated.zero_at(runs[5]) is None  # it diverges
    found = verdicts(planning_repeated.convergence(QUICK, lambda fraction: None))
    assert found["Csawg-p5 K10 reaches zero error"] == "holds"
    assert found["Csawg-p5 K2 reaches zero error"] == "holds"


def test_peaks_of_the_step_sizes_are_the_inverse_curvature():
    runs = planning_repeated.repeated_runs(True)
    for k in (2, 10):
        assert np.all(np.abs(planning_repeated._peaks(runs[k]) - 2.5) < 0.02)
    _, sizes = runs[2].plans()
    np.testing.assert_allclose(sizes[1], [0.006, -0.004], atol=5e-4)


def test_convex_problem_reaches_the_specifications_thresholds():
    runs = planning_convex._runs(True)
    assert planning_convex._crossing(runs.planning[2], 1e-10) == (334, 500)
    assert planning_convex._crossing(runs.planning[2], 1e-16) == (422, 632)
    assert planning_convex._from_law(runs.matched) < 1e-12


def test_speedup_of_single_planning_is_the_papers():
    """K = 10, which is not chaotic: 133 times; after as many evaluations as the paper's."""
    with planning_runs.double_precision():
        shared = (planning_rosenbrock.loss, [planning_rosenbrock.START], 10_000)
        loss, start, length = shared
        descent = planning_runs.follow(loss, "sgd", start, length, fixed={"learning_rate": 1e-3})
        planned = planning_runs.follow(
            loss, "csawg", start, length,
            fixed={"learning_rate": 1e-3, "window": 10, **planning_runs.PAPER},
        )  # fmt: skip
    errors = [planning_rosenbrock.errors(r)[0, -1] for r in (descent, planned)]
    assert errors[0] == pytest.approx(1.398e-2, rel=1e-3)
    assert errors[0] / errors[1] == pytest.approx(133.3, abs=0.2)
    assert planned.iteration[0, -1] == 9092


def test_rivals_have_the_specifications_errors():
    """At 1000 evaluations, to the two digits that it gives."""
    errors = planning_rivals._errors(True)
    for key, expected in {
        ("GD", 0.001): 0.76,
        ("GD", 0.0015): 0.55,
        ("heavy ball", 0.0015, 0.8): 0.024,
        ("heavy ball", 0.0015, 0.9): 0.0014,
        ("RMSprop", 0.001, 0.9): 1.4,
        ("RMSprop", 0.0005, 0.9): 1.7,
        ("Adam", 0.01, 0.9, 0.99): 0.3,
        ("Adam", 0.01, 0.9, 0.999): 1.6,
    }.items():
        assert errors[key][1000] == pytest.approx(expected, rel=0.05), key
    grid = {key for key in errors if key[0] in {"RMSprop", "Adam"}}
    assert len(grid) == 12 + 18  # the paper's searches


def test_verification_saves_repeated_planning_on_a_rotated_quadratic():
    factors, starts = planning_quadratics.random_quadratics(5, 4)
    for options, lost in ((planning_runs.PAPER, 4), ({"verify": True}, 0)):
        fixed = {"window": 10, "learning_rate": 0.5, **planning_repeated._EPISODE, **options}
        with planning_runs.double_precision():
            runs = planning_runs.follow(
                planning_quadratics.quadratic, "csawg_repeated", starts, 600,
                data=jnp.asarray(factors), fixed=fixed,
                observe=lambda params, factor: planning_quadratics.quadratic(params, factor, None),
            )  # fmt: skip
        excess = runs.observed
        assert np.sum(~(excess[:, -1] < excess[:, 0])) == lost
        assert (runs.rejected[:, -1] > 0).all() == (lost == 0)


# The pieces -----------------------------------------------------------------------------------


def test_double_precision_is_given_back_even_after_an_error():
    before = jax.config.jax_enable_x64

    def fail():
        with planning_runs.double_precision():
            assert jnp.zeros(1).dtype == jnp.float64
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert jax.config.jax_enable_x64 == before


def test_iterations_of_a_run_end_after_their_plan():
    iteration = np.array([[0, 1, 2, 3, 4, 4, 4, 5, 6, 6, 6]])
    sizes = np.full((1, 11, 2), np.nan)
    sizes[0, 4:7] = 1.0
    sizes[0, 8:] = 2.0
    runs = planning_runs.Runs(np.zeros((1, 11, 2)), iteration, sizes, np.zeros((1, 11)))
    np.testing.assert_array_equal(runs.at_iterations(), [0, 1, 2, 3, 6, 7, 10])
    at, plans = runs.plans()
    np.testing.assert_array_equal(at, [4, 6])
    np.testing.assert_array_equal(plans, [[1, 1], [2, 2]])


def test_crossings():
    curve = np.array([3.0, 1.0, 2.0, 0.5, 0.0])
    assert planning_runs.first_at_most(curve, 1.0) == 1
    assert planning_runs.first_at_most(curve, -1.0) is None
    assert planning_runs.below_from(curve, np.full(5, 1.5)) == 3
    assert planning_runs.below_from(curve, np.zeros(5)) is None
    assert planning_runs.below_from(np.array([np.nan, 1.0]), np.array([2.0, 2.0])) == 1


def test_a_lost_run_counts_as_the_bound():
    excess, first = np.array([1e-4, np.nan, np.inf, 1e9]), np.ones(4)
    found = planning_quadratics.summary(excess, first, np.zeros(4))
    assert found["diverged"] == 3
    assert found["excess"] == pytest.approx((1e-4 * 1e9) ** 0.25, rel=1e-3)

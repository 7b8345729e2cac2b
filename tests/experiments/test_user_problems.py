"""Problems in comparisons: by name, from a user's file, as a user runs them; what is refused."""

import csv
import dataclasses
import re
import shutil
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from optgrad.experiments import cli, compare, config, create_problem, plots, report, scores, tuning
from optgrad.experiments import terminal as terminal_lib
from optgrad.experiments.config import ConfigError, load_config
from optgrad.experiments.live_view import LiveView

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8")
VALLEY, ROBUST = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
PARABOLA = """
import dataclasses
import jax.numpy as jnp
from optgrad.experiments import Problem, Score, function_problem

def problem(*, batch_size, change="", size=1.0):
    found = function_problem(lambda x: size * jnp.sum(x**2), jnp.ones(2), batch_size=batch_size)
    return dataclasses.replace(found, **eval(change or "{}", globals()))
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Configurations -------------------------------------------------------------------------------


def refused(path=None, **overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"problem": "noisy_quadratc"}, ["did you mean 'noisy_quadratic'", "FILE.py:FUNCTION"]),
        ({"problem": "none.py"}, ["problem = 'none.py'", "no file none.py"]),
        ({"problem": "none.py:f"}, ["problem = 'none.py:f'", "no file none.py"]),
        ({"problem": 3}, ["problem = 3", "string"]),
        ({"problem": "saddle", "problem_options.distanse": 1},
         ["problem_options.distanse = 1: no such option", "did you mean 'distance'"]),
        ({"problem": "saddle", "problem_options.batch_size": 1},
         ["problem_options.batch_size = 1", "the field batch_size"]),
        ({"problem_options.noise": 1.0}, ["problem_options", "needs the field problem"]),
        ({"target": 0.0}, ["target = 0.0 needs the field problem"]),
        *[({"problem": "saddle", name: value}, [f"{name} = ", "does not go with problem"])
          for name, value in [("dataset", "mnist"), ("model", "mlp"), ("l2", 0.1),
                              ("validation", 0.1), ("target_accuracy", 0.5),
                              ("augment", ["mirror"]), ("data_dir", "/data"),
                              ("model_options", {"hidden": [8]})]],
    ],
    ids=str,
)  # fmt: skip
def test_refused_fields_are_named_with_the_remedy(fields, expected):
    message = refused(**fields)
    assert len(message.splitlines()) == 1
    for part in expected:
        assert part in message, message


def test_image_fields_are_fields():
    assert set(config.CompareConfig.model_fields) >= config.IMAGE_FIELDS | config.PROBLEM_FIELDS


def test_batches_of_a_problem_hold_one_example_unless_given():
    assert load_config(overrides={"problem": "saddle"}).batch_size == 1
    assert load_config(overrides={"problem": "saddle", "batch_size": 7}).batch_size == 7
    assert load_config().batch_size == 64


def test_a_resolved_problem_makes_the_round_trip(tmp_path):
    loaded = load_config(
        overrides={"problem": "saddle", "problem_options.distance": 0.5, "target": -0.5}
    )
    tree = loaded.model_dump(mode="json", exclude_none=True)
    assert not set(tree) & config.IMAGE_FIELDS
    assert load_config(overrides=tree) == loaded


def test_a_file_is_found_beside_its_configuration(tmp_path, write, monkeypatch):
    write(PARABOLA)
    path = write("problem = 'mine.py'", "comparison.toml")
    monkeypatch.chdir("/")
    assert load_config(path).problem == f"{tmp_path / 'mine.py'}:problem"
    monkeypatch.chdir(tmp_path)
    assert load_config(overrides={"problem": "mine.py"}).problem == "mine.py"


# A user's file --------------------------------------------------------------------------------


def message_of(path, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        create_problem(str(path), **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "function", "expected"),
    [
        ("x = 3", "", "has no function 'problem'; Accepted: nothing"),
        ("def problm(): pass", "", "has no function 'problem'; did you mean 'problm'"),
        ("def problem(): pass\nother = 3", ":other", "has no function 'other'"),
        ("x = 3\nx = y", "", "cannot be run: line 2: NameError: name 'y' is not defined"),
        ("x = 3\ndef", "", "cannot be run: line 2: SyntaxError"),
        ("import nonexistent_module", "", "line 1: ModuleNotFoundError"),
        ("def problem(): pass", "", "got an unexpected keyword argument 'batch_size'; accepted: "
         "def problem(*, batch_size, …) -> optgrad.experiments.Problem"),
        ("def problem(batch_size, other): pass", "", "missing a required argument: 'other'"),
        ("def problem(batch_size): return 3", "", "returned int, not a Problem"),
        ("def problem(batch_size):\n    return 1 / 0", "", "line 2: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_what_is_wrong(write, text, function, expected):
    path = write(text)
    message = message_of(f"{path}{function}")
    assert str(path) in message
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("{'splits': {'validation': 1}}", "splits = ['validation']; accepted: 'test'"),
        ("{'loss': lambda p, b: p}", "loss returns"),
        ("{'loss': lambda p, b: p @ jnp.ones(3)}", "loss fails: TypeError"),
        ("{'example_loss': lambda p, b: (p, b)}", "example_loss returns"),
        ("{'batch': lambda data, key: jnp.ones(())}", "one leading axis"),
        ("{'batch': lambda data, key: (jnp.ones(3), jnp.ones(4))}", "one leading axis"),
        ("{'batch': lambda data, key: ()}", "one leading axis"),
        ("{'batches': lambda data, key, first, n: data[0]}", "batch fails: TypeError"),
        ("{'init': lambda key: 1 / 0}", "init fails: ZeroDivisionError"),
        ("{'evaluate': lambda p, d, s, i: {'accuracy': p[0]}}", "missing: count, loss"),
        ("{'score': Score('accuracy')}", "missing: accuracy"),
    ],
)
def test_a_wrong_problem_is_refused_by_the_field(write, change, expected):
    message = message_of(write(PARABOLA), change=change)
    assert message.startswith("problem = '")
    assert expected in message


def test_unknown_options_are_refused(write):
    path = write(PARABOLA)
    assert "unexpected keyword argument 'sise'" in message_of(path, sise=1)
    assert "problem_options: dimension = 1 " in message_of("rosenbrock", dimension=1)
    assert "problem_options: noise = 'x' " in message_of("rosenbrock", noise="x")


def test_a_file_may_import_its_neighbours_and_define_dataclasses(write):
    write("SIZE = 3.0", "neighbour_of_mine.py")
    path = write(
        "from __future__ import annotations\nimport dataclasses, neighbour_of_mine as n\n"
        "@dataclasses.dataclass\nclass Size:\n    value: float\n"
        + PARABOLA
        + "def large(**options):\n    return problem(size=Size(n.SIZE).value, **options)\n"
    )
    before = list(sys.path)
    found = create_problem(f"{path}:large", batch_size=2)
    assert found.evaluate(jnp.ones(2), None, "test", 0)["loss"] == 6.0
    assert sys.path == before


# Comparisons ----------------------------------------------------------------------------------

SMALL = {
    "optimizers": ["sgd"], "steps": 20, "eval_every": 5, "seeds": 2, "tuning.rates": [0.1, 0.05],
}  # fmt: skip


def compared(**fields):
    return compare.run_comparison(load_config(overrides=SMALL | fields))


@pytest.fixture(scope="module")
def lattice():
    return compared(problem="lattice", **{"problem_options.function": "matyas"})


def test_a_problem_is_judged_by_its_score(lattice):
    assert lattice.score.name == "test_excess"
    assert lattice.config.tuning.select_by == "test_excess"
    (record,) = lattice.summary()
    names = [name.removesuffix("_mean") for name in record if name.endswith("_mean")]
    assert names == ["test_excess", "test_loss", "train_loss"]
    tried = tuning.scores(lattice.outcomes[0].tuned.stages[-2], "test_excess", lattice.score)
    assert record["best"] == max(tried, key=tried.get)
    excess = lattice.outcomes[0].tuned.final.history.metrics["test_excess"]
    np.testing.assert_allclose(record["test_excess_mean"], excess[:, -1].mean())
    expected = 0.99 * excess[:, -1].mean() + 0.01 * excess[:, 0].mean()
    np.testing.assert_allclose(record["target_excess"], expected)
    first = [
        next((s for s, e in zip(range(0, 21, 5), run, strict=True) if e <= expected), np.inf)
        for run in excess
    ]
    median = np.median(first)
    assert record["steps_to_target"] == (median if np.isfinite(median) else None)


def test_the_report_speaks_of_the_score(lattice):
    header, (row,) = report.table(lattice)
    assert header[2:5] == ("test excess", "test loss", "training loss")
    assert re.fullmatch(r"[\d.e-]+ ± [\d.e-]+", row[2])
    text = report.markdown(lattice, {})
    assert f"with a test excess of at most {lattice.target:.4g};" in text
    assert "%" not in text.split("## Robustness")[0]
    assert "accuracy" not in text
    assert "optimistic" not in text  # nothing leaks from an exact score


def test_the_pictures_have_logarithmic_axes(lattice):
    figures = plots.figures(lattice)
    titles = {axis.get_title(): axis.get_yscale() for axis in figures["curves"].axes}
    assert titles["test excess"] == titles["test loss"] == "log"
    assert figures["sensitivity"].axes[0].get_yscale() == "log"
    assert figures["sensitivity"].axes[0].get_ylabel() == "best test excess"


def test_a_negative_loss_has_a_linear_axis_and_its_own_target():
    found = compared(problem="saddle", target=0.25, **{"tuning.select_by": "test_loss"})
    assert found.target == 0.25
    figures = plots.figures(found)
    titles = {axis.get_title(): axis.get_yscale() for axis in figures["curves"].axes}
    assert titles == {"training loss": "linear", "test loss": "linear", "test excess": "log"}
    assert figures["sensitivity"].axes[0].get_yscale() == "linear"
    shown = figures["sensitivity"].axes[0].get_lines()[0].get_ydata()
    assert min(shown) < 0


def test_a_user_problem_with_validation_examples_is_tuned_on_them(write):
    path = write(ROBUST)
    found = compared(problem=str(path), batch_size=16)
    assert found.config.tuning.select_by == "validation_loss"
    assert found.score == scores.LOSS
    header, _ = report.table(found)
    assert header[2:4] == ("test loss", "training loss")
    assert len(plots.curves(found).axes) == 2
    tuned_on_test = found.config.tuning.model_copy(update={"select_by": "test_loss"})
    leaking = found.config.model_copy(update={"tuning": tuned_on_test})
    assert "optimistic" not in report.markdown(found, {})
    assert "optimistic" in report.markdown(dataclasses.replace(found, config=leaking), {})


def test_selecting_by_what_the_problem_lacks_is_refused():
    with pytest.raises(ValueError, match=r"select_by = 'validation_accuracy' .*'test_excess'"):
        compared(problem="saddle", **{"tuning.select_by": "validation_accuracy"})


def test_the_configuration_of_the_noisy_quadratic_runs():
    loaded = load_config(
        ROOT / "configs" / "noisy_quadratic.toml",
        {"steps": 2, "eval_every": 1, "seeds": 1, "optimizers": ["m_ssd"], "tuning.seeds": 1,
         "tuning.rates": [0.001]},
    )  # fmt: skip
    (record,) = compare.run_comparison(loaded).summary()
    assert record["test_excess_mean"] > 0


# The score ------------------------------------------------------------------------------------


def test_scores_know_the_direction():
    for score, better, worse in ((scores.ACCURACY, 0.9, 0.1), (scores.LOSS, 0.1, 0.9)):
        assert score.sign(score.name) * better > score.sign(score.name) * worse
        assert score.reaches([better, worse, np.nan], 0.5).tolist() == [True, False, False]
        target = score.default_target(worse, better)
        assert score.reaches([better, worse], target).tolist() == [True, False]


def test_the_live_view_shows_the_smallest_loss(monkeypatch):
    monkeypatch.setattr(terminal_lib, "console", Console(width=120))
    view = LiveView(load_config(overrides={"problem": "saddle"}))
    for loss in (3e-3, float("nan"), 2e-5, 1e-4):
        record = {"step": 10, "value": 0.1, "seed": 0, "diverged_at": 0, "test_loss": loss}
        view.on_interval("adam", "tuning", record | {"score": scores.LOSS})
    console = Console(width=120)
    with console.capture() as shown:
        console.print(view.render())
    assert "best test loss" in shown.get()
    assert "2e-05" in shown.get()


# As a user ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compare_on_a_users_file_from_anywhere(write, tmp_path, monkeypatch, as_user):
    """The guide's file and command; then the report's command in the results folder alone."""
    write(VALLEY, "valley.py")
    result = as_user(
        "compare", "--problem", "valley.py", "--set", "problem_options.steepness=50",
        "--optimizers", "m_ssd", "--steps", 20, "--seeds", 2, "--rates", "0.01,0.003",
        "--output", "out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "valley" in result.stdout
    assert "test excess" in result.stdout
    folder = tmp_path / "elsewhere"
    shutil.move(tmp_path / "out", folder)
    (tmp_path / "valley.py").unlink()
    assert (folder / "valley.py").read_text(encoding="utf-8") == VALLEY
    resolved = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    assert resolved["problem"] == "valley.py:problem"
    assert resolved["problem_options"] == {"steepness": 50}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "figures", lambda comparison: {})
    command = ["compare", "--config", str(folder / "config.toml"), "--output", "again"]
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 0, again.output
    first, second = (rows_of(tmp_path / name / "metrics.csv") for name in ("elsewhere", "again"))
    assert [r["test_excess"] for r in first] == [r["test_excess"] for r in second]


def test_problems_are_listed_with_their_options(monkeypatch):
    monkeypatch.setattr(terminal_lib, "console", Console(width=100))
    result = CliRunner().invoke(cli.app, ["problems"])
    assert result.exit_code == 0
    for part in ("noisy_quadratic", "spectrum = 'uniform'", "lattice", "distance = 0.01"):
        assert part in result.output


@pytest.mark.parametrize("arguments", [["--problem", "mine.py"], ["--problem", "sadle"]])
def test_refusals_leave_nothing(write, tmp_path, monkeypatch, arguments):
    write("def problem(batch_size): return 3")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["compare", *arguments, "--output", "out"])
    assert result.exit_code == 2
    assert "problem = " in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"mine.py"}

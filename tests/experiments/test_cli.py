"""The command line, as a user meets it: what it prints, writes and refuses."""

import csv
import functools
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import optgrad
from optgrad import registry
from optgrad.__main__ import main
from optgrad.experiments import compare as compare_lib
from optgrad.experiments import config, studies
from optgrad.experiments.live_view import LiveView

TINY = [
    "--optimizers", "adam,m_svag", "--steps", "20", "--eval-every", "10", "--seeds", "2",
    "--rates", "0.1,0.01", "--set", "model_options.hidden=[8]",
]  # fmt: skip


@pytest.fixture
def run(run):
    """As it is, in a terminal of the usual width."""
    return functools.partial(run, width=120)


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test if any training begins."""

    def fail(*arguments):
        pytest.fail("training began")

    monkeypatch.setattr(compare_lib, "run_comparison", fail)


# list, show -----------------------------------------------------------------------------------


def first_words(output):
    return {line.split()[0] for line in output.splitlines() if line.strip()}


@pytest.mark.parametrize("width", [80, 120])
def test_list_names_every_method_in_full(run, width):
    """80 columns is what a pipe has."""
    code, output = run("list", width=width)
    assert code == 0
    assert first_words(output) >= {m.name for m in registry.methods()}
    words = set(output.split())
    for method in registry.methods():
        assert method.family in words
        assert method.tunes is None or method.tunes.hyperparameter in words


def test_list_cuts_no_extras(run):
    _, output = run("list", width=80)
    assert "…" not in output


def test_list_of_one_family(run):
    code, output = run("list", "--family", "dissecting_adam")
    assert code == 0
    shown = first_words(output) & {m.name for m in registry.methods()}
    assert shown == {m.name for m in registry.methods("dissecting_adam")}


def test_list_of_an_unknown_family_suggests_the_nearest(run):
    code, output = run("list", "--family", "disecting_adam")
    assert code == 2
    assert "family = 'disecting_adam'" in output
    assert "did you mean 'dissecting_adam'" in output


def test_show(run):
    code, output = run("show", "m_svag", width=200)
    assert code == 0
    method = registry.get_method("m_svag")
    for part in (
        method.title,
        method.family,
        method.equation,
        method.reference,
        "learning_rate, beta=0.9, variance='moving_average', state_dtype=None",
        "variance, state_dtype",
        "learning_rate in [0.0001, 10]",
        "2 vectors",
        method.low_precision,
        r"\tilde m/(1-\mu^t)",  # the documentation, with its formulas
        "Returns:",
    ):
        assert part in output, part


def test_show_explains_the_extras_that_a_method_needs(run):
    _, output = run("show", "lbfgs", width=200)
    for name in ("value", "grad", "value_fn", "params"):
        assert f"{name}: {registry.EXTRAS[name]}" in output


@pytest.mark.parametrize("method", registry.methods(), ids=lambda m: m.name)
def test_show_works_for_every_method(run, method):
    code, output = run("show", method.name, width=200)
    assert code == 0
    assert method.title in output
    for argument in method.hyperparameters:
        assert argument in output


def test_show_with_an_unknown_name_suggests_the_nearest(as_user):
    """In a process of its own: exit status and streams are what a script sees."""
    result = as_user("show", "m_svga")
    assert result.returncode == 2
    assert "unknown method 'm_svga'; did you mean 'm_svag'" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_version(run):
    assert run("--version") == (0, f"optgrad {optgrad.__version__}\n")


def test_no_arguments_give_help(run):
    _, output = run()
    for command in ("list", "show", "compare"):
        assert re.search(rf"^\W*{command}\b", output, re.MULTILINE)


# compare --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory, as_user):
    """A small comparison by a user's command, in the folder ``here``."""
    here = tmp_path_factory.mktemp("user")
    result = as_user("compare", *TINY, "--output", "out", cwd=here)
    assert result.returncode == 0, result.stderr
    return here, result


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_compare_writes_the_folder(compared):
    here, _ = compared
    assert [path.name for path in here.iterdir()] == ["out"]
    assert {path.name for path in (here / "out").iterdir()} == {
        "config.toml", "metrics.csv", "summary.csv", "summary.json", "environment.json",
        "report.md",
        "curves.svg", "curves.png", "sensitivity.svg", "sensitivity.png",
        "robustness.svg", "robustness.png",
    }  # fmt: skip


def test_compare_prints_the_table_and_the_folder(compared):
    here, result = compared
    assert result.stdout.rstrip().endswith("Results, curves and report: out")
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert "\x1b" not in result.stdout  # piped: no colours
    for row in rows_of(here / "out" / "summary.csv"):
        mean, sd = (100 * float(row[f"test_accuracy_{k}"]) for k in ("mean", "sd"))
        (line,) = [x for x in result.stdout.splitlines() if x.split()[:1] == [row["optimizer"]]]
        assert f"{mean:.2f} ± {sd:.2f}" in line
        assert f"{float(row['best']):g}" in line


def test_compare_tuned_and_replicated(compared):
    here, _ = compared
    rows = rows_of(here / "out" / "metrics.csv")
    for name in ("adam", "m_svag"):
        runs = {(r["stage"], r["value"], r["seed"]) for r in rows if r["optimizer"] == name}
        stages = [stage for stage, _, _ in runs]
        assert stages.count("replication") == 2
        assert {seed for stage, _, seed in runs if stage == "replication"} == {"1", "2"}
        assert {v for stage, v, _ in runs if stage == "tuning"} <= {"0.1", "0.01"}
        assert {r["step"] for r in rows if r["stage"] == "replication"} == {"0", "10", "20"}
    summary = rows_of(here / "out" / "summary.csv")
    assert [row["optimizer"] for row in summary] == ["adam", "m_svag"]
    assert "1 compilation(s)" in (here / "out" / "report.md").read_text(encoding="utf-8")
    assert all(float(row["test_accuracy_mean"]) > 0.2 for row in summary)


@pytest.mark.slow
def test_the_command_in_the_report_gives_the_same_numbers(compared, run, monkeypatch):
    here, _ = compared
    (command,) = re.findall(
        r"```\n(optgrad .*)\n```", (here / "out" / "report.md").read_text(encoding="utf-8")
    )
    monkeypatch.chdir(here / "out")
    code, output = run(*command.split()[1:], "--output", here / "again")
    assert code == 0, output
    first, second = (rows_of(here / name / "metrics.csv") for name in ("out", "again"))
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for key, value in one.items():
            if key in {"optimizer", "stage"}:
                assert value == other[key]
            else:
                np.testing.assert_allclose(float(value), float(other[key]), rtol=1e-4, atol=1e-6)


def test_compare_on_the_real_mnist(real_data_dir, run, tmp_path):
    folder = tmp_path / "mnist"
    code, output = run(
        "compare", "--dataset", "mnist", "--data-dir", real_data_dir, "--optimizers", "adam",
        "--steps", 2, "--batch-size", 32, "--seeds", 1, "--tuning", "grid", "--rates", "0.01",
        "--set", "model_options.hidden=[8]", "--set", "validation=5000", "--output", folder,
    )  # fmt: skip
    assert code == 0, output
    assert "mlp on mnist" in output
    (row,) = rows_of(folder / "summary.csv")
    assert 0.05 < float(row["test_accuracy_mean"]) < 0.6
    assert float(row["test_loss_mean"]) < 4
    assert [r["step"] for r in rows_of(folder / "metrics.csv")] == ["0", "1", "2"]


def test_defaults_are_the_papers_four_on_digits(run, tmp_path, monkeypatch):
    seen = []

    def note(settings, *others):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_lib, "run_comparison", note)
    run("compare")
    assert seen == [config.load_config()]


def test_options_reach_their_fields(run, tmp_path, monkeypatch):
    seen = []

    def note(settings, *others):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(compare_lib, "run_comparison", note)
    code, output = run(
        "compare", "--dataset", "mnist", "--data-dir", "/data", "--model", "mlp_small",
        "--optimizers", "sgd, adam", "--steps", 30, "--eval-every", 15, "--batch-size", 8,
        "--seeds", 2, "--rates", "0.5,1e-3", "--tuning", "grid", "--select-by", "test_loss",
        "--vectorize", "map", "--tensorboard", "--output", tmp_path / "out",
        "--set", "l2=0.5", "--set", "tuning.seeds=4", "--set", "seeds=3",
    )  # fmt: skip
    assert (code, "enough" in output) == (2, True)
    (settings,) = seen
    assert settings == config.load_config(
        overrides={
            "dataset": "mnist", "data_dir": "/data", "model": "mlp_small",
            "optimizers": ["sgd", "adam"], "steps": 30, "eval_every": 15, "batch_size": 8,
            "seeds": 3, "tuning.rates": [0.5, 1e-3], "tuning.protocol": "grid",
            "tuning.select_by": "test_loss", "tuning.seeds": 4, "vectorize": "map", "l2": 0.5,
            "tensorboard": True,
            "output": tmp_path / "out",
        }
    )  # fmt: skip


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "many"], "--steps"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "0"], "steps = 0"),
        (["--optimizers", "adm"], "did you mean 'adam'"),
        (["--optimizers", ""], "optimizers = []"),
        (["--optimizers", "adam,adam"], "labels ['adam', 'adam']"),
        (["--rates", "0.1,x"], "tuning.rates.1 = 'x'"),
        (["--set", "steps"], "accepted: FIELD=VALUE"),
        (["--set", "tuning.decade=3"], "did you mean 'decades'"),
        (["--config", "missing.toml"], "missing.toml: cannot be read"),
        (["--output", "taken"], "taken exists already"),
        (["--output", "taken", "--overwrite"], "not written by optgrad"),
        (["--output", "taken/file/out"], "cannot be written"),
        (["--set", "optimizers=[{method = 'm_svag', hyperparams = {beta = 2}}]"], "beta = 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_are_refused_before_any_work(
    run, tmp_path, monkeypatch, no_training, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    code, output = run("compare", *arguments)
    assert code == 2
    assert expected in output
    assert "Traceback" not in output
    assert {p.name for p in tmp_path.iterdir()} <= {"taken", "results"}
    assert (tmp_path / "taken" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "5000"], "batch_size = 5000"),
        (["--model", "cifar10_cnn"], "image_shape = (8, 8, 1)"),
        (["--set", "model_options.hidden=[0]"], "hidden = [0]"),
        (["--dataset", "mnist", "--data-dir", "broken"], "train-images-idx3-ubyte"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_fit_the_data_is_refused(run, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        for part in ("train", "t10k"):
            (tmp_path / "broken" / f"{part}-{kind}-ubyte").write_bytes(b"")
    code, output = run("compare", *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert expected in output
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_lib, "run_comparison", interrupt)
    code, output = run("compare", "--output", tmp_path / "out")
    assert code in {1, 130}
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_option_is_refused(run, tmp_path):
    code, output = run("compare", "--set", "model_options.hiden=[8]", "--output", tmp_path / "out")
    assert (code, "did you mean 'hidden'" in output) == (2, True)


def test_a_validation_set_larger_than_the_training_set_is_refused(run, tmp_path):
    code, output = run("compare", "--set", "validation=2000", "--output", tmp_path / "out")
    assert (code, "validation = 2000" in output) == (2, True)


def test_a_batch_of_one_is_refused_before_any_work(run, tmp_path, monkeypatch):
    """m_svag_mb needs the variance within a batch."""
    trained = []
    monkeypatch.setattr(
        studies.Trainer, "train", lambda self, *_: trained.append(self.method.name) or 1 / 0
    )
    try:
        code, _ = run("compare", "--optimizers", "sgd,m_svag_mb", "--batch-size", 1,
                      "--output", tmp_path / "out")  # fmt: skip
    except ZeroDivisionError:
        code = None
    assert (code, trained) == (2, [])


# report ---------------------------------------------------------------------------------------


def test_report_merges_what_compare_wrote(run, compared, tmp_path, monkeypatch):
    """And refuses to write where the results are."""
    here, _ = compared
    monkeypatch.chdir(here)
    code, output = run("report", "out", "--output", tmp_path / "page", "--tensorboard")
    assert code == 0, output
    assert "mlp_small on digits" in output
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "config.toml", "report.html", "report.md", "figures", "tensorboard"
    }  # fmt: skip
    code, output = run("report", "out", "--output", "out", "--overwrite")
    assert (code, "accepted: another folder" in output) == (2, True)
    assert (here / "out" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "folder = nowhere is no folder"),
        (["unfinished"], "unfinished; go on with it: optgrad resume unfinished"),
        (["other"], "folder = other holds no results of optgrad compare"),
        (["other", "other/../other"], "folder = other is given twice"),
        (["other", "--output", "other"], "folder = other holds no results"),
    ],
)
def test_report_refuses_what_are_no_results(run, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished.partial").mkdir()
    (tmp_path / "other").mkdir()
    code, output = run("report", *arguments, width=300)
    assert code == 2
    assert expected in output
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished.partial", "other"}


@pytest.mark.parametrize("command", [["compare"], ["report", "out"]])
def test_without_the_extra_event_files_are_refused_at_once(
    run, compared, tmp_path, monkeypatch, no_training, command
):
    monkeypatch.chdir(compared[0])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, output = run(*command, "--tensorboard", "--output", tmp_path / "new")
    assert code == 2
    assert 'pip install "optgrad[tensorboard]"' in output
    assert list(tmp_path.iterdir()) == []


# The live view --------------------------------------------------------------------------------


def rendered(view):
    console = Console(width=120, file=io.StringIO())
    console.print(view.render())
    return console.file.getvalue()


def record(step=10, value=0.1, seed=0, accuracy=0.5, diverged_at=0):
    return {"step": step, "value": value, "seed": seed, "test_accuracy": accuracy,
            "diverged_at": diverged_at}  # fmt: skip


@pytest.fixture
def view():
    return LiveView(config.load_config(overrides={"steps": 100}))


def test_the_live_view_shows_the_best_of_each_optimizer(view):
    view.on_interval("momentum", "tuning", record(accuracy=0.5))
    view.on_interval("momentum", "tuning", record(step=20, value=0.03, accuracy=0.75))
    view.on_interval("momentum", "replication", record(step=30, accuracy=0.25, seed=4))
    view.on_interval("adam", "stability", record(accuracy=0.125))
    momentum, adam = (
        next(line for line in rendered(view).splitlines() if line.split()[:1] == [name])
        for name in ("momentum", "adam")
    )
    assert momentum.split() == ["momentum", "tuning", "0.03", "20", "75.00", "0"]
    assert adam.split() == ["adam", "stability", "0.1", "10", "12.50", "0"]


def test_the_live_view_counts_diverged_runs_once(view):
    for step in (10, 20):
        for seed in (0, 1):
            view.on_interval("adam", "tuning", record(step, seed=seed, diverged_at=7))
    assert len(view.diverged["adam"]) == 2


def test_a_diverged_run_does_not_hide_the_best(view):
    view.on_interval("adam", "tuning", record(accuracy=0.75))
    view.on_interval("adam", "tuning", record(step=20, accuracy=float("nan"), diverged_at=12))
    assert "75.00" in rendered(view)
    assert "nan" not in rendered(view)


def test_diverged_runs_without_a_rate_are_counted_once(view):
    for step in (10, 20, 30):
        view.on_interval("lbfgs", "replication", record(step, float("nan"), diverged_at=7))
    assert len(view.diverged["lbfgs"]) == 1


# Without the extra ----------------------------------------------------------------------------

WITHOUT = """
import sys
from optgrad.__main__ import main
sys.argv = ["optgrad", "compare"]
for name in ("typer", "rich", "pydantic", "flax"):
    for module in [m for m in sys.modules if m.startswith("optgrad.experiments")]:
        del sys.modules[module]
    before = sys.modules.pop(name, None)
    sys.modules[name] = None  # as if it were not installed
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
"""


def test_a_missing_extra_is_named():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stdout
    for line, name in zip(lines, ("typer", "rich", "pydantic", "flax"), strict=True):
        assert f"needs {name}, which is not installed" in line
        assert 'pip install "optgrad[experiments]"' in line


def test_a_module_missing_from_the_package_itself_is_no_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optgrad.experiments.cli", None)
    with pytest.raises(ModuleNotFoundError, match="optgrad"):
        main()

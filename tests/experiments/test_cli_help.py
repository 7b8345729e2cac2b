"""What the command line says of itself: help, examples, suggestions, completion; without JAX."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import optgrad
from optgrad.experiments import catalogue, cli, cli_names, data, models, reproduce
from optgrad.experiments.bench import trees

ROOT = typer.main.get_command(cli.app)


def tree(command, path=()):
    """Every command of the command line, by the words that call it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from tree(below, (*path, name))


COMMANDS = dict(tree(ROOT))


def every_command(test):
    """Runs a test for each of them."""
    ids = [" ".join(path) or "optgrad" for path in COMMANDS]
    return pytest.mark.parametrize("path", COMMANDS, ids=ids)(test)


def shown(*arguments, width=80):
    """What is printed in a terminal of that width."""
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(width)})
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def examples(command):
    return re.findall(r"^Example: optgrad ?(.*)$", inspect.cleandoc(command.help), re.MULTILINE)


def test_all_commands_are_walked():
    """Those of 'bench', too."""
    assert {("compare",), ("resume",), ("doctor",), ("bench",), ("bench", "step")} <= set(COMMANDS)


@every_command
def test_help_fits_80_columns_and_cuts_nothing(path):
    """Every word of every option is there, and of the first lines of the commands below."""
    output = shown(*path, "--help")
    assert max(map(len, output.splitlines())) <= 80
    command = COMMANDS[path]
    texts = [command.help.split("\n\n")[0]]
    for param in command.get_params(typer.Context(command)):
        texts += [*(param.opts if param.param_type_name == "option" else ()), param.help]
    for name, below in getattr(command, "commands", {}).items():
        texts += [name, below.short_help or below.help.split("\n\n")[0]]
    words = {word for text in texts for word in text.split()}
    assert words <= {*output.replace("│", " ").split()}


@every_command
def test_every_command_is_one_line_in_the_list(path):
    if path:
        command = COMMANDS[path]
        line = command.short_help or command.help.split("\n\n")[0].replace("\n", " ")
        (found,) = [x for x in shown(*path[:-1], "--help").splitlines()
                    if x.split()[1:2] == [path[-1]]]  # fmt: skip
        assert " ".join(found.strip("│").split()) == f"{path[-1]} {line}"


@every_command
def test_every_command_has_examples_that_are_accepted(path):
    """They are parsed, and not run; one of them at least is of this command, or below it."""
    called = []
    for example in examples(COMMANDS[path]):
        command, words, arguments = ROOT, [], shlex.split(example)
        while arguments and arguments[0] in getattr(command, "commands", {}):
            words.append(arguments.pop(0))
            command = command.commands[words[-1]]
        command.make_context(words[-1], arguments)
        called.append(tuple(words[: len(path)]))
        assert f"Example: optgrad {example}" in " ".join(shown(*path, "--help").split())
    assert path in called


def test_an_example_that_is_wrong_would_be_seen():
    """The test before this one can fail."""
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["compare",].make_context("compare", ["--stepz", "3"])


def test_the_commands_are_in_panels():
    """Those of the whole, and the many options of compare."""
    output = shown("--help")
    for panel in ("Look", "Compare", "Papers and pictures", "Machine"):
        assert f"─ {panel} ─" in output
    assert "─ Commands ─" not in output  # a command without a panel
    output = shown("compare", "--help")
    for panel in ("What to compare", "Budget", "Tuning", "Running", "Several processes", "Output"):
        assert f"─ {panel} ─" in output


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["comapre"], "compare"),
        (["bench", "stpe"], "step"),
        (["compare", "--stepz", "3"], "--steps"),
        (["bench", "step", "--ruonds", "3"], "--rounds"),
        (["doctor", "--datadir", "x"], "--data-dir"),
    ],
    ids=" ".join,
)
def test_misspelt_commands_and_options_suggest_the_nearest(arguments, nearest):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert f"Did you mean '{nearest}'?" in text


# Completion -----------------------------------------------------------------------------------


def test_the_names_are_the_real_ones():
    """They are read from the source; here they are asked for."""
    assert cli_names.methods() == sorted(m.name for m in optgrad.methods())
    assert set(cli_names.families()) == {m.family for m in optgrad.methods()}
    assert set(cli_names.problems()) == set(catalogue.problems())
    assert cli_names.models() == list(models.models())
    assert cli_names.datasets() == list(data.datasets())
    assert cli_names.trees() == list(trees._TREES)
    assert cli_names.papers() == list(reproduce.reproductions())
    for paper in cli_names.papers():
        assert cli_names.figures(paper) == ["all", *reproduce.get_reproduction(paper).figures]
    assert cli_names.figures("nothing") == []


def completed(line, shell="bash"):
    """What the shell is told at a Tab at the end of the line."""
    words = line.split(" ")
    of_bash = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    others = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(
        cli.app, [], prog_name="optgrad",
        env={"_OPTGRAD_COMPLETE": f"complete_{shell}", **(of_bash if shell == "bash" else others)},
    )  # fmt: skip
    return result.output.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optgrad comp", ["compare"]),
        ("optgrad bench s", ["step", "sweep"]),
        ("optgrad compare --sel", ["--select-by"]),
        ("optgrad show m_sv", ["m_svag", "m_svag_mb"]),
        ("optgrad list --family step", ["step_size", "step_size_planning"]),
        ("optgrad compare --optimizers m_ss", ["m_ssd"]),
        ("optgrad compare --optimizers m_svag,adam,m_sv", ["m_svag,adam,m_svag_mb"]),
        ("optgrad compare --problem ros", ["rosenbrock"]),
        ("optgrad compare --dataset cifar", ["cifar10", "cifar100"]),
        ("optgrad compare --model mlp", ["mlp", "mlp_small"]),
        ("optgrad compare --tuning h", ["halton"]),
        ("optgrad reproduce onl", ["online-parabola"]),
        ("optgrad reproduce dissecting-adam fig", ["fig2", "fig3", "fig5", "fig6", "fig7"]),
        ("optgrad reproduce dissecting-adam fig5 fig", ["fig2", "fig3", "fig6", "fig7"]),
        ("optgrad bench step adam m_ss", ["m_ssd"]),
        ("optgrad bench compile m_ss", ["m_ssd"]),
        ("optgrad bench sweep m_ss", ["m_ssd"]),
        ("optgrad bench step --tree re", ["resnet18"]),
        ("optgrad show nothing", []),
    ],
)
def test_values_are_completed(line, expected):
    assert completed(line) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_the_same(shell):
    assert "m_svag" in " ".join(completed("optgrad show m_sv", shell))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_are_given_their_scripts(shell):
    result = CliRunner().invoke(
        cli.app, [], prog_name="optgrad", env={"_OPTGRAD_COMPLETE": f"source_{shell}"}
    )
    assert "_OPTGRAD_COMPLETE" in result.output
    assert f"complete_{shell}" in result.output


# Without JAX ----------------------------------------------------------------------------------

# The package's own __init__ imports JAX; what is tested is the command line.
WITHOUT_THE_PACKAGE = """
import sys, types
package = types.ModuleType("optgrad")
package.__path__, package.__version__ = [sys.argv.pop(1)], "0.0"
sys.modules["optgrad"] = package
sys.argv[0] = "optgrad"
from optgrad.__main__ import main
try:
    main()
finally:
    heavy = {"jax", "optax", "flax", "numpy", "scipy", "sklearn", "matplotlib", "orbax"}
    print("imported:", *sorted(heavy & {*sys.modules}), file=sys.stderr)
"""

TAB = {
    "COMP_WORDS": "optgrad show m_sv", "COMP_CWORD": "2", "_OPTGRAD_COMPLETE": "complete_bash",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--version"], {}, "optgrad 0.0"),
        (["--help"], {}, "Papers and pictures"),
        (["compare", "--help"], {}, "Several processes"),
        (["bench", "sweep", "--help"], {}, "--batch-size"),
        (["--stepz"], {}, ""),
        ([], TAB, "m_svag_mb"),
    ],
    ids=["version", "help", "compare", "sweep", "unknown", "completion"],
)
def test_help_and_completion_import_nothing_heavy(arguments, environment, expected):
    """And print no colours into a pipe."""
    forced = {"FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"}
    clean = {k: v for k, v in os.environ.items() if k not in forced}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(Path(cli.__file__).parents[1]), *arguments],
        env={**clean, **environment, "PYTHONIOENCODING": "utf-8"},
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert expected in result.stdout, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1] == "imported:"

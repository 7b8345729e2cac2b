"""README and documentation: examples print what they say, commands parse, links lead somewhere."""

import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import typer

import optgrad
from optgrad import registry
from optgrad.experiments import cli
from optgrad.experiments import config as config_lib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
# What is written into docs when the site is built; git ignores it, and other tests check it.
GENERATED = ("_build", "api.md", "gallery", "jupyter_execute", "methods", "notebooks")
GUIDES = [
    page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in GENERATED
]
PAGES = (README, CONTRIBUTING, *GUIDES)


def name_of(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks(page, language=""):
    """The contents of a page's fenced blocks, those that are written in that language."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^[ ]*```([^`\n]*)\n(.*?)^[ ]*```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


# --- examples -----------------------------------------------------------------------------------

OPTIONAL = ("equinox", "haiku")  # packages of examples that optgrad does not install by itself
EXAMPLES = [
    pytest.param(page, source, id=f"{name_of(page)}-{number}")
    for page in (README, *GUIDES)
    for number, source in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize(("page", "source"), EXAMPLES)
def test_example_prints_what_its_comments_say(page, source, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # an example may register
    for package in OPTIONAL:
        if f"import {package}" in source:
            pytest.importorskip(package)
    exec(compile(source, str(page), "exec"), {"__name__": "example"})
    expected = re.findall(r"print\(.*\)  # (.*)", source)
    assert expected
    assert capsys.readouterr().out.split("\n")[:-1] == expected


# --- commands -----------------------------------------------------------------------------------

COMMAND = typer.main.get_command(cli.app)
PLACEHOLDERS = {"METHOD": "adam", "NAME": "adam"}  # any other word in capitals is a path
SHELL = ("", "sh", "bash", "console")
CHEAP = (["list"], ["problems"], ["show", "m_svag"], ["doctor"])


def commands_of(page):
    """The arguments of every command of optgrad in a page's fenced blocks and in its text."""
    text = page.read_text(encoding="utf-8")
    shell = itertools.chain(*(blocks(page, language) for language in SHELL))
    fenced = "\n".join(shell).replace("\\\n", " ")
    lines = re.findall(r"(?:^|&& )optgrad\b(.*)", fenced, re.MULTILINE)
    inline = re.sub(r"^[ ]*```.*?^[ ]*```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [line.replace("\n", " ") for line in re.findall(r"`optgrad (.*?)`", inline, re.DOTALL)]
    for line in lines:
        complete = re.sub(r"(--[\w-]+) …", r"\1 VALUE", line)
        # Brackets, but for those within quotes, and dots: what may be left out or repeated.
        plain = re.sub(r"[\[\]](?![^']*')|\.\.\.|…", "", complete)
        yield [PLACEHOLDERS.get(word, word) for word in shlex.split(plain, comments=True)]


COMMANDS = [
    pytest.param(page, arguments, id=f"{name_of(page)}-{' '.join(arguments)}"[:80])
    for page in PAGES
    for arguments in commands_of(page)
]


class LoadedError(Exception):
    """Ends a command as soon as its configuration is there."""


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """A folder with what the page's commands read: configurations, and the files it shows."""
    page = request.getfixturevalue("page")
    os.symlink(ROOT / "configs", tmp_path / "configs")
    for found in page.parent.glob("*.toml"):
        os.symlink(found, tmp_path / found.name)
    for source in blocks(page, "python"):
        for name in re.findall(r"`(\w+\.py)`", page.read_text(encoding="utf-8")):
            if "def problem(" in source and not (tmp_path / name).exists():
                (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "arguments"), COMMANDS)
@pytest.mark.usefixtures("place")
def test_command_is_understood(page, arguments, monkeypatch):
    command, rest = COMMAND, list(arguments)
    while rest and rest[0] in getattr(command, "commands", ()):
        command = command.commands[rest.pop(0)]
    if not rest and command is not COMMAND and arguments != ["compare"]:
        return  # named as such, not as it is called
    if rest in (["--help"], ["--version"]):
        return
    command.make_context(" ".join(arguments), rest)
    if arguments[0] != "compare":
        return
    load_config = config_lib.load_config

    def load(*given):
        load_config(*given)
        raise LoadedError

    monkeypatch.setattr(config_lib, "load_config", load)
    with pytest.raises(LoadedError):
        COMMAND.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("arguments", CHEAP, ids=" ".join)
def test_cheap_command_runs(arguments, capsys):
    assert not COMMAND.main(arguments, standalone_mode=False)
    assert capsys.readouterr().out


def test_commands_are_those_that_ci_runs():
    block = re.search(
        r"<!-- commands -->\n```\n(.*?)```\n<!-- end -->", README.read_text("utf-8"), re.S
    )
    lines = block.group(1).strip().split("\n")
    assert len(lines) == 2
    assert "optgrad compare" in lines[0]
    assert lines[1].endswith("pytest")


# --- links --------------------------------------------------------------------------------------


def anchors_of(page):
    """What MyST (and GitHub) call a page's headings in links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in plain}


def links_of(page):
    """Targets of a page's links and pictures, but for those on the network."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "code", text))
    return [target for target in targets if not re.match(r"https?:|mailto:", target)]


def complaint_about(page, target):
    """What is wrong with a link, or None."""
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    if DOCS in page.parents:
        if not found.is_relative_to(DOCS):
            return "leads out of the documentation"
        if (folder := found.relative_to(DOCS).parts[0]) in GENERATED:
            known = {method.name for method in optgrad.methods()} | {"index"}
            return (
                "is no registered method"
                if folder == "methods" and found.stem not in known
                else None
            )
        if not anchor and found.is_dir():
            return "is a folder, which the site does not show"
    if not found.exists():
        return "does not exist"
    if anchor and anchor not in anchors_of(found):
        return f"has no heading #{anchor}"
    return None


# The gallery's report stands beside its pictures only where these are drawn.
LINKED = [page for page in PAGES if page.parent != DOCS / "results" / "gallery"]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    found = {target: complaint_about(page, target) for target in links_of(page)}
    assert not {target: what for target, what in found.items() if what}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_headings_start_with_one_title(page):
    """Sphinx takes the first heading for the page's title, and wants no level left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    if not levels:  # a page that is only included in another
        return
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))

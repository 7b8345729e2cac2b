"""The examples of the README and of the guides run and print what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = [
    pytest.param(path, source, id=f"{path.stem}-{number}")
    for path in (README, *sorted(ROOT.glob("docs/*.md")))
    for number, source in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize(("path", "source"), EXAMPLES)
def test_example_prints_what_its_comments_say(path, source, capsys):
    exec(compile(source, str(path), "exec"), {"__name__": "example"})
    expected = re.findall(r"print\(.*\)  # (.*)", source)
    assert expected
    assert capsys.readouterr().out.split("\n")[:-1] == expected


def test_commands_are_those_that_ci_runs():
    block = re.search(
        r"<!-- commands -->\n```\n(.*?)```\n<!-- end -->", README.read_text("utf-8"), re.S
    )
    lines = block.group(1).strip().split("\n")
    assert len(lines) == 2
    assert "optgrad compare" in lines[0]
    assert lines[1].endswith("pytest")

"""The README's examples run and print what they say."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=["chain", "flax"])
def test_example_prints_what_its_comments_say(source, capsys):
    exec(compile(source, str(README), "exec"), {"__name__": "readme"})
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

"""The notebooks as files: valid, cleared, and ready for Colab. The site's build executes them."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)
CELL_FIELDS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"},
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def cells(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def python(source):
    """The code without magics; a block that holds nothing else stays a block."""
    return MAGIC.sub(r"\1pass", source)


def test_documentation_shows_all_of_them_and_no_others():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    names = [path.stem for path in NOTEBOOKS]
    assert len(names) == 8
    assert sorted(re.findall(r"^notebooks/(\w+)$", page, re.MULTILINE)) == names
    assert sorted(re.findall(r"\(notebooks/(\w+)\.ipynb\)", page)) == names


def test_links_between_them_lead_somewhere(notebook):
    linked = re.findall(r"\]\((\w+\.ipynb)\)", "\n".join(cells(notebook, "markdown")))
    assert set(linked) <= {path.name for path in NOTEBOOKS}


def test_format_is_valid(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert cell.keys() == CELL_FIELDS[cell["cell_type"]]
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_format_is_what_nbformat_accepts(notebook):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(notebook)


def test_outputs_are_cleared(notebook):
    for cell in notebook["cells"]:
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_metadata_names_no_machine(notebook):
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_no_absolute_paths(notebook):
    text = "\n".join(cells(notebook, "code") + cells(notebook, "markdown"))
    assert not re.search(
        r"""(?<![\w.:/<])/(?:home|root|work|tmp|usr|content|Users|mnt|var)\b""", text
    )
    assert not re.search(r"\b[A-Z]:\\", text)
    assert "file://" not in text


def test_begins_with_a_title_and_a_source(notebook):
    first = notebook["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S", text)
    assert re.search(r"\*Sources?\b[^*]*:\*", text)
    assert re.search(r"\b(19|20)\d\d\b", text), "the year of a source"
    titles = re.findall(r"^# ", "\n".join(cells(notebook, "markdown")), re.MULTILINE)
    assert len(titles) == 1


def test_first_code_cell_installs_on_colab_only(notebook):
    assert cells(notebook, "code")[0].split("\n") == [
        "import sys",
        "",
        'if "google.colab" in sys.modules:',
        '    %pip install -q "optgrad[experiments]"',
    ]
    assert not any(re.search(r"^\s*[%!]pip", code, re.M) for code in cells(notebook, "code")[1:])


def test_code_is_python(notebook):
    for code in cells(notebook, "code"):
        compile(python(code), "cell", "exec")


def test_findings_are_asserted(notebook):
    trees = [ast.parse(python(code)) for code in cells(notebook, "code")]
    asserts = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 3

"""What the site's pages are written from: the registry, and the docstrings of all public names."""

import types
from pathlib import Path

import pytest

import optgrad
from optgrad.registry import Method

ROOT = Path(__file__).parents[1]
MODULES = ("baselines", "parameter_free")  # of factories, which are on the methods' pages


@pytest.fixture(autouse=True)
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))


@pytest.fixture
def pages():
    import generated_pages

    return generated_pages


@pytest.mark.parametrize("record", optgrad.methods(), ids=lambda record: record.name)
def test_page_says_everything_of_the_record(record, pages):
    page = pages.method_page(record, "example()", "printed")
    assert page.startswith(f"# {record.title}\n")
    for part in (record.equation, record.reference, "example()", "printed"):
        assert part.replace("|", "\\|") in page
    for name in (*record.needs, *record.hyperparameters):
        assert f"`{name}`" in page
    for heading in ("Method", "Defaults", "Example", "Sensitivity"):
        assert f"\n## {heading}\n" in page
    assert f"{record.name}.svg" in page


def test_a_new_record_has_a_page_and_a_line_in_the_index(pages, monkeypatch):
    def factory(rate: float = 0.5):
        """Nothing."""

    record = Method("brand_new", factory, None, "step_size", "Brand new", "A. U. Thor", "Eq. (1)")
    monkeypatch.setitem(optgrad.registry._METHODS, record.name, record)
    page = pages.method_page(record, "", "", has_picture=False)
    assert "| `rate` | `0.5` | may be traced |" in page
    assert "brand_new.svg" not in page
    assert any("[brand_new](brand_new.md)" in line for line in pages._index())


def test_every_family_has_a_title(pages):
    assert {method.family for method in optgrad.methods()} <= pages.FAMILIES.keys()


def test_example_of_a_method_runs_and_prints(pages):
    source = pages.method_examples.source(optgrad.get_method("gauss_newton"))
    assert "residual=residual" in source
    assert "at step 100" in pages.method_examples.printed(source)


def test_every_public_name_is_documented_and_on_a_page(pages):
    import documented

    assert not list(documented.undocumented())
    text = "\n".join(pages._api()) + "".join(
        pages.method_page(method, "", "") for method in optgrad.methods()
    )
    for name in optgrad.__all__:
        assert f":: optgrad.{name}\n" in text or name in MODULES, name


def test_what_lacks_a_docstring_is_found():
    import documented

    class Half:
        """Is documented."""

        def method(self):
            pass

    def bare():
        pass

    module = types.SimpleNamespace(__all__=["Half", "bare"], Half=Half, bare=bare)
    assert list(documented.undocumented(module)) == ["Half.method", "bare"]


def test_a_build_fails_where_an_example_prints_something_else(tmp_path, monkeypatch):
    import checked_examples
    from sphinx.errors import ExtensionError

    wrong = tmp_path / "test_wrong.py"
    wrong.write_text('def f():\n    """\n    >>> 1 + 1\n    3\n    """\n')
    monkeypatch.setattr(
        checked_examples, "_TESTS", ("-n", "0", "-p", "no:cacheprovider", str(wrong))
    )
    app = types.SimpleNamespace(config=types.SimpleNamespace(check_examples=True))
    with pytest.raises(ExtensionError, match="differ"):
        checked_examples._check(app)
    app.config.check_examples = False
    checked_examples._check(app)


def test_gallery_has_a_page_for_each_landscape(pages):
    report = "# All\n\n[interactive.html](interactive.html)\n\n## How\n\n## Beale\n\nText.\n"
    found = pages.gallery_pages(report)
    assert found["beale"] == "# Beale\n\nText.\n"
    assert "Text." not in found["report"]
    assert "## How" in found["report"]
    assert '<a href="../interactive.html">' in found["report"]


def test_every_landscape_is_in_the_toctree_of_the_gallery(pages):
    listed = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for name in pages.places():
        assert f"\ngallery/{name}\n" in listed

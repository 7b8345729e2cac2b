"""The pages that are written from the registry: one per method, their index, and the API.

They are written before Sphinx reads, into folders that git ignores, and only where they changed.
"""

import inspect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import method_examples
from sphinx.application import Sphinx

import optgrad
from optgrad import registry
from optgrad.experiments import gallery
from optgrad.experiments.gallery.numbers import read
from optgrad.experiments.gallery.page import NAME as INTERACTIVE
from optgrad.experiments.gallery.places import places

DOCS = Path(__file__).parents[1]
NUMBERS = DOCS / "results" / "gallery"
FAMILIES: Mapping[str, tuple[str, str]] = {  # family -> title, its page
    "dissecting_adam": ("Sign and variance adaptation", "dissecting_adam"),
    "online_regression": ("Online parabola models", "online_regression"),
    "step_size_planning": ("Step-size planning", "step_size_planning"),
    "step_size": ("Step-size rules", "step_size_planning"),
    "curvature": ("Second-order methods", "curvature"),
    "baselines": ("Baselines from optax", "which_method"),
}
_GROUPS: Mapping[str, tuple[str, ...]] = {  # of the API beside the methods
    "Registry": ("Method", "Tunable", "create", "get_method", "inject", "methods", "register",
                 "UnknownMethodError", "UnknownHyperparameterError"),
    "Training steps": ("make_step", "TrainingStep", "StepInfo", "curvature_args", "CurvatureArgs"),
    "What methods need beside gradients": (
        "value_grad_and_variance", "gradient_variance", "per_example_grads",
        "gauss_newton_diagonal", "layer_statistics", "LayerStatistics",
    ),
    "Around any optimizer": (
        "guard", "GuardState", "check_guard", "NonFiniteStepsError", "monitor", "MonitorState",
        "monitored", "MultiSteps", "MultiStepsState", "low_precision_state", "LowPrecisionState",
        "across_devices", "on_subtree", "filter_extra", "l4", "mean_position",
        "scale_by_inverse_diag_covariance",
    ),
    "What a state holds": (
        "diagnostics", "per_parameter", "state_to_dict", "state_from_dict", "SavedStateError",
    ),
}  # fmt: skip


def _write(app: Sphinx) -> None:

    methods = optgrad.methods()
    sources = [method_examples.source(method) for method in methods]
    run = app.config.run_examples
    printed = method_examples.all_printed(sources) if run else [""] * len(sources)
    recorded = read(NUMBERS).methods
    folder = _emptied(DOCS / "methods", keep={"index.md", *(f"{m.name}.md" for m in methods)})
    for method, source, text in zip(methods, sources, printed, strict=True):
        if is_recorded := method.name in recorded:
            figure = gallery.pictures.sensitivity(NUMBERS, method.name)
            gallery.pictures.save(figure, folder / f"{method.name}.svg")
        page = method_page(method, source, text, has_picture=is_recorded)
        _update(folder / f"{method.name}.md", page)
    _update(folder / "index.md", "\n".join(_index()))
    _update(DOCS / "api.md", "\n".join(_api()))
    for notebook in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        place = _folder(DOCS / "notebooks") / notebook.name
        _update(place, notebook.read_text(encoding="utf-8"))
    drawn = _folder(DOCS / "gallery")
    gallery.draw(NUMBERS, drawn, formats=["png"])
    report = drawn / gallery.REPORT
    for name, text in gallery_pages(report.read_text(encoding="utf-8")).items():
        _update(drawn / f"{name}.md", text)


# One method -------------------------------------------------------------------------------------


def method_page(
    method: registry.Method, source: str, printed: str, *, has_picture: bool = True
) -> str:
    """The page of one method, in MyST Markdown.

    Args:
      method: its record.
      source: an example.
      printed: what the example prints; empty if it was not run.
      has_picture: whether the gallery was run with it.
    """
    return "\n".join([
        f"# {method.title}",
        "",
        f"`{_call(method)}`",
        "",
        *_table(("", ""), _facts(method)),
        "",
        *_reference(method),
        "## Defaults",
        "",
        *_table(("hyperparameter", "default", "kind"), _hyperparameters(method)),
        "",
        "## Example",
        "",
        "```python",
        source.rstrip(),
        "```",
        "",
        *(["prints", "", "```text", printed.rstrip(), "```", ""] if printed else []),
        *_sensitivity(method, has_picture=has_picture),
    ])  # fmt: skip


def _call(method: registry.Method) -> str:
    required = [
        name for name, parameter in method.hyperparameters.items()
        if parameter.default is inspect.Parameter.empty
    ]  # fmt: skip
    arguments = [f'"{method.name}"', *(f"{name}=…" for name in required)]
    return f"optgrad.create({', '.join(arguments)})"


def _facts(method: registry.Method) -> Iterator[tuple[str, str]]:
    title, page = FAMILIES[method.family]
    yield "update", method.equation
    yield "source", method.reference
    yield "family", f"[{title}](../{page}.md)"
    needs = sorted(method.needs)
    described = "; ".join(f"`{name}`: {registry.EXTRAS[name]}" for name in needs)
    yield "`update` needs beside the gradient", described or "nothing"
    yield "state", state_text(method)
    yield "cost of a step", cost_text(method)
    if method.tunes:
        name, low, high = method.tunes
        yield "tuned", f"`{name}`, in sweeps from {low:g} to {high:g}"
    else:
        yield "tuned", "nothing"
    if method.low_precision:
        yield "state in 16 bits", method.low_precision
    if method.evaluation_params:
        yield "evaluated at", "an average of iterates, `evaluated(state, params)` of the record"


def state_text(method: registry.Method) -> str:
    """Vectors of parameter size in the state, in words.

    Examples:
      >>> import optgrad
      >>> state_text(optgrad.get_method("ogr_full"))
      '3 + 2 D vectors of parameter size D'
    """
    if method.is_dense:
        constant = method.state_vectors(0)
        return (
            f"{constant:g} + {method.state_vectors(1) - constant:g} D vectors of parameter size D"
        )
    size = method.state_vectors(0)
    return f"{size:g} vector{'' if size == 1 else 's'} of parameter size" if size else "none"


def cost_text(method: registry.Method) -> str:
    """Gradient equivalents per step, in words."""
    unit = "gradient" if method.cost == 1 else "gradients"
    of = ", for 100 parameters" if method.is_dense and method.cost > 1 else ""
    return f"{method.cost:.3g} {unit}{of}"


def _hyperparameters(method: registry.Method) -> Iterator[tuple[str, str, str]]:
    for name, parameter in method.hyperparameters.items():
        default, empty = parameter.default, inspect.Parameter.empty
        if default is empty and name in method.published:
            shown = f"none (published: {method.published[name]!r})"
        else:
            shown = "required" if default is empty else f"`{_plain(default)}`"
        traced = "fixed when it is made" if name in method.static_args else "may be traced"
        yield f"`{name}`", shown, traced


def _plain(default: Any) -> str:
    return getattr(default, "__name__", None) or repr(default)


def _sensitivity(method: registry.Method, *, has_picture: bool) -> list[str]:
    if not has_picture:
        return ["## Sensitivity", "", "Not yet in the numbers that `optgrad gallery` recorded.", ""]
    what = (
        f"Excess loss against `{method.tunes.hyperparameter}`"
        if method.tunes
        else "Excess loss (there is nothing to tune)"
    )
    return [
        "## Sensitivity",
        "",
        f"![{what} on the gallery's landscapes]({method.name}.svg)",
        "",
        f"{what} on the landscapes of the [gallery](../gallery.md), which says how they were run. "
        "Two parameters are not a network: what was measured there is in the "
        "[results](../results/README.md).",
        "",
    ]


def _reference(method: registry.Method) -> list[str]:
    if method.family == "baselines":
        public = [_factory_name(method)]
    else:
        scale_by = [method.scale_by.__name__] if method.scale_by else []
        public = [f"optgrad.{name}" for name in (method.name, *scale_by)]
    # optax's own functions are documented by optax.
    public = list(filter(None, public))
    blocks = [f"```{{eval-rst}}\n.. autofunction:: {name}\n```\n" for name in public]
    return ["## Method", "", *(blocks or _by_optax(method))]


def _factory_name(method: registry.Method) -> str:
    """With its module, of a factory of ours."""
    home = getattr(method.factory, "__module__", "")
    return f"{home}.{method.factory.__name__}" if home.startswith("optgrad.") else ""


def _by_optax(method: registry.Method) -> list[str]:
    name = getattr(method.factory, "__name__", method.name)
    return [f"optax's own: [optax.{name}](https://optax.readthedocs.io/).", ""]


# Index and API ----------------------------------------------------------------------------------


def _index() -> Iterator[str]:
    yield "# Methods"
    yield ""
    yield "All that are registered; each page is written from the method's record and its code."
    yield "State in vectors of parameter size, cost in gradients per step."
    yield ""
    for family, (title, page) in FAMILIES.items():
        yield f"## {title}"
        yield ""
        if family != "baselines":
            yield f"The paper and what was measured: [guide](../{page}.md)."
            yield ""
        rows = (
            (f"[{m.name}]({m.name}.md)", m.title, ", ".join(sorted(m.needs - {"params"})) or "–",
             state_text(m).split(" vector")[0], f"{m.cost:.3g}")
            for m in optgrad.methods(family)
        )  # fmt: skip
        header = ("method", "what", "needs", "state", "cost")
        yield from _table(header, rows)
        yield ""
        yield from _toctree([f"{m.name} <{m.name}>" for m in optgrad.methods(family)])


def _api() -> Iterator[str]:
    yield "# API"
    yield ""
    yield "The methods themselves are on [pages of their own](methods/index.md), each with its"
    yield "direction `scale_by_…`. Everything here is a name of the package `optgrad`."
    yield ""
    for title, names in _GROUPS.items():
        yield f"## {title}"
        yield ""
        for name in names:
            is_class = inspect.isclass(getattr(optgrad, name))
            yield "```{eval-rst}"
            yield f".. {'autoclass' if is_class else 'autofunction'}:: optgrad.{name}"
            if is_class:
                yield "   :members:"
            yield "```"
            yield ""
    yield "## What update may take"
    yield ""
    yield "One vocabulary for all methods, `optgrad.registry.EXTRAS`; each page says what its"
    yield "method needs."
    yield ""
    yield from _table(
        ("argument", "what it is"), ((f"`{k}`", v) for k, v in registry.EXTRAS.items())
    )
    yield ""
    yield "## Problems and comparisons"
    yield ""
    yield "Of the package `optgrad.experiments` (extra `experiments`)."
    yield ""
    for name in ("Problem", "Score", "create_problem", "function_problem"):
        directive = "autoclass" if name[0].isupper() else "autofunction"
        yield "```{eval-rst}"
        yield f".. {directive}:: optgrad.experiments.{name}"
        yield "```"
        yield ""


# The gallery ------------------------------------------------------------------------------------


def gallery_pages(report: str) -> dict[str, str]:
    """The gallery's report as pages: one for each landscape, and ``report`` with all the rest."""
    link = f"[{INTERACTIVE}]({INTERACTIVE})"
    first, *sections = report.replace(link, f'<a href="../{INTERACTIVE}">{INTERACTIVE}</a>').split(
        "\n## "
    )
    names = {place.title: place.name for place in places().values()}
    found, rest = {}, [first]
    for section in sections:
        title = section.split("\n", 1)[0]
        if title in names:
            found[names[title]] = f"# {section}"
        else:
            rest.append(section)
    return {"report": "\n## ".join(rest), **found}


# Small things -----------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _toctree(entries: Sequence[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", "", *entries, "```", ""]


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def _emptied(path: Path, keep: set[str]) -> Path:
    """The folder, without pages of methods that are no more."""
    for old in _folder(path).iterdir():
        if old.name not in keep:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path


def _update(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _copy_interactive(app: Sphinx, error: Exception | None) -> None:
    """Beside the gallery's page, which shows it in a frame."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(DOCS / "gallery" / INTERACTIVE, Path(app.outdir) / INTERACTIVE)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the writing to the beginning of the build."""
    app.add_config_value("run_examples", default=True, rebuild="", types=bool)
    app.connect("builder-inited", _write)
    app.connect("build-finished", _copy_interactive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The documentation site: ``sphinx-build -W -j 2 docs build/site``.

Sphinx, because the docstrings are reStructuredText with mathematics, and because it checks every
reference between docstrings and pages (``nitpicky``); MyST-NB, because the guides are Markdown and
it executes the notebooks; furo, because it is quiet and readable at any width.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

import optgrad  # noqa: E402  after the path

project = "optgrad"
author = "The optgrad developers"
copyright = f"2026, {author}"
version = release = optgrad.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "checked_examples",
    "documented",
    "generated_pages",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = [
    "_build",
    "_extensions",
    "results/gallery/*",  # its pages are in gallery, with the pictures
]

html_theme = "furo"
html_title = f"optgrad {version}"
html_static_path = ["_static"]
html_css_files = ["optgrad.css"]
html_copy_source = False

# References: every name in single backticks of a docstring is one, and must be found.
nitpicky = True
default_role = "py:obj"
nitpick_ignore = [("py:class", "optgrad.training._Sources")]  # of an attribute, made by functions
nitpick_ignore_regex = [
    # Other packages' names, and Python's: their pages are on the network.
    (r"py:.*", r"(jax|jnp|jaxlib|optax|chex|flax|nnx|numpy|np|npt|equinox|optimistix)\b.*"),
    (r"py:.*", r"(collections|typing|pathlib|matplotlib|pydantic)\b.*"),
    (r"py:.*", r"GradientTransformationExtraArgs|TypeError|ValueError|KeyError|RuntimeError"),
]
add_module_names = False
autodoc_typehints = "none"  # arguments are described with their ranges in the text
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]

nb_execution_mode = "force"
nb_execution_timeout = 1800  # of a cell; the machine may be busy
nb_execution_raise_on_error = True
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

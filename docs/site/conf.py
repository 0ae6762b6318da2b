"""Sphinx's configuration of the documentation site: ``make docs`` builds build/site.

The source folder is the repository, so the links of its Markdown files serve on the site as they are.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "site")]

import dml_cuda  # noqa: E402

project = "dml_cuda"
author = "The dml_cuda authors"
project_copyright = f"2026, {author}"
version = release = dml_cuda.__version__.partition("+")[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "formulas",
    "navigation",
    "public_names",
    "source_links",
]

root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/*.md",
    "csrc/cuda/README.md",
    "docs/*.md",
    "docs/losses/*.md",
    "examples/README.md",
    "examples/recipes/README.md",
]
exclude_patterns = [".venv", "build", "docs/README.md"]  # the index of docs/ for readers of the files

nitpicky = True  # a broken reference is a warning, and -W makes it an error
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_param = napoleon_use_rtype = False  # several names may share a description
napoleon_custom_sections = [("Returns, Raises", "returns_style")]
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"dml_cuda {version}"
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

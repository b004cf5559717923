"""Sphinx: the guide is written by hand; the methods' pages and the evidence table come from the catalogue."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import comparisons
import pages

import telos

project = "telos"
author = "The telos authors"
release = version = telos.__version__
copyright = author

# straight quotes: claims and code are searched for as they are written
smartquotes = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "reference/*.inc", "reference/gallery"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"  # shapes and units stand in the docstrings
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
napoleon_use_rtype = False  # what is returned is described in words, with no type in front
python_maximum_signature_line_length = 90
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_title = "telos"
html_show_sourcelink = False
# only the reference has sections to list
html_sidebars = {page.stem: [] for page in Path(__file__).parent.glob("*.md")}
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}


def setup(app: Sphinx) -> None:
    """Writes ``reference/`` before Sphinx looks for its sources, and the gallery's reports beside its pages."""
    app.connect("builder-inited", _before)
    app.connect("build-finished", _after)


def _before(app: Sphinx) -> None:
    pages.write(Path(app.srcdir) / "reference")
    comparisons.write_excerpts(Path(app.srcdir) / "reference" / "gallery")


def _after(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        comparisons.write_reports(Path(app.outdir) / "comparisons")

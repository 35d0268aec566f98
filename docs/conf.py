"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(EXAMPLES))  # examples may share a helper

from diagrams import write_all
from gallery import first_cell
from pages import write_pages
from papers import link_papers
from sources import repair

project = "tnlm"
copyright = "the tnlm authors"
release = version = os.environ.get("TNLM_DOCS_VERSION") or installed_version("tnlm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
if find_spec("latex2mathml"):  # otherwise formulas need MathJax, and a network
    extensions.append("mathml")
    html_math_renderer = "mathml"

# Parts of pages, which other pages include, are no pages.
exclude_patterns = [
    "_build",
    "schemes",
    "_generated/schemes.md",
    "_generated/sizes.md",
    "_generated/headline.md",
    "_generated/gallery/*.ipynb",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
suppress_warnings = ["ref.python"]  # annotations name classes briefly, and two share a name
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = f"tnlm {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["tnlm.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "secondary_sidebar_items": {"index": [], "schemes_index": [], "**": ["page-toc"]},
}

# The published site has a menu of versions, which docs/versions.py writes; a local build has none.
if SITE := os.environ.get("TNLM_DOCS_URL"):
    html_theme_options |= {
        "switcher": {
            "json_url": f"{SITE}/switcher.json",
            "version_match": release,
        },
        "check_switcher": False,  # the file is written after the build
        "show_version_warning_banner": True,
        "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
    }

# The gallery runs its examples on tiny models, in a minute or two; later builds run what changed.
# Without running any: sphinx-build -D plot_gallery=0.
if (EXAMPLES / "README.rst").is_file():
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": str(EXAMPLES),
        "gallery_dirs": "_generated/gallery",
        "plot_gallery": True,
        "capture_repr": (),
        "filename_pattern": r"\.py$",
        "ignore_pattern": r"(__init__|tiny)\.py$",
        "within_subsection_order": "gallery.FirstOnTop",
        "first_notebook_cell": first_cell(EXAMPLES),
        "download_all_examples": False,
        "show_signature": False,
        "show_memory": False,
        "write_computation_times": False,
        "reset_modules": (),
        "min_reported_time": 10**6,
    }

write_all(HERE / "_generated" / "diagrams")
write_pages(HERE / "_generated")


def plain_types(_app: Any, documented: Any, _bound: bool) -> None:
    """Show a command's arguments by type alone, without typer's objects in the annotations."""
    if getattr(documented, "__module__", "").startswith("tnlm.cli"):
        documented.__annotations__ = get_type_hints(documented)


def setup(app: Any) -> None:
    app.connect("autodoc-before-process-signature", plain_types)
    app.connect("doctree-read", link_papers)
    app.connect("html-page-context", repair)

"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "tnlm"
copyright = "the tnlm authors"
release = version = installed_version("tnlm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = f"tnlm {release}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}

"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from pathlib import Path

from tnlm.schemes import schemes

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
exclude_patterns = ["_build", "_generated"]

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


def _write_scheme_table() -> None:
    """Write the table of schemes from the registry, for guide/schemes.md to include."""
    lines = ["| scheme | what it does | formats | metric | allocation | cascade | needs | source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, scheme in schemes().items():
        choices = [" or ".join(scheme.formats), scheme.metric, scheme.allocation, scheme.cascade]
        cells = [f"`{name}`", scheme.title, *choices, scheme.needs, scheme.source]
        lines.append("| " + " | ".join(cells) + " |")
    folder = Path(__file__).parent / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "schemes.md").write_text("\n".join(lines) + "\n")


_write_scheme_table()

"""Configuration of the documentation: ``sphinx-build -W docs docs/_build``. It needs neither network nor GPU."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "tests")]  # the page generators; the contract table

from lit_tricks import __version__  # noqa: E402

project = "lit_tricks"
author = "The lit_tricks contributors"
copyright = f"2026, {author}"  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "trick_pages",
]
exclude_patterns = ["_build", "_ext", "_generated", "Thumbs.db", ".DS_Store"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
# Cards are written in Markdown, with single backticks doubled as in reStructuredText.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports: list[str] = []

html_theme = "furo"
html_title = f"lit_tricks {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = ["filter.js"]
html_theme_options = {
    "source_repository": "https://github.com/lit-tricks/lit-tricks/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 10
linkcheck_retries = 2
linkcheck_ignore = [
    r"https://(github\.com/lit-tricks|lit-tricks\.github\.io)/",  # ours: tests/docs checks that the files exist
    r"https://(doi\.org|www\.jstor\.org)/",  # they reject scripts
]

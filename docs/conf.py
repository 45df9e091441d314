"""The documentation as a site: `sphinx-build -W -n docs docs/_build`.

A warning is an error, and a dead link is a warning.
"""

project = "orpo-lite"
copyright = "the orpo-lite authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "orpo-lite"
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them
myst_enable_extensions: list[str] = []

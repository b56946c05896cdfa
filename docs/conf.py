"""Configuration of Sphinx."""

import sqla_signals

project = "sqla_signals"
author = "The sqla_signals authors"
copyright = "2026, The sqla_signals authors"
version = release = sqla_signals.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"sqla_signals {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False

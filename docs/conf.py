"""How Sphinx builds the documentation: ``sphinx-build -W docs OUT``.

A link in the pages to a file outside docs/ leads to the same file in the repository.
"""

project = "captioner"
author = "The captioner authors"
extensions = ["myst_parser"]
exclude_patterns = ["README.md"]  # index.rst includes it
html_theme = "furo"
html_title = "captioner"
myst_heading_anchors = 3
nitpicky = True

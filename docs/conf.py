"""Sphinx settings: MyST Markdown, the Furo theme, and no network at build time."""

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _project["name"]
release = version = _project["version"]
author = "The fedllm authors"
copyright = "The fedllm authors, Apache-2.0"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
# Headings can be linked as on GitHub: errors.md#unknown_key.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"fedllm {release}"
html_extra_path = ["reference/job.schema.json", "reference/party.schema.json"]

"""How Sphinx builds the site (`make docs`): offline, and with warnings as errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import compress  # noqa: E402  (from this checkout)

project = "compress"
author = "The compress authors"
copyright = author
release = compress.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = []
smartquotes = False  # "global" is code as often as not
html_theme = "furo"
html_title = f"compress {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings: single backticks are a name of ours where there is one, and code where there is none.
default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autoclass_content = "both"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"


def escape(app, kind, name, thing, options, lines):
    """Docstrings have |w| for a magnitude and **arguments: neither is markup."""
    parts = re.split(r"(``.*?``)", "\n".join(lines), flags=re.S)
    parts[::2] = [re.sub(r"(\||\*\*(?=[a-z]))", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).replace("\\**", r"\*\*").split("\n")


def find(app, env, node, content):
    """A name in single backticks, found in whatever module it is; code where it is not just one."""
    if node.get("reftype") != "obj":
        return None
    python = env.domains.python_domain
    place = node.get("py:module"), node.get("py:class")
    matches = python.find_obj(env, *place, node["reftarget"], None, 1)
    matches = [name for name, found in matches if not found.aliased]
    if len(matches) != 1 or matches[0] == "compress":
        return content
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", matches[0], node, content)


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon
    app.connect("missing-reference", find)

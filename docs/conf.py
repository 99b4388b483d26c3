"""Configure Sphinx for the documentation: `make docs`."""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "docs"))
_setup = configparser.ConfigParser()
_setup.read(ROOT / "setup.cfg")

project = "passopt"
author = "the passopt contributors"
release = _setup["metadata"]["version"]

# `reference` is ours, in tools/docs: it writes the generated pages before a build.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
source_suffix = {".md": "markdown"}
# Pages that other pages include.
exclude_patterns = ["**/generated/**"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Where `console` output or ONNX text is no program that a lexer knows, it is shown without colours.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ModelLike": "ModelLike", "npt.ArrayLike": "ArrayLike", "Prompt": "Prompt"}
napoleon_use_ivar = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# Single backquotes in docstrings are code, as everywhere else, and -- stays what a shell needs.
default_role = "code"
smartquotes = False

html_theme = "furo"
html_title = f"passopt {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

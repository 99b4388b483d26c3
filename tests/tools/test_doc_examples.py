"""The examples of the documentation are held to what their pages show: a wrong page fails, and can be rewritten."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sybil")

from doc_examples.blocks import PageError, read_examples
from doc_examples.compare import same, updated

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "docs"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_page(tmp_path: Path) -> Run:
    """Run a page with the harness, as a project of its own; returns exit code, output and the page afterwards."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.append({str(TOOLS)!r})\npytest_plugins = ['doc_examples.plugin']\n"
    )
    page = tmp_path / "page.md"

    def run(text: str, *flags: str) -> tuple[int, str, str]:
        page.write_text(textwrap.dedent(text))
        command = [sys.executable, "-m", "pytest", "-q", *flags, page.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, page.read_text()

    return run


GOOD = """\
    # A page

    ```console
    $ mkdir there && cd there
    $ export WORD=seven
    ```

    ```{code-block} python
    :caption: numbers_here.py

    PRIMES = [2, 3, 5]
    ```

    ```console
    $ pwd
    …/there
    $ echo one; echo two >&2; \\
    > echo $WORD
    one
    …
    seven
    $ false
    $ echo $?
    1
    ```

    ```python
    import numbers_here

    total = sum(numbers_here.PRIMES)
    print(total)
    ```

    ```text
    10
    ```

    ```python
    >>> total
    10
    >>> total / 0
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    ```

    <!-- not run: it takes an accelerator -->
    ```console
    $ launch
    ```
"""


def test_a_true_page_passes_and_says_what_it_does_not_run(run_page: Run) -> None:
    code, output, _ = run_page(GOOD)
    assert code == 0, output
    assert "5 passed, 1 skipped" in output
    assert re.search(r"examples that are only shown.*\npage.md:\d+: it takes an accelerator", output)


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("    seven\n", "    eight\n", "-eight"),
        ("    $ echo $?\n    1\n", "", "ended with exit code 1"),
        ("    ```text\n    10\n", "    ```text\n    11\n", "-11"),
        (">>> total\n    10\n", ">>> total\n    12\n", "-12"),
        ("import numbers_here\n", "import nothing_here\n", "No module named 'nothing_here'"),
        ("not run: it takes an accelerator", "not run:", "needs a reason"),
        ("not run: it takes an accelerator", "not run", "needs a reason"),
        ("    ```python\n    import", "    ```toml\n    import", "runs nowhere"),
    ],
)
def test_a_wrong_page_fails(run_page: Run, right: str, wrong: str, complaint: str) -> None:
    assert right in GOOD
    code, output, _ = run_page(GOOD.replace(right, wrong))
    assert code == 1
    assert complaint in output


def test_update_docs_writes_what_was_printed_and_keeps_ellipses(run_page: Run) -> None:
    wrong = GOOD.replace("    seven\n", "    seven\n    eight\n").replace(
        "    ```text\n    10\n", "    ```text\n    11\n"
    )
    wrong = wrong.replace("    10\n    >>>", "    12\n    >>>")
    code, output, page = run_page(wrong, "--update-docs")
    assert code == 0, output
    assert page == textwrap.dedent(GOOD)


def test_a_page_gets_what_it_needs(run_page: Run) -> None:
    page = "---\nneeds: checkpoint-alibi\n---\n\n```console\n$ ls\ncheckpoint-alibi\n```\n"
    code, output, _ = run_page(page)
    assert code == 0, output
    code, output, _ = run_page(page.replace("needs: checkpoint-alibi", "needs: the-moon"))
    assert code == 1
    assert "needs: the-moon: expected checkpoint-alibi" in output


@pytest.mark.slow
def test_what_a_page_installs_stays_in_the_page(run_page: Run) -> None:
    project = '[project]\nname = "of-this-page"\nversion = "1"\n[tool.setuptools]\npy-modules = []\n'
    page = f"<!-- file: pyproject.toml -->\n```toml\n{project}```\n\n```console\n$ pip install --quiet .\n```\n\n"
    show = "```python\n>>> import importlib.metadata\n>>> importlib.metadata.version('of-this-page')\n'1'\n```\n"
    code, output, _ = run_page(page + show)
    assert code == 0, output
    code, output, _ = run_page(show)
    assert code == 1
    assert "PackageNotFoundError" in output


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\nd\n", "a\nd\n", True),
        ("a\n…\nd\n", "a\nb\n", False),
        ("took … s\n", "took 1.5 s\n", True),
        ("took … s\n", "took 1.5 s\nand more\n", False),
        ("name    …      ok\n", "name  1.5e-07  ok\n", True),
        ("a.b\n", "axb\n", False),
        ("", "", True),
        ("", "a\n", False),
        ("a  \n", "a\n\n", True),
        ("rule (fuse.py:31); x=1\n", "rule (fuse.py:32); x=1\n", True),
        ("module.py:182-195\n", "module.py:9\n", True),
        ("rule (fuse.py:31); x=1\n", "rule (fuse.py:31); x=2\n", False),
        ("rule (fuse.py:31)\n", "rule (swap.py:31)\n", False),
    ],
)
def test_what_counts_as_the_same(shown: str, printed: str, expected: bool) -> None:
    assert same(shown, printed) is expected


def test_an_updated_output_keeps_the_lines_that_hold() -> None:
    assert updated("took … s\nold\n…\nend\n", "took 2 s\nnew\nmore\nend\n") == "took … s\nnew\nmore\nend\n"
    assert updated("took … s\n…\nend\nold\n", "took 2 s\nmore\nend\nnew\n") == "took … s\n…\nend\nnew\n"


def test_blocks_that_nothing_runs_are_refused() -> None:
    with pytest.raises(PageError, match="line 3: a block of no language runs nowhere"):
        read_examples("# Title\n\n```\nwhat is this\n```\n")
    with pytest.raises(PageError, match="line 2: a block begins at the first column"):
        read_examples("- item\n  ```console\n  $ true\n  ```\n")


def test_directives_are_text() -> None:
    assert read_examples("```{toctree}\nstart\n```\n\n```{mermaid}\ngraph LR\n```\n") == []

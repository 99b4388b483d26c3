"""Extend pytest by the fixtures `check_pass` and `golden`, the option --update-golden, and tests in `*.onnxtxt` files.

pytest finds this plugin by the entry point of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import onnx_ir

    from passopt.passes.framework.base import Pass
    from passopt.passes.framework.records import PassResult


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --update-golden."""
    group = parser.getgroup("passopt")
    group.addoption("--update-golden", action="store_true", help="write golden texts instead of comparing them")


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    """Collect `.onnxtxt` files with `# RUN:` lines as tests; see `passopt.testing.filecheck`."""
    if file_path.suffix != ".onnxtxt":
        return None
    from passopt.testing.filecheck import FilecheckFile

    return FilecheckFile.from_parent(parent, path=file_path)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with tests/golden/<file>/<test>.txt; a missing golden fails and says how to make it."""
    path = _golden_path(Path(request.path), request.node.name)
    command = f"pytest '{request.node.nodeid}' --update-golden"
    update = bool(request.config.getoption("--update-golden"))

    def compare(text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden text {path}; look at the result, then make it with:\n  {command}", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"differs from {path}; if that is intended:\n  {command}"

    return compare


@pytest.fixture
def check_pass(golden: Callable[[str], None]) -> Callable[..., tuple[onnx_ir.Model, PassResult]]:
    """Run a pass over ONNX text with every check of `passopt.testing.checking.check`, then compare the golden text."""
    from passopt.ir.serialization.text import print_model
    from passopt.testing.checking import check

    def run(item: Pass, text: str, **settings: object) -> tuple[onnx_ir.Model, PassResult]:
        model, result = check(item, text, **settings)  # type: ignore[arg-type]
        golden(print_model(model))
        return model, result

    return run


def _golden_path(test: Path, name: str) -> Path:
    root = next((parent for parent in test.parents if parent.name == "tests"), test.parent)
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return root / "golden" / test.stem / f"{safe}.txt"

"""The docstring gate: a documented function passes, and each thing that may be missing is named."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools/dev"


@pytest.fixture
def docstrings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import docstrings

    return docstrings


def documented(width: int, *rest: str, strict: bool = False, **more: Any) -> str:
    """Join texts to one of a certain width.

    Args:
        width: The width.
        *rest: The texts.
        strict: Refuse what does not fit.
        **more: Passed on.

    Returns:
        The text.

    Raises:
        ValueError: It does not fit.
    """
    raise ValueError(width)


def returns_by_its_first_sentence() -> int:
    """Return a number."""
    return 1


def test_a_documented_function_passes(docstrings: ModuleType) -> None:
    assert not list(docstrings.problems(documented, "documented"))
    assert not list(docstrings.problems(returns_by_its_first_sentence, "short"))


def test_every_missing_part_is_named(docstrings: ModuleType) -> None:
    def bare(width, *rest) -> int:  # type: ignore[no-untyped-def]
        """does things"""
        if width:
            raise KeyError(width)
        return 1

    assert list(docstrings.problems(bare, "bare")) == [
        "bare: the docstring does not begin with a sentence: 'does things'",
        "bare: the argument width is not in Args",
        "bare: the argument *rest is not in Args",
        "bare: what it returns is not in Returns",
        "bare: it raises KeyError, which is not in Raises",
    ]


def test_no_docstring_at_all_is_one_problem(docstrings: ModuleType) -> None:
    def empty(width: int) -> int:
        return width

    assert list(docstrings.problems(empty, "empty")) == ["empty: has no docstring"]


def test_what_an_inner_function_raises_is_its_own_business(docstrings: ModuleType) -> None:
    def outer() -> None:
        """Do something."""

        def inner() -> None:
            raise KeyError(1)

        inner()

    assert not list(docstrings.problems(outer, "outer"))


def test_classes_document_fields_methods_and_properties(docstrings: ModuleType) -> None:
    @dataclasses.dataclass
    class Pair:
        """Two numbers.

        Attributes:
            one: The first.
        """

        one: int
        other: int
        _hidden: int = 0

        @property
        def total(self) -> int:
            return self.one + self.other

        def scaled(self, factor: int) -> int:
            """Return the sum, scaled."""
            return self.total * factor

    assert list(docstrings.problems(Pair, "Pair")) == [
        "Pair: the field other is not in Attributes",
        "Pair.scaled: the argument factor is not in Args",
        "Pair.total: has no docstring",
    ]


def test_an_override_inherits_its_docstring(docstrings: ModuleType) -> None:
    class Base:
        """Say something."""

        def text(self) -> str:
            """Return the text."""
            return ""

    class Derived(Base):
        """Say something else."""

        def text(self) -> str:
            return "x"

    assert not list(docstrings.problems(Derived, "Derived"))


def test_a_class_that_users_do_not_call_documents_no_arguments(docstrings: ModuleType) -> None:
    class Made:
        """A thing. Use `make` instead of calling this class."""

        def __init__(self, inside: int) -> None:
            self.inside = inside

    assert not list(docstrings.problems(Made, "Made"))


def test_constants_have_a_comment(docstrings: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constants_of_a_test.py").write_text("#: So many.\nGOOD = 1\n\nBAD = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("constants_of_a_test")
    assert not list(docstrings.problems(module.GOOD, "m.GOOD", module))
    assert list(docstrings.problems(module.BAD, "m.BAD", module)) == [
        "m.BAD: a constant without a comment `#:` above it"
    ]


def test_the_faces_of_passopt_are_documented(docstrings: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    code = docstrings.main()
    assert (code, capsys.readouterr().out) == (0, "")

"""The drift matrix: what it expects is from configurations, and nothing that is missed or failed passes for right."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "tools" / "docs"


@pytest.fixture
def drift(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    import drift

    return drift


@pytest.mark.parametrize(
    ("family", "norms", "rotary"),
    [("llama", 5, 4), ("qwen3", 9, 4), ("gemma2", 9, 4), ("gpt-neox", 0, 4), ("bloom", 0, 0), ("baichuan2-13b", 5, 0)],
)
def test_expected_counts(drift: ModuleType, family: str, norms: int, rotary: int) -> None:
    assert drift.Row(family, "merged").expected == {"norms": norms, "rotary": rotary, "attention": 2}


def cell(drift: ModuleType, **changes: Any) -> Any:
    found = {"norms": 5, "rotary": 4, "attention": 2}
    facts = {"row": drift.Row("llama", "merged"), "exporter": "dynamo", "opset": 18, "attention": "eager"}
    return drift.Cell(**{**facts, "found": found, "error": 1e-7, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"found": {"norms": 5, "rotary": 4, "attention": 0}}, "✗ 5/5 4/4 0/2 1e-07"),
        ({"found": {"norms": 5, "rotary": 5, "attention": 2}}, "✗ 5/5 5/4 2/2 1e-07"),
        ({"error": 2e-5}, "✗ 5/5 4/4 2/2 2e-05"),
        ({"error": None}, "✗ 5/5 4/4 2/2 not finite"),
        ({"found": {}, "error": None, "reason": "export: cannot be traced"}, "✗ failed"),
    ],
)
def test_what_is_wrong_is_marked(drift: ModuleType, changes: dict[str, Any], text: str) -> None:
    wrong = cell(drift, **changes)
    assert not wrong.ok
    assert wrong.text() == text


def test_what_is_right_or_cannot_be_made_is_not(drift: ModuleType) -> None:
    assert cell(drift).ok
    absent = cell(drift, found={}, error=None, made=False, reason="its class has no sdpa attention")
    assert (absent.ok, absent.text()) == (True, "–")


def test_every_family_that_export_takes_has_a_row(drift: ModuleType) -> None:
    from passopt.testing.families import CONFIGS

    assert {row.family for row in drift.rows([])} == {*CONFIGS, "baichuan2-7b", "baichuan2-13b"}


def test_unknown_family_is_refused(drift: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"no family rwkv; there are llama"):
        drift.rows(["rwkv"])


def test_a_row_that_dies_is_a_row_of_failures(drift: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ROOT", Path("/nowhere"))
    cells = list(drift.run_row(drift.Row("gemma2", "merged"), ""))
    assert [found.made for found in cells].count(True) == len(drift.EXPORTS)
    assert all(found.reason.startswith("process: ") and not found.ok for found in cells if found.made)

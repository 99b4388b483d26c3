"""No link of the documentation leads nowhere, and the check would notice."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "docs"


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return pytest.importorskip("links")


def test_every_local_link_leads_somewhere(links: ModuleType) -> None:
    broken = [message for page in links.pages() for message in links.broken_links(page)]
    assert not broken, "\n".join(broken)


def test_broken_links_are_found(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Some `code` here\n\n(named)=\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#some-code-here) [c](other.md#named) [d](other.md#twice-1) [e](https://x.org/y)\n\n"
        "| table |\n| --- |\n| [f](gone.md) |\n\n![g](gone.svg)\n\n[h](other.md#gone) [i](#gone)\n"
    )
    assert [message.split(": ", 1)[1] for message in links.broken_links(page)] == [
        "gone.md: no such file",
        "gone.svg: no such file",
        "other.md#gone: other.md has no such heading",
        "#gone: page.md has no such heading",
    ]

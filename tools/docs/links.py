"""Check that every local link and picture of the documentation leads to a file, and every anchor to a heading.

python tools/docs/links.py      (README.md, CONTRIBUTING.md and docs/**/*.md; exit code 1 if a link is broken)
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
_EXPLICIT = re.compile(r"^\(([\w-]+)\)=\s*$", re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages whose links are checked."""
    return [path for path in (root / "README.md", root / "CONTRIBUTING.md") if path.exists()] + sorted(
        (root / "docs").rglob("*.md")
    )


def broken_links(page: Path) -> list[str]:
    """Return one message for each link of a page that leads nowhere."""
    return [message for line, target in _links(page) if (message := _problem(page, line, target))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its headings as GitHub names them, and those that it names itself."""
    text = page.read_text(encoding="utf-8")
    found: set[str] = set(_EXPLICIT.findall(text))
    tokens = MarkdownIt("commonmark").parse(text)
    for opening, content in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            slug = _slug(_plain(content))
            found.add(
                slug if slug not in found else next(f"{slug}-{n}" for n in range(1, 99) if f"{slug}-{n}" not in found)
            )
    return found


def _problem(page: Path, line: int, target: str) -> str:
    path, _, anchor = target.partition("#")
    file = (page.parent / unquote(path)).resolve() if path else page
    if not file.exists():
        return f"{page}:{line}: {target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{page}:{line}: {target}: {file.name} has no such heading"
    return ""


def _links(page: Path) -> Iterator[tuple[int, str]]:
    """Line and target of every local link."""
    for block in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        line = (block.map or [0])[0] + 1
        for token in block.children or ():
            target = token.attrs.get("href") or token.attrs.get("src")
            if target and not _ELSEWHERE.match(str(target)):
                yield line, str(target)


def _plain(content: Token) -> str:
    return "".join(token.content for token in content.children or () if token.type in ("text", "code_inline"))


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def main() -> int:
    """Print the broken links; return 1 if there are any."""
    found = [message for page in pages() for message in broken_links(page)]
    print("\n".join(found) or f"links of {len(pages())} pages: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write pictures as plain SVG: text stays text, no font is loaded, and a light panel is readable on any page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Literal

Point = tuple[float, float]
Tone = Literal["plain", "folder", "new", "old", "weight", "value", "quiet"]

#: Fill, border and text of each tone.
TONES: dict[Tone, tuple[str, str, str]] = {
    "plain": ("#ffffff", "#8a94a6", "#1f2733"),
    "folder": ("#e8eef8", "#4a6fa5", "#1b3559"),
    "new": ("#e3f3e6", "#3d8b4f", "#1c4a28"),
    "old": ("#fdf0e4", "#c47a2c", "#6b3d0d"),
    "weight": ("#f1ecf9", "#7a5bb0", "#402a6b"),
    "value": ("#f3f4f6", "#b3bac5", "#3d4654"),
    "quiet": ("#f8f8f6", "#d5d8dd", "#596373"),
}
_PANEL, _LINE, _INK = "#fcfcfa", "#6b7686", "#1f2733"
SIZE = 13.0
_FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def width_of(text: str, size: float = SIZE) -> float:
    """Return about how wide a text is, a little more than it needs.

    Args:
        text: One line.
        size: The size of its letters.
    """
    return sum(0.33 if letter in "iljtf.,:;|'() " else 0.74 if letter.isupper() else 0.62 for letter in text) * size


class Picture:
    """A picture that is drawn piece by piece.

    Args:
        title: What it shows, for readers that cannot see it.
        width: Its width in pixels.
        height: Its height.
    """

    def __init__(self, title: str, width: float, height: float) -> None:
        self._title = title
        self._size = (width, height)
        self._pieces: list[str] = []

    def box(
        self, middle: Point, size: Point, lines: Sequence[str], tone: Tone = "plain", *, round_: float = 5.0
    ) -> None:
        """Draw a box with centred text.

        Args:
            middle: Its middle.
            size: Its width and height.
            lines: The text, whose first line is bold if there are several.
            tone: Its colours.
            round_: The radius of its corners.
        """
        fill, border, ink = TONES[tone]
        left, top = middle[0] - size[0] / 2, middle[1] - size[1] / 2
        self._pieces.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="{round_:g}" '
            f'fill="{fill}" stroke="{border}" stroke-width="1.2"/>'
        )
        first = middle[1] - (len(lines) - 1) * SIZE * 0.62
        for index, line in enumerate(lines):
            small = bool(index)
            self.text(
                (middle[0], first + index * SIZE * 1.24),
                line,
                size=SIZE - 1.5 if small else SIZE,
                ink=ink,
                bold=not small and len(lines) > 1,
            )

    def text(
        self,
        middle: Point,
        text: str,
        *,
        size: float = SIZE,
        ink: str = _INK,
        bold: bool = False,
        anchor: Literal["start", "middle", "end"] = "middle",
    ) -> None:
        """Write one line.

        Args:
            middle: Where it stands; its height is centred there.
            text: The line.
            size: The size of its letters.
            ink: Its colour.
            bold: Whether it is bold.
            anchor: Which end of the line `middle` is.
        """
        weight = ' font-weight="600"' if bold else ""
        self._pieces.append(
            f'<text x="{middle[0]:.1f}" y="{middle[1] + size * 0.35:.1f}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{ink}"{weight}>{html.escape(text)}</text>'
        )

    def panel(self, corner: Point, size: Point, tone: Tone = "quiet") -> None:
        """Draw a large box behind others.

        Args:
            corner: Its upper left corner.
            size: Its width and height.
            tone: Its colours.
        """
        fill, border, _ = TONES[tone]
        self._pieces.append(
            f'<rect x="{corner[0]:.1f}" y="{corner[1]:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="8" '
            f'fill="{fill}" stroke="{border}"/>'
        )

    def arrow(self, points: Sequence[Point], *, wide: bool = False) -> None:
        """Draw a curve with a head at its last point.

        Args:
            points: Where it passes.
            wide: Draw it as one of a few main ones.
        """
        path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if abs(x1 - x0) < 0.5 or abs(y1 - y0) < 0.5:
                path += f" L{x1:.1f},{y1:.1f}"
            else:
                bend = (y0 + y1) / 2
                path += f" C{x0:.1f},{bend:.1f} {x1:.1f},{bend:.1f} {x1:.1f},{y1:.1f}"
        width = 2.0 if wide else 1.2
        self._pieces.append(
            f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="{width:g}" marker-end="url(#head)"/>'
        )

    def line(self, start: Point, end: Point, *, ink: str = _LINE, width: float = 1.0, dashes: str = "") -> None:
        """Draw a straight line.

        Args:
            start: One end.
            end: The other end.
            ink: Its colour.
            width: Its width.
            dashes: The lengths of dashes and gaps, such as "4 3"; "" for a line without gaps.
        """
        gaps = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._pieces.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{ink}" '
            f'stroke-width="{width:g}"{gaps}/>'
        )

    def dot(self, middle: Point, radius: float, ink: str) -> None:
        """Draw a filled circle.

        Args:
            middle: Its middle.
            radius: Its radius.
            ink: Its colour.
        """
        self._pieces.append(f'<circle cx="{middle[0]:.1f}" cy="{middle[1]:.1f}" r="{radius:g}" fill="{ink}"/>')

    def svg(self) -> str:
        """Return the picture as a file."""
        width, height = self._size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
                f'height="{height:.0f}" role="img" aria-label="{html.escape(self._title, quote=True)}" '
                f'font-family="{_FAMILY}">',
                f"<title>{html.escape(self._title)}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7.2" refY="4" markerWidth="8" markerHeight="8" '
                f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0.6 L8,4 L0,7.4 z" fill="{_LINE}"/></marker>'
                "</defs>",
                f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="{_PANEL}"/>',
                *self._pieces,
                "</svg>",
                "",
            ]
        )

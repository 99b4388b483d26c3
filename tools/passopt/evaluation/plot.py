"""Draw divergence from the reference against the bytes of the weights, one panel for each text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from passopt.predictions.standard_errors import Estimate
from passopt.reporting.svg import Picture, Point, width_of

_WIDTH, _HEIGHT = 760.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, 28.0, 76.0, 62.0
_INK, _GRID, _BAR = "#4a6fa5", "#e3e6ea", "#8fa7c8"
_SMALL = 11.5
#: Models that differ in nothing have no logarithm; they stand on the lowest line.
_LEAST = 1e-9
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


@dataclasses.dataclass(frozen=True)
class Spot:
    """A model in a panel: its name, the bytes of its weights, and its mean divergence from the reference in nats."""

    name: str
    weight_bytes: int
    kl: Estimate


@dataclasses.dataclass(frozen=True)
class Panel:
    """What a panel shows: a line about the text, the reference, and the other models."""

    text: str
    reference: Spot
    spots: Sequence[Spot]


def draw_plot(panels: Sequence[Panel]) -> str:
    """Return an SVG picture of panels, one below the other; bars reach one standard error up and down."""
    first = panels[0]
    names = ", ".join(spot.name for spot in first.spots)
    title = f"KL divergence from {first.reference.name} against the bytes of the weights: {names}"
    picture = Picture(title, _WIDTH, _HEIGHT * len(panels))
    for index, panel in enumerate(panels):
        _Drawing(picture, panel, _HEIGHT * index).draw()
    return picture.svg()


class _Drawing:
    """One text: a logarithmic axis of divergence, and a linear one of bytes that begins with 0."""

    def __init__(self, picture: Picture, panel: Panel, offset: float) -> None:
        self._picture = picture
        self._panel = panel
        self._reference = panel.reference
        self._offset = offset
        kls = [spot.kl for spot in panel.spots]
        tops = [kl.value + _finite(kl.error) for kl in kls]
        floors = [max(kl.value - _finite(kl.error), kl.value / 3) for kl in kls]
        self._low = math.floor(math.log10(max(min(floors), _LEAST)))
        self._high = max(math.ceil(math.log10(max(max(tops), _LEAST))), self._low + 1)
        largest = max(spot.weight_bytes for spot in (panel.reference, *panel.spots))
        self._unit, self._unit_name = next(unit for unit in _UNITS if largest >= unit[0] or unit[0] == 1)
        self._step = _nice(largest / self._unit / 5)
        self._most = math.ceil(largest * 1.02 / self._unit / self._step) * self._step * self._unit

    def draw(self) -> None:
        """Draw axes, the reference's bytes, and a point for each other model."""
        self._head()
        self._axes()
        taken: list[tuple[float, float, float, float]] = []
        for spot in sorted(self._panel.spots, key=lambda spot: -spot.kl.value):
            self._spot(spot, taken)

    def _head(self) -> None:
        title = f"KL divergence from {self._reference.name} against the bytes of the weights"
        self._picture.text((_WIDTH / 2, self._offset + 22), title, bold=True)
        words = f"{self._panel.text}; bars: ± one standard error"
        self._picture.text((_WIDTH / 2, self._offset + 42), words, size=_SMALL)

    def _x(self, size: float) -> float:
        return _LEFT + size / self._most * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, kl: float) -> float:
        height = _HEIGHT - _TOP - _BOTTOM
        share = (math.log10(max(kl, 10.0**self._low)) - self._low) / (self._high - self._low)
        return self._offset + _TOP + height * (1 - share)

    def _axes(self) -> None:
        left, right, floor = _LEFT, _WIDTH - _RIGHT, self._offset + _HEIGHT - _BOTTOM
        for exponent in range(self._low, self._high + 1):
            height = self._y(10.0**exponent)
            self._picture.line((left, height), (right, height), ink=_GRID)
            self._picture.text((left - 8, height), f"{10.0**exponent:g}", size=_SMALL, anchor="end")
        for number in range(round(self._most / self._unit / self._step) + 1):
            size = number * self._step
            self._picture.text((self._x(size * self._unit), floor + 16), f"{size:g}", size=_SMALL)
        self._picture.line((left, floor), (right, floor))
        self._picture.line((left, self._offset + _TOP), (left, floor))
        self._picture.text(((left + right) / 2, floor + 38), f"weights, {self._unit_name}", size=_SMALL)
        self._picture.text((left, self._offset + _TOP - 16), "mean KL, nats", size=_SMALL, anchor="end")
        place = self._x(self._reference.weight_bytes)
        self._picture.line((place, self._offset + _TOP), (place, floor), ink=_BAR, dashes="4 4")
        words = f"{self._reference.name}, the reference"
        near_end = place + width_of(words, _SMALL) + 6 > right
        where = (place - 6 if near_end else place + 6, self._offset + _TOP + 8)
        self._picture.text(where, words, size=_SMALL, ink=_INK, anchor="end" if near_end else "start")

    def _spot(self, spot: Spot, taken: list[tuple[float, float, float, float]]) -> None:
        kl = spot.kl
        x, y, error = self._x(spot.weight_bytes), self._y(kl.value), _finite(kl.error)
        if error:
            self._picture.line((x, self._y(kl.value + error)), (x, self._y(kl.value - error)), ink=_BAR, width=2.5)
        self._picture.dot((x, y), 5, _INK)
        width = width_of(spot.name, _SMALL)
        anchor: Point = _free_place((x, y), width, taken)
        self._picture.text(anchor, spot.name, size=_SMALL, anchor="start")


def _free_place(point: Point, width: float, taken: list[tuple[float, float, float, float]]) -> Point:
    """Return where a name of this width begins, beside its point and on no other name if there is such a place."""
    right = point[0] + 10 + width <= _WIDTH - 4
    left = point[0] + 10 if right else point[0] - 10 - width
    box = (left, point[1] - 7, left + width, point[1] + 7)
    for shift in (0.0, 15.0, -15.0, 30.0, -30.0):
        box = (left, point[1] + shift - 7, left + width, point[1] + shift + 7)
        if not any(_overlap(box, other) for other in taken):
            break
    taken.append(box)
    return box[0], box[1] + 7


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _finite(number: float) -> float:
    return number if math.isfinite(number) else 0.0


def _nice(step: float) -> float:
    """Return a round number that is not below a step: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(step, 1e-12)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)

"""Count the work of a calibration, in parts of its pieces, for a progress bar that tells the time left."""

from __future__ import annotations

from collections.abc import Callable

from passopt.calibration.targets import Target

#: The steps of a progress bar for each piece.
STEPS = 100


def flops_of_linear(target: Target, tokens: int) -> float:
    """Return what the product of tokens with a weight takes."""
    count, width = target.weight.shape
    return 2.0 * tokens * count * width


def flops_of_gram(width: int, tokens: int) -> float:
    """Return what the upper triangle of a sum of x xᵀ takes."""
    return float(tokens) * width * width


def flops_of_factor(width: int) -> float:
    """Return what the factor of a Hessian and its inverse take: a third of k³ multiplications and additions each."""
    return 2.0 / 3 * width**3


def flops_of_codes(target: Target) -> float:
    """Return what it takes to spread the errors of all columns over later ones."""
    count, width = target.weight.shape
    return float(count) * width * width


class Meter:
    """Tells a progress bar of the work that was done; every piece counts the same.

    Args:
        open_bar: Makes a function that takes steps, for a number of all steps and of those that were done before.
    """

    def __init__(self, open_bar: Callable[[int, int], Callable[[int], None]] | None = None) -> None:
        self._open_bar = open_bar
        self._bar: Callable[[int], None] = lambda steps: None
        self._total = self._done = 0.0
        self._shown = 0

    def begin(self, pieces: int, done: int) -> None:
        """Begin with a number of pieces, of which some were finished by an earlier run."""
        if self._open_bar is not None:
            self._bar = self._open_bar(pieces * STEPS, done * STEPS)

    def plan(self, work: float) -> None:
        """Say how much work the next piece is."""
        self._total, self._done, self._shown = work, 0.0, 0

    def add(self, work: float) -> None:
        """Count work of this piece."""
        self._done += work
        steps = min(int(STEPS * self._done / self._total), STEPS) if self._total else 0
        if steps > self._shown:
            self._bar(steps - self._shown)
            self._shown = steps

    def end_piece(self) -> None:
        """Count what is left of this piece."""
        self._bar(STEPS - self._shown)
        self._total, self._shown = 0.0, 0

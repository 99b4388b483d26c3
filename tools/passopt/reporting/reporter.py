"""Define who is told about an operation while it runs: by messages, by texts to look at, and by progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol


class Bar(Protocol):
    """A progress bar for one long piece of work; call it with the bytes or items that were done since the last call."""

    def __call__(self, count: int) -> None: ...

    def close(self) -> None:
        """End the bar, whether the work succeeded or not."""


class Reporter:
    """A reporter that ignores everything; the command line has one that writes to stderr."""

    def say(self, message: str) -> None:
        """Take a message for people, such as a warning or what is being done now.

        Args:
            message: One line, without a final period.
        """

    def show(self, text: str) -> None:
        """Take a text that was asked for, such as a graph after a pass.

        Args:
            text: Many lines, with the last line break.
        """

    def bar(self, label: str, total: int, *, in_items: bool = False) -> Bar:
        """Return a bar for one long piece of work. It is called with what was done since, and closed at the end.

        Args:
            label: What the bar is of.
            total: The size of the work: bytes, or items.
            in_items: True if `total` counts items.
        """
        return _NoBar()


class _NoBar:
    """A progress bar that shows nothing."""

    def __call__(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


#: The reporter of operations for which none is named.
SILENT = Reporter()


@contextlib.contextmanager
def progress_bar(
    reporter: Reporter, label: str, total: int, *, in_items: bool = False
) -> Iterator[Callable[[int], None]]:
    """Open a progress bar for the time of a block, and close it also if the block raises."""
    bar = reporter.bar(label, total, in_items=in_items)
    try:
        yield bar
    finally:
        bar.close()

"""Report to people at a terminal: messages on stderr, and a progress bar if stderr is a terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from passopt.reporting.reporter import Reporter
from passopt.terminal.progress import Progress

if TYPE_CHECKING:
    from passopt.ir.weights.streaming.write_weights import StreamReport

#: Writes of fewer bytes than this are so short that no report about them is worth a line.
_REPORTED_FROM = 64 << 20


class Console(Reporter):
    """A reporter that writes everything to stderr; messages begin with the name of the command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def say(self, message: str) -> None:
        print(f"passopt {self._command}: {message}", file=sys.stderr)

    def show(self, text: str) -> None:
        print(text, end="", file=sys.stderr)

    def bar(self, label: str, total: int, *, in_items: bool = False) -> Progress:
        return Progress(label, total, in_items=in_items)

    def say_stream(self, report: StreamReport | None) -> None:
        """Report how the weights were written, unless there were so few that it took no time."""
        if report is not None and report.written + report.resumed >= _REPORTED_FROM:
            self.say(report.to_text())


def print_json(body: Any, **settings: Any) -> None:
    """Print a result as JSON on stdout, for programs to read; `settings` go to `json.dumps`."""
    print(json.dumps(body, **{"indent": 2, **settings}))

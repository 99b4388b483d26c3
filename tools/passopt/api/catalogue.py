"""List all passes and named pipelines: `passopt.list_passes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from passopt.passes.framework.catalog import catalog
from passopt.passes.framework.source_entries import Entry
from passopt.passes.pipeline.named import PIPELINES, Pipeline
from passopt.reporting.result import Result


@dataclasses.dataclass(frozen=True, repr=False)
class Catalogue(Result):
    """All passes and named pipelines by name, as their sources describe them; none of them is imported.

    Attributes:
        passes: Name → what the source of the pass says: summary, options, accuracy, and where it is defined.
        pipelines: Name → summary, steps, options and expectations.
    """

    passes: Mapping[str, Entry]
    pipelines: Mapping[str, Pipeline]

    def to_text(self) -> str:
        lines = ["passes"]
        for entry in self.passes.values():
            settings = ",".join(f"{name}={default}".lower() for name, _, default in entry.options)
            accuracy = f"  ({entry.accuracy})" if entry.accuracy else ""
            lines += [f"  {entry.name}{f'{{{settings}}}' if settings else ''}{accuracy}", f"      {entry.summary}"]
        lines.append("pipelines")
        for name, item in self.pipelines.items():
            settings = ",".join(f"{key}={value}" for key, value in item.options.items())
            steps = ", ".join(item.steps)
            lines += [f"  {name}{f'{{{settings}}}' if settings else ''} = {steps}", f"      {item.summary}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        passes = [dataclasses.asdict(entry) for entry in self.passes.values()]
        pipelines = [{"name": name, **dataclasses.asdict(item)} for name, item in self.pipelines.items()]
        return {"passes": passes, "pipelines": pipelines}


def list_passes() -> Catalogue:
    """List all passes and pipelines, those of installed packages too.

    Returns:
        The passes and pipelines by name. A plug-in that cannot be used is left out with a PluginWarning.
    """
    return Catalogue(catalog(), PIPELINES)

"""Take pipelines as operations get them: as text, as one pass, or as a list of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from passopt.ir.errors import UsageError
from passopt.passes.framework.base import Pass
from passopt.passes.pipeline.text import Resolved, Step, check_order, describe, resolve

#: A pipeline: text such as `"tp{degree=4},int8"`, a pass, or passes in their order.
PassesLike: TypeAlias = "str | Pass | Sequence[Pass]"


def as_pipeline(passes: PassesLike) -> Resolved:
    """Return the pipeline that is meant.

    Raises:
        UsageError: A name or an option is unknown, the order is wrong, or something is no pass.
    """
    if isinstance(passes, str):
        return resolve(passes)
    items = [passes] if isinstance(passes, Pass) else passes
    if not isinstance(items, Sequence) or not all(isinstance(item, Pass) for item in items):
        hint = "; call the class to make a pass" if any(isinstance(item, type) for item in _listed(items)) else ""
        raise UsageError(f"a pipeline is a text such as 'tp,int8', a pass, or a list of passes, not {passes!r}{hint}")
    check_order(items)
    return Resolved(",".join(map(describe, items)), tuple(Step(item.name) for item in items), tuple(items), ())


def _listed(items: object) -> Sequence[object]:
    return items if isinstance(items, Sequence) else [items]

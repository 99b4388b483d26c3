"""Record in a node's metadata where it comes from; the record survives every pass and is saved in model.onnx.

The keys are `passopt.pass`, the passes that made the node, oldest first; `passopt.from`, the original nodes that it
stands for; `passopt.module`, the module of the checkpoint's class; `passopt.source`, the lines of the modeling source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir

MADE_BY = "passopt.pass"
MADE_FROM = "passopt.from"
MODULE = "passopt.module"
SOURCE = "passopt.source"


def called(node: onnx_ir.Node) -> str:
    """Return the operator of a node and its name, or what it makes if it has no name, as many files' nodes have none.

    Args:
        node: The node.

    Returns:
        Such as ``Gelu 'act'``, or ``Gelu that makes 'y'``.
    """
    return described(node.op_type, node.name, [value.name for value in node.outputs])


def described(op_type: str, name: str | None, outputs: Iterable[str | None]) -> str:
    """Return what `called` does, of a node that is given by its operator, its name and the names of its outputs."""
    if name:
        return f"{op_type} {name!r}"
    made = next(filter(None, outputs), None)
    return f"{op_type} that makes {made!r}" if made else f"{op_type} without a name"


def set_provenance(node: onnx_ir.Node, author: str, origins: Sequence[onnx_ir.Node]) -> None:
    """Record that the pass `author` made `node` from `origins`, and pass their names, passes, modules and lines on."""
    node.metadata_props.update(provenance_of(author, origins))


def provenance_of(author: str, origins: Sequence[onnx_ir.Node]) -> dict[str, str]:
    """Return the metadata of a node that the pass `author` makes from the nodes `origins`."""
    stated = [origin.metadata_props for origin in origins]
    found = {MADE_BY: _joined([*(item[MADE_BY] for item in stated if MADE_BY in item), author])}
    if origins:
        found[MADE_FROM] = _joined([item.get(MADE_FROM, node.name or "?") for item, node in zip(stated, origins)])
    if modules := [item[MODULE] for item in stated if MODULE in item]:
        found[MODULE] = _common_module(modules)
    if sources := [item[SOURCE] for item in stated if SOURCE in item]:
        found[SOURCE] = merged_sources(sources)
    return found


def absorb_provenance(kept: onnx_ir.Node, removed: onnx_ir.Node, author: str) -> None:
    """Record that, by the pass `author`, `kept` now also stands for the equal node `removed`."""
    set_provenance(kept, author, [kept, removed])


def origin_of(node: onnx_ir.Node) -> str:
    """Return the exporter's source line and the module of a node, as far as the graph has them."""
    source, module = node.metadata_props.get(SOURCE), node.metadata_props.get(MODULE)
    return " in ".join(part for part in (source, module) if part)


def _common_module(modules: Sequence[str]) -> str:
    """Return the innermost module that contains all of `modules`: `self_attn` for its projections and its scores."""
    first, *others = [module.split(".") for module in modules]
    common = first
    for other in others:
        same = [x == y for x, y in zip(common, other)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common) or modules[0]


def merged_sources(sources: Iterable[str]) -> str:
    """Merge source lines file by file: `modeling.py:70` and `modeling.py:74` become `modeling.py:70-74`."""
    lines: dict[str, list[int]] = {}
    for source in (part for text in sources for part in text.split(",")):
        file, _, numbers = source.rpartition(":")
        lines.setdefault(file, []).extend(int(number) for number in numbers.split("-") if number.isdigit())
    merged = []
    for file, found in lines.items():
        span = sorted({min(found), max(found)}) if found else []
        merged.append(f"{file}:{'-'.join(map(str, span))}")
    return ",".join(merged)


def _joined(texts: Iterable[str]) -> str:
    parts = dict.fromkeys(part for text in texts for part in text.split(","))
    return ",".join(parts)

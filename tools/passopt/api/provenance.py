"""Tell where the nodes of a model come from: which passes made them, from which original nodes and source lines.

This is `passopt.provenance`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.api.model import ModelLike, as_model
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE, merged_sources
from passopt.reporting.result import Result

#: Splits the path of a module behind its first number: `model.layers.3.self_attn` is part of `model.layers.3`.
_LAYER = re.compile(r"(.*?\.\d+)(?:\.(.*))?\Z")
_SHOWN_ORIGINS = 3
_WIDEST = 44
#: At least this many neighbouring nodes that no pass touched share one line.
_SHORTEST_RUN = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """The origin of one node of the model; a node that no pass made is its own origin."""

    node: str
    op_type: str
    passes: tuple[str, ...]
    origins: tuple[str, ...]
    module: str
    source: str

    @property
    def layer(self) -> str:
        """Return the path of the module up to its first number, or the whole path."""
        found = _LAYER.match(self.module)
        return found[1] if found else self.module

    @property
    def place(self) -> str:
        """Return the path of the module inside its layer."""
        found = _LAYER.match(self.module)
        return (found[2] or "") if found else ""

    @property
    def shape(self) -> tuple[object, ...]:
        """Return the parts that are equal in equal layers: all but names."""
        return self.op_type, self.passes, len(self.origins), self.place, self.source


def rows_of(model: onnx_ir.Model) -> list[Row]:
    """Return one row per node of the main graph, in the order of the graph.

    Args:
        model: The graph.

    Returns:
        The rows.
    """
    return [_row(node) for node in model.graph]


def _row(node: onnx_ir.Node) -> Row:
    metadata = node.metadata_props
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    origins = _parts(metadata.get(MADE_FROM, "" if MADE_BY in metadata else node.name or "?"))
    module, source = metadata.get(MODULE, ""), metadata.get(SOURCE, "")
    return Row(node.name or "?", operator, _parts(metadata.get(MADE_BY, "")), origins, module, source)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


@dataclasses.dataclass(frozen=True, repr=False)
class Provenance(Result):
    """The origins of all nodes of a model.

    Attributes:
        rows: One row per node, in the order of the graph.
    """

    rows: tuple[Row, ...]

    def to_text(self, *, fold: bool = True) -> str:
        """Return a table per module.

        Args:
            fold: Show equal layers once, and neighbouring nodes that no pass touched in one line.
        """
        return provenance_text(self.rows, fold=fold)

    def to_json(self) -> dict[str, Any]:
        return {"nodes": [{**dataclasses.asdict(row), "layer": row.layer} for row in self.rows]}


def provenance(model: ModelLike) -> Provenance:
    """Tell for every node which passes made it, and from which nodes, module and source line of the export.

    Args:
        model: A model, or its path.

    Returns:
        One row per node.

    Raises:
        ModelError: There is no model at the path, or it is damaged.
    """
    return Provenance(tuple(rows_of(as_model(model).ir)))


def provenance_text(rows: Sequence[Row], *, fold: bool = True) -> str:
    """Return a table per module, in the order of the graph.

    Args:
        rows: One row per node.
        fold: Show equal layers once, and neighbouring nodes of one module that no pass touched in one line.

    Returns:
        The tables, with a common header.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.layer, []).append(row)
    runs = itertools.groupby(groups, key=lambda layer: _fold_key(layer, groups[layer]) if fold else (layer,))
    tables = [(layers := list(run), _table(groups[layers[0]], fold)) for _, run in runs]
    header = ["node", "operator", "passes", "original nodes", "module", "source"]
    lines = [header, *itertools.chain(*(table for _, table in tables))]
    widths = [min(_WIDEST, max(len(line[column]) for line in lines)) for column in range(len(header))]
    made = sum(bool(row.passes) for row in rows)
    text = [f"{len(rows)} nodes, {made} made or changed by passes", "", _line(header, widths)]
    for layers, table in tables:
        text += ["", _title(layers), *(_line(line, widths) for line in table)]
    return "\n".join(text)


def _table(rows: Sequence[Row], fold: bool) -> list[list[str]]:
    table = []
    for (touched, _), run in itertools.groupby(rows, key=lambda row: (bool(row.passes), row.place)):
        group = list(run)
        if touched or not fold or len(group) < _SHORTEST_RUN:
            table += [_cells(row) for row in group]
            continue
        source = merged_sources(row.source for row in group if row.source)
        names = f"{group[0].node} … {group[-1].node}"
        table.append([names, f"{len(group)} operators", "-", "-", group[0].place, source])
    return table


def _fold_key(layer: str, rows: Sequence[Row]) -> tuple[object, ...]:
    name = re.sub(r"\d+\Z", "#", layer)
    return name, tuple(row.shape for row in rows)


def _title(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return layers[0] or "(no module is known)"
    return f"{layers[0]} … {layers[-1].rpartition('.')[2]}   × {len(layers)}, equal but for names"


def _cells(row: Row) -> list[str]:
    shown = ", ".join(row.origins[:_SHOWN_ORIGINS])
    hidden = len(row.origins) - _SHOWN_ORIGINS
    origins = f"{shown} +{hidden}" if hidden > 0 else shown
    kept = not row.passes
    return [row.node, row.op_type, " → ".join(row.passes) or "-", "-" if kept else origins, row.place, row.source]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  " + "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _cut(text: str, width: int) -> str:
    """Return the end of a text that is too wide, because the end says more than the beginning.

    An example is `model.layers.0.self_attn/MatMul`.
    """
    return text if len(text) <= width else f"…{text[-(width - 1) :]}"

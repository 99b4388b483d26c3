"""Hide operators of other domains from guests that look at names only: these fold and merge what they think they know.

Only calls of local functions keep their names, unless ONNX has an operator of the same name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import onnx

from passopt.passes.guests.weight_handles import bodies

_HIDDEN = re.compile(r"_of_another_domain(_[0-9]+)?\Z")


def hide_foreign_names(model: onnx.ModelProto) -> None:
    """Give every operator of another domain a name of its own, so that no two of them look equal.

    Args:
        model: The model, which is changed in place, as are the names of local functions that ONNX has too.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    for index, node in enumerate(_nodes(model)):
        if not node.domain:
            continue
        if (node.domain, node.op_type) not in functions:
            node.op_type += f"_of_another_domain_{index}"
        elif node.op_type in _standard_names():
            node.op_type += "_of_another_domain"
    for function in model.functions:
        if function.name in _standard_names():
            function.name += "_of_another_domain"


def show_foreign_names(model: onnx.ModelProto) -> None:
    """Undo `hide_foreign_names`.

    Args:
        model: The model, which is changed in place.
    """
    for node in _nodes(model):
        node.op_type = _HIDDEN.sub("", node.op_type)
    for function in model.functions:
        function.name = _HIDDEN.sub("", function.name)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in (model.graph, *bodies(model.graph)):
        yield from graph.node
    for function in model.functions:
        yield from function.node


@functools.cache
def _standard_names() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain)

"""Give every domain one name: `ai.onnx` is ONNX's own alias of the default domain, whose name is empty."""

from __future__ import annotations

import onnx_ir

from passopt.ir.errors import ModelError

#: The alias under which other tools import the default domain.
_ALIAS = "ai.onnx"


def normalize_domains(model: onnx_ir.Model) -> None:
    """Let the model and its functions import the default domain under the name "", as nodes do already.

    Args:
        model: The model, which is changed in place. Its text and its files never name the alias afterwards.

    Raises:
        ModelError: If both names are imported with different versions, so that nobody can tell which one nodes mean.
    """
    containers: list[onnx_ir.Graph | onnx_ir.Function] = [*model.graphs(), *model.functions.values()]
    for container in containers:
        imports = container.opset_imports
        if _ALIAS not in imports:
            continue
        version = imports.pop(_ALIAS)
        other = imports.setdefault("", version)
        if other != version:
            raise ModelError(
                f"{container.name!r} imports opset {other} of the domain '' and opset {version} of {_ALIAS!r}, which "
                f"is the same domain. Write the model with one of them."
            )

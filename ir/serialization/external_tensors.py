"""Find the tensors of a model that lie in other files, and let lazy weights stand for them, so that no byte is read.

Weights in Constant nodes and in the bodies of If, Loop and Scan become initializers of the main graph, from which they
are written like all others. Data outside of the model's folder is refused.
"""

from __future__ import annotations

import collections
from pathlib import Path

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.provenance import called
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import SMALL_BYTES, LazyWeight
from passopt.ir.weights.plan_file import PLAN_NAME, read_plan
from passopt.ir.weights.sources import external_source

_TENSOR, _TENSORS = onnx_ir.AttributeType.TENSOR, onnx_ir.AttributeType.TENSORS
#: Whole numbers and truth values say how long, where and whether. Passes look at them, so small ones are read.
_READ = frozenset({onnx_ir.DataType.INT64, onnx_ir.DataType.INT32, onnx_ir.DataType.BOOL})


class ExternalTensors:
    """Replaces the external tensors of one model by lazy weights.

    Args:
        model: The model, which is changed in place.
        path: Its file, beside which the data lies.
    """

    def __init__(self, model: onnx_ir.Model, path: Path) -> None:
        self._model = model
        self._path = path
        self._plan: dict[str, ex.Expression] | None = None
        self._names = _names_of(model)
        self._moved_before: dict[tuple[object, ...], onnx_ir.Value] = {}

    def replace(self) -> None:
        """Replace all external tensors, wherever they are.

        Raises:
            ModelError: If data is missing, too short, or outside of the model's folder; or if a plan does not have it.
        """
        main = self._model.graph
        for graph in (main, *main.subgraphs()):
            self._replace_initializers(graph)
        for node in list(main.all_nodes()):
            if self._is_external_constant(node):
                self._replace_constant(node)
            else:
                self._replace_attributes(node)
        for function in self._model.functions.values():
            for graph in function.subgraphs():
                self._replace_initializers(graph, movable=False)
            for node in function.all_nodes():
                self._replace_attributes(node)

    def _replace_initializers(self, graph: onnx_ir.Graph, *, movable: bool = True) -> None:
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, onnx_ir.ExternalTensor):
                continue
            value.const_value = self._loaded(tensor, name, value)
            if graph is not self._model.graph and movable and not value.is_graph_input():
                del graph.initializers[name]
                shared = self._moved(value, name)
                if shared is not value:
                    value.replace_all_uses_with(shared)

    def _is_external_constant(self, node: onnx_ir.Node) -> bool:
        if node.op_type != "Constant" or node.domain or "value" not in node.attributes:
            return False
        attribute = node.attributes["value"]
        return not attribute.is_ref() and isinstance(attribute.value, onnx_ir.ExternalTensor)

    def _replace_constant(self, node: onnx_ir.Node) -> None:
        """Let an initializer of the main graph stand for the Constant; a graph output becomes an Identity of it."""
        old, tensor = node.outputs[0], node.attributes["value"].value
        data = self._loaded(tensor, old.name or node.name or "")
        kind, shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(tensor.shape.numpy())
        value = onnx_ir.Value(name=old.name, shape=shape, type=kind, const_value=data)
        kept = old.is_graph_output()
        value = self._moved(value, f"{old.name}.data" if kept else old.name)
        assert node.graph is not None
        if kept:
            copy = onnx_ir.Value(name=old.name, shape=shape, type=kind)
            identity = onnx_ir.Node("", "Identity", [value], outputs=[copy], name=node.name)
            node.graph.insert_before(node, identity)
            value = copy
        old.replace_all_uses_with(value, replace_graph_outputs=kept)
        node.graph.remove(node)

    def _moved(self, value: onnx_ir.Value, name: str | None) -> onnx_ir.Value:
        """Make a value an initializer of the main graph, or return the one that has the same bytes of a file already.

        Its name becomes one that nothing else has, since bodies and the main graph may use names twice.
        """
        assert isinstance(value.const_value, onnx_ir.TensorProtocol)
        weight = value.const_value.expression if isinstance(value.const_value, LazyWeight) else None
        key = (weight.file, weight.offset, weight.dtype, weight.shape) if isinstance(weight, ex.Source) else None
        if key is not None and key in self._moved_before:
            return self._moved_before[key]
        wanted = found = name or "constant"
        count = 1
        while self._names[found] > (found == value.name):
            count += 1
            found = f"{wanted}.{count}"
        self._names[found] += 1
        value.name = value.const_value.name = found
        self._model.graph.register_initializer(value)
        if key is not None:
            self._moved_before[key] = value
        return value

    def _replace_attributes(self, node: onnx_ir.Node) -> None:
        """Let lazy tensors stand for external ones in attributes; they are written inside model.onnx."""
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type not in {_TENSOR, _TENSORS}:
                continue
            tensors = [attribute.value] if attribute.type == _TENSOR else list(attribute.value)
            if not any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in tensors):
                continue
            where = f"{called(node)}, attribute {name}"
            loaded = [self._loaded(t, where) if isinstance(t, onnx_ir.ExternalTensor) else t for t in tensors]
            node.attributes[name] = onnx_ir.Attr(
                name, attribute.type, loaded[0] if attribute.type == _TENSOR else loaded
            )

    def _loaded(
        self, tensor: onnx_ir.ExternalTensor, name: str, value: onnx_ir.Value | None = None
    ) -> onnx_ir.TensorProtocol:
        """Return a lazy weight for an external tensor, or its numbers if it is small and holds whole numbers."""
        if tensor.location == PLAN_NAME:
            return LazyWeight(self._planned(tensor, name, value), name)
        source = self._source(tensor, name)
        if tensor.dtype not in _READ or source.nbytes > SMALL_BYTES:
            return LazyWeight(source, name)
        with Evaluator() as evaluator:
            return onnx_ir.Tensor(evaluator.array(source), dtype=source.dtype, name=name)

    def _planned(self, tensor: onnx_ir.ExternalTensor, name: str, value: onnx_ir.Value | None) -> ex.Expression:
        path, plan_path = self._path, self._path.parent / PLAN_NAME
        self._plan = self._plan if self._plan is not None else read_plan(plan_path)
        expression = self._plan.get(name)
        if expression is None:
            raise ModelError(f"{plan_path}: has no weight {name!r}, which {path.name} needs")
        shape = tuple(tensor.shape.numpy())
        if shape != expression.shape:
            raise ModelError(
                f"{plan_path}: weight {name!r} has shape {list(expression.shape)}, {path.name} expects {list(shape)}"
            )
        dtype = value.dtype if value is not None and value.dtype is not None else tensor.dtype
        if dtype != expression.dtype:
            raise ModelError(
                f"{plan_path}: weight {name!r} is {expression.dtype.name}, {path.name} expects {dtype.name}"
            )
        return expression

    def _source(self, tensor: onnx_ir.ExternalTensor, name: str) -> ex.Source:
        location = Path(tensor.location)
        where = f"{self._path}: weight {name!r}"
        if location.is_absolute() or ".." in location.parts:
            raise ModelError(f"{where}: data at {location}, outside of the model's folder; refused")
        file = self._path.parent
        for part in location.parts:
            file = file / part
            if file.is_symlink():
                raise ModelError(
                    f"{where}: data at {location}, behind the link {file}; refused. Copy the file instead."
                )
        shape = tuple(tensor.shape.numpy())
        try:
            source = external_source(file, name, tensor.dtype, shape, tensor.offset or 0)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from error
        if tensor.length is not None and tensor.length != source.nbytes:
            raise ModelError(f"{where}: {tensor.length} bytes of data, shape {list(shape)} needs {source.nbytes}")
        return source


def _names_of(model: onnx_ir.Model) -> collections.Counter[str]:
    """Count how many values of the main graph and of its bodies have each name."""
    names: collections.Counter[str] = collections.Counter()
    for graph in (model.graph, *model.graph.subgraphs()):
        values = {id(value): value for value in (*graph.inputs, *graph.initializers.values())}
        names.update(value.name for value in values.values() if value.name)
        names.update(value.name for node in graph for value in node.outputs if value.name)
    return names

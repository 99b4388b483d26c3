"""Random small graphs that compute with lengths, as exporters do, and the inputs to run them on."""

from __future__ import annotations

import random

import numpy as np
import onnx
from onnx import TensorProto, helper

#: Lengths of the axes A, B and C of the input x in the runs: unequal, equal, one, and empty.
LENGTHS = ((2, 3, 4), (3, 3, 2), (1, 4, 2), (5, 1, 1), (1, 1, 1), (0, 3, 2), (4, 0, 2), (6, 2, 0))


class Graph:
    """Builds a graph from a seed: vectors and scalars of integers, and tensors whose shapes depend on them."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.tensors, self.vectors, self.scalars = ["x", "z"], ["fed"], []

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def ints(self, *numbers: int, scalar: bool = False) -> str:
        name = f"c{len(self.constants)}"
        array = np.array(numbers[0] if scalar else numbers, np.int64)
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def vector(self) -> str:
        return self.choice.choice(self.vectors[-4:])

    def add_numbers(self) -> None:
        """Add one node of integer arithmetic."""
        choose = self.choice
        kind = choose.choice(KINDS)
        if kind == "Shape":
            self.vectors.append(self.op("Shape", choose.choice(self.tensors)))
        elif kind == "Part":
            start = choose.randint(-3, 2)
            self.vectors.append(self.op("Shape", choose.choice(self.tensors), start=start, end=start + 1 or 9))
        elif kind == "Gather":
            index, scalar = choose.randint(-2, 1), choose.random() < 0.5
            found = self.op("Gather", self.vector(), self.ints(index, scalar=scalar), axis=0)
            (self.scalars if scalar else self.vectors).append(found)
        elif kind == "Table":
            table = self.op("Unsqueeze", self.vector(), self.ints(choose.choice((0, 1))))
            self.vectors.append(self.op("Gather", table, self.ints(0, scalar=True), axis=choose.choice((0, 1))))
        elif kind == "Slice":
            bounds = [self.ints(choose.randint(-3, 3)), self.ints(choose.choice((-1, 1, 2, 9, -9)))]
            step = self.ints(choose.choice((1, 1, -1, 2)))
            self.vectors.append(self.op("Slice", self.vector(), *bounds, self.ints(0), step))
        elif kind == "Concat":
            parts = [choose.choice((self.vector(), self.constant())) for _ in range(2)]
            self.vectors.append(self.op("Concat", *parts, axis=0))
        elif kind == "Cast":
            to = choose.choice((TensorProto.BOOL, TensorProto.INT32, TensorProto.INT8, TensorProto.FLOAT))
            self.vectors.append(self.op("Cast", self.op("Cast", self.vector(), to=to), to=TensorProto.INT64))
        elif kind == "Unsqueeze" and self.scalars:
            self.vectors.append(self.op("Unsqueeze", choose.choice(self.scalars), self.ints(0)))
        elif kind == "Squeeze":
            self.scalars.append(self.op("Squeeze", self.op("Gather", self.vector(), self.ints(0))))
        elif kind == "Arithmetic":
            other = choose.choice((self.constant(1), self.vector()))
            self.vectors.append(
                self.op(choose.choice(("Add", "Sub", "Mul", "Div", "Mod", "Max")), self.vector(), other)
            )
        elif kind == "Where":
            vector = self.vector()
            same = self.op("Equal", vector, self.constant(1))
            self.vectors.append(self.op("Where", same, choose.choice((vector, self.constant(1))), vector))
        elif kind == "Reshape":
            self.vectors.append(self.op("Reshape", self.vector(), self.ints(-1)))

    def constant(self, count: int = 0) -> str:
        count = count or self.choice.randint(1, 2)
        return self.ints(*(self.choice.choice((0, 1, 2, 3, 4, 6, -1)) for _ in range(count)))

    def target(self) -> str:
        """Return a target shape, most often a likely one."""
        if self.choice.random() < 0.4:
            return self.vector()
        parts = [self.op("Shape", self.choice.choice(self.tensors), start=axis, end=axis + 1) for axis in range(2)]
        parts.append(self.constant(1))
        self.choice.shuffle(parts)
        return self.op("Concat", *parts[: self.choice.randint(2, 3)], axis=0)

    def add_tensor(self) -> None:
        """Add one node whose result has a shape that was computed."""
        kind, x = self.choice.choice(("Reshape", "Reshape", "Expand", "Slice", "Tail")), self.tensors[-1]
        if kind == "Reshape":
            self.tensors.append(self.op("Reshape", x, self.target(), allowzero=int(self.choice.random() < 0.15)))
        elif kind == "Expand":
            self.tensors.append(self.op("Expand", x, self.target()))
        elif kind == "Slice":
            end = self.choice.choice((1, 2, 4, 2**31 - 1, -1))
            axis = self.ints(self.choice.choice((0, 1)))
            self.tensors.append(self.op("Slice", x, self.ints(0), self.ints(end), axis))
        else:
            end = self.op("Slice", self.vector(), self.ints(0), self.ints(1), self.ints(0))
            self.tensors.append(self.op("Slice", x, self.ints(0), end, self.ints(0)))

    def model(self) -> onnx.ModelProto:
        for _ in range(self.choice.randint(2, 6)):
            self.add_numbers()
        for _ in range(self.choice.randint(1, 3)):
            self.add_tensor()
            self.add_numbers()
        results = [self.op("Neg", self.tensors[-1]), self.op("Add", self.vector(), self.ints(0))]
        dims = self.choice.choice((["A", "B", "C"], ["A", "B", None], [None, "B", "A"], ["A", 3, "C"], [None] * 3))
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, dims),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, self.choice.choice((["B", 2], [None, None]))),
            helper.make_tensor_value_info("fed", TensorProto.INT64, [self.choice.choice((2, "N"))]),
        ]
        outputs = [
            helper.make_tensor_value_info(results[0], TensorProto.FLOAT, None),
            helper.make_tensor_value_info(results[1], TensorProto.INT64, None),
        ]
        graph = helper.make_graph(self.nodes, "lengths", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


#: The arithmetic to choose from; what exporters write often stands twice.
KINDS = (
    *("Shape", "Shape", "Part", "Gather", "Gather", "Table", "Slice", "Concat", "Concat"),
    *("Cast", "Unsqueeze", "Squeeze", "Arithmetic", "Where", "Reshape"),
)


def feeds(lengths: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return inputs whose axes have these lengths."""
    first, second, third = lengths
    numbers = np.arange(first * second * third, dtype=np.float32).reshape(lengths)
    other = np.arange(second * 2, dtype=np.float32).reshape(second, 2)
    return {"x": numbers, "z": other, "fed": np.array([first, -1], np.int64)}

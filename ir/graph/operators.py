"""List facts about ONNX operators by their names."""

from __future__ import annotations

#: Operators whose results differ in every run. (Dropout is not among them, since it does nothing outside of training.)
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def operators(*lines: str) -> frozenset[str]:
    """Return the operator names in lines of text, where they are separated by spaces."""
    return frozenset(name for line in lines for name in line.split())


#: The operators of onnxruntime's domain that make ranks wait for each other. All others of that domain are unknown.
COLLECTIVE_OPS = frozenset({"AllReduce", "AllGather"})
#: Operators of two inputs whose order does not matter.
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal"})

"""What is known of ONNX's operators by their names."""

from __future__ import annotations

#: Give other numbers in every run. (Dropout does not, as long as nobody trains.)
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def operators(*lines: str) -> frozenset[str]:
    """The names in lines of text."""
    return frozenset(name for line in lines for name in line.split())


COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal"})

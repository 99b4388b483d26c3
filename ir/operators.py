"""What is known of ONNX's operators by their names."""

from __future__ import annotations

#: Give other numbers in every run. (Dropout does not, as long as nobody trains.)
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)

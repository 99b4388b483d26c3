"""passopt: ordered, explainable graph passes for ONNX graphs of language models."""

__version__ = "0.1.0"

"""Run models in onnxruntime, one alone or all ranks joined in one graph, to compare their numbers."""

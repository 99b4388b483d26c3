"""Run models in onnxruntime, a single model or all ranks joined into one graph, to compare their outputs."""

"""Turn a model into something that runs: folders of files, onnxruntime sessions, and compiled libraries of TVM."""

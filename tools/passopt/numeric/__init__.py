"""Check rewrites where they happen: cut out, sampled, and run in onnxruntime before and after."""

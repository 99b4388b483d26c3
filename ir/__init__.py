"""The floor: models, values, lazy weights, text and verifier, thin over onnx-ir. Imports nothing else of passopt."""

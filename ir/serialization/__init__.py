"""Load and save models, and print and parse their canonical text.

`model_files` handles model.onnx with its weights, `text` the golden text, `text_files` ONNX text written by hand.
"""

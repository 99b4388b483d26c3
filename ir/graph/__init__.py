"""Read and edit graphs: operators, shapes, attributes, provenance, and the known parts of a decoder.

Every module works on onnx-ir objects and reads no weight of the checkpoint.
"""

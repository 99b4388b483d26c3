"""Export Hugging Face checkpoints to graphs, without editing a line of their modeling code.

Importing this package or `checkpoint` does not import torch; importing `export`, `baichuan` or `self_check` does.
"""

"""Describe weights as lazy expressions over named tensors of a checkpoint, and compute them on demand.

Nothing here reads a weight until somebody asks for its values; `streaming` writes whole files in bounded memory.
"""

"""Recognise what attention is made of in a graph: fused operators with their operands, and a cache in 8 bits."""

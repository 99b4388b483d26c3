"""Emit the kernels of attention: writing to the KV cache, prefill in tiles, decode in parts, and mask extents."""

"""Emit the kernels of attention: cache writes, prefill in tiles, decode in parts of positions, and masks."""

"""Passes that change how attention is written without fusing it: heads, packed projections, ALiBi masks."""

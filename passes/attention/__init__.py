"""Rewrite how attention is expressed, without fusing it: separate heads, packed projections, ALiBi masks."""

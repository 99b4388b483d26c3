"""Fuse the exporter's primitive operators to RMSNormalization, RotaryEmbedding and Attention."""

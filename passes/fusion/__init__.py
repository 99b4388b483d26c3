"""Passes that fuse the exporter's primitive operators to RMSNormalization, RotaryEmbedding and Attention."""

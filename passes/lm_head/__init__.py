"""Passes over the last linear of a decoder: NormHead, its bias, and the columns whose logits are wanted."""

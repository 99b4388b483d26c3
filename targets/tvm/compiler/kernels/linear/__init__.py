"""Emit the kernels of linear layers, by weight and activation dtype; `choose` picks one for fp32 activations."""

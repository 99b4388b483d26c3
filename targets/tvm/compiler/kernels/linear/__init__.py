"""Emit the kernels of linears by weight and activation type; `choose` picks one for a node and a machine."""

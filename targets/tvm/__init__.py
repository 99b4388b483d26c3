"""Codegen by TVM: fused graphs to a library of native kernels, weights beside it, and what loads and runs them."""

"""Kernels as TIR, one file per idea. Each function returns a private PrimFunc for `call_tir`, with symbolic rows."""

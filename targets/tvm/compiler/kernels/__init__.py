"""Emit kernels as TIR, one file per idea: every function returns a private PrimFunc for `call_tir`."""

"""Emit the native kernels as TIR: each function returns a private PrimFunc that Relax calls with `call_tir`.

In docstrings, `x f32[M, k]` is an argument named x, of dtype float32 and shape [M, k]. Lengths that are known only when
the kernel runs are symbols, such as M.
"""

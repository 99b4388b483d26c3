"""Compile models to a library of native kernels, with the weights laid out as the kernels read them.

`lowering` walks the graph, `kernels` emits TIR, `relax_steps` names the steps that TVM takes after that.
"""

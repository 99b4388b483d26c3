"""Compile models to a library of native kernels, with the weights laid out as the kernels read them.

`lowering` turns the graph into a Relax module, `kernels` emits the kernels as TIR, and `relax_steps` lists the passes
of TVM that run after that.
"""

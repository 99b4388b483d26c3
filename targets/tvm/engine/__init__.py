"""Load a compiled folder and run it, in one process or as tensor-parallel ranks of one machine.

Nothing here imports the compiler, so running a model needs neither LLVM nor the graph.
"""

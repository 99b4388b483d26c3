"""Load a compiled folder and run it, in one process or as tensor-parallel ranks of one machine.

Nothing here imports the compiler: running needs no LLVM and no graph.
"""

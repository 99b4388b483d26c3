"""Compare a model with the one it was made from, and write reproducers of failing passes.

`verify` compares two graphs, `verify_compiled` a graph with its compiled folder, `layerwise` two graphs one layer at a
time, and `rewrites` checks every single rewrite while passes run. `reproducer` writes and reads reproducers.
"""

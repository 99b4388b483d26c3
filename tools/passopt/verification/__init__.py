"""Compare two models, or a model and what was compiled of it, scenario by scenario; and leave reproducers.

`verify` compares graphs, `verify_compiled` a compiled folder, `layerwise` one layer at a time, `rewrites` every single
rewrite of a run.
"""

"""Read and write calibration folders: what was measured on the inputs of linears, and the codes made of it.

`calibration` reads a folder, `writer` makes one, and `keys` says how weights are named in it.
"""

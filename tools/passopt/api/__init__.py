"""Do what the commands do, one operation per module: every command is a thin layer over one of these functions.

The package `passopt` hands them on; import them from there.
"""

"""Provide the operations of the Python API, one per module; every command is a thin layer over one of them.

The package `passopt` exports them; import them from there.
"""

"""Where graphs come from: Hugging Face checkpoints, exported without editing a line of their modeling code.

Importing this package or `checkpoint` loads no torch; `export`, `baichuan2` and `self_check` do.
"""

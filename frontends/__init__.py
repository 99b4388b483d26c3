"""Where graphs come from: Hugging Face checkpoints, exported without editing a line of their modeling code.

Importing this package or `checkpoint` loads no torch; `huggingface`, `baichuan2` and `selfcheck` do.
"""

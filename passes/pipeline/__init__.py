"""Parse pipelines, run them pass after pass, and check what they are expected to have matched.

`text` reads `tp{degree=4},int8`, `named` holds the built-in tuples, `runner` runs them under its `instruments`.
"""

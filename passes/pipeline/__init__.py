"""Parse pipelines of passes, run them, and check that they matched what was expected.

`text` parses pipeline text such as `tp{degree=4},int8`, `named` holds the built-in pipelines, `runner` runs the passes,
`instruments` observe the run, and `expectations` check its result.
"""

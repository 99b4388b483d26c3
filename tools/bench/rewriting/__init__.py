"""Measure the speed of rewriting against other tools: `python tools/bench rewriting`.

`candidates.py` is started as a file, one process per candidate and task, by `bench.py`.
"""

"""Measure the speed of rewriting against other tools, by `python tools/bench rewriting`.

`bench.py` starts `candidates.py` as a program, in one process per candidate and task.
"""

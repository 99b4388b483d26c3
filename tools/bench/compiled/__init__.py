"""Measure compiled models against other runtimes and the machine's limits: `python tools/bench compiled`.

`candidates.py` and `with_llama_cpp.py` are started as files, one process per candidate, by `bench.py`.
"""

"""Measure compiled models against other runtimes and the machine's limits, by `python tools/bench compiled`.

`bench.py` starts `candidates.py` and `with_llama_cpp.py` as programs, and never measures two candidates in one process.
"""

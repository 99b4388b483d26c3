"""Measure how fast weights are written, by `python tools/bench weights`, and by other tools, by `… peers`.

The benchmarks start `plain_copy.py` and `peer_candidates.py` as programs; the second one runs in an environment that
has the tool.
"""

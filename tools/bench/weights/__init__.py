"""Measure how fast weights are written: `python tools/bench weights`, and other tools' by `python tools/bench peers`.

`plain_copy.py` and `peer_candidates.py` are started as files, the second one in an environment that has the tool.
"""

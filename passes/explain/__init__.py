"""Explain where the rules of a pass came near and what kept them from matching, for `passopt why` and expectations.

`report` explains a pass, and `node_report` what all its rules say about one node. `nearest_match` searches, and
`misses` groups what it finds.
"""

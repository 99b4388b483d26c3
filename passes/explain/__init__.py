"""Explain where the rules of a pass came near and what kept them from matching, for `passopt why` and expectations.

`report` explains a pass, `node_report` all rules at one node; `nearest_match` searches, `misses` groups what it finds.
"""

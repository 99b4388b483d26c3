"""Match patterns written as Python functions, and apply the rewrites of what matched.

Authors of passes write patterns in the `language` and subclass the base class in `rewrite_pass`. Patterns are checked
by `validation`, and found in a graph by `compiler` and `matcher`; `rules` and `driver` apply the rewrites.
"""

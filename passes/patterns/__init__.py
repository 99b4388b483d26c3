"""Match patterns written as Python functions, and apply the rewrites of what matched.

`language` is what an author writes, `compiler` and `matcher` find it, `rules` and `driver` apply it, `rewrite_pass` is
the base class that ties them together.
"""

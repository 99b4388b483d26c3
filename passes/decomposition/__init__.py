"""Passes that undo fusions, for targets that want primitive operators."""

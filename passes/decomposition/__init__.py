"""Undo fusions, for targets that want primitive operators."""

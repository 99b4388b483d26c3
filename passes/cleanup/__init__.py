"""Passes that tidy any graph: folding, canonical spellings, common subexpressions, dead code, guests."""

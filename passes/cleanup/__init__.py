"""Tidy any graph: fold constants, unify spellings, merge common subexpressions, drop dead code, run guest passes."""

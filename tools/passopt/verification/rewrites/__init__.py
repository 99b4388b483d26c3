"""Check every single rewrite of a run by sampled numbers, where it happens: `--verify-each=numeric`."""

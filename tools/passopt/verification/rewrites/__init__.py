"""Check every single rewrite of a run where it happens, by numbers on sampled inputs (`--verify-each=numeric`)."""

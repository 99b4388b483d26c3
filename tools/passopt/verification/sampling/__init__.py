"""Make the inputs of any graph by type and name, at several true lengths, and record what the graph computes."""

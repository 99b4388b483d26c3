"""Shard one graph over ranks: placements are propagated from the weights, then written as one SPMD graph."""

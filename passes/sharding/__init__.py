"""Shard one graph over ranks: infer how every value lies on the ranks, then write the SPMD graph that each rank runs.

`propagate` and the rules of `rules` infer the placements, `padding` checks padded ones, and `spmd_graph` changes the
graph. `shard` is the pass.
"""

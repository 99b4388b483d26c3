"""Sharding by propagation over one SPMD graph: specs, column layouts, rules per operator, materialisation, plan."""

"""From our graph to a Relax module: one converter per operator, native kernels for every linear and attention."""

"""Lower a graph to a Relax module: a converter per operator, native kernels for every linear and attention."""

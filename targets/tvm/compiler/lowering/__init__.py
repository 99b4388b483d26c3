"""Lower a graph to a Relax module, with a converter per operator and native kernels for linears and attentions."""

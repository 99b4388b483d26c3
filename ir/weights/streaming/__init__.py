"""Write weight expressions to files as fast as the disk allows, in bounded memory.

`write_weights` is the entry point. One reading of the checkpoint serves all outputs, and an interrupted write can be
resumed. Terms used here: a *base* is what is read row by row, mostly a tensor in a checkpoint file; a *core* is what is
computed from a base, row by row; a *group* is all output tensors that are made from one base; an *arena* is the
preallocated memory of one worker; the *evaluator of boxes* (`ir.weights.evaluator`) computes what cannot be streamed.
"""

"""Write weight expressions to files as fast as the disk allows, in bounded memory.

`write_weights` is the entry; one reading of the checkpoint serves all outputs, and an interrupted write resumes.
"""

"""Weight expressions to files: the source is read once for all ranks and outputs, in bounded memory."""

"""Tell users what happens: the results that operations return, and progress while they run."""

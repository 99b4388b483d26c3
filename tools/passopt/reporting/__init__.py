"""Tell users what happens: define the results that operations return, and how progress is reported while they run."""

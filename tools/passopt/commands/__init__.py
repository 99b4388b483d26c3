"""One module per group of commands; a command is a function of its parsed options that returns the exit code."""

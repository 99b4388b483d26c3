"""Talk to people at a terminal: values of options, messages on stderr, bars of progress. Commands are built on it."""

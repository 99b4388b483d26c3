"""Talk to people at a terminal: parse values of options, write messages to stderr, and draw progress bars.

The commands are built on this package.
"""

"""Hold the commands, one per file: its summary, an example, its arguments, and `main`, which calls `passopt.api`.

Importing a command costs nothing: what it needs is imported when it is called.
"""

"""Hold the commands, one per file: its summary, an example, its arguments, and `main`, which calls `passopt.api`.

Importing a command is cheap, because what it needs is imported when it is called.
"""

"""Run the command line: find the command, call it, and turn errors into messages and exit codes."""

from passopt.cli.main import main

__all__ = ["main"]

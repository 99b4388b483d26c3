"""Find and run commands; `main` is the entry point of `passopt`."""

from passopt.cli.main import main

__all__ = ["main"]

"""Hold the version of passopt, which every output, library and reproducer records."""

__version__ = "0.2.0"

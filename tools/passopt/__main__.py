"""Run the command line: `python -m passopt`."""

import sys

from passopt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

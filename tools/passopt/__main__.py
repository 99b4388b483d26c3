"""`python -m passopt`."""

import sys

from passopt.cli import main

if __name__ == "__main__":
    sys.exit(main())

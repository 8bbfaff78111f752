"""Runs the command line as ``python -m convtap``."""

import sys

from convtap.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m convtap``: the command line."""

import sys

from convtap.cli import main

if __name__ == "__main__":
    sys.exit(main())

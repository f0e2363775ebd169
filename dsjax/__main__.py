"""`python -m dsjax` is the command `dsjax`."""

import sys

from dsjax.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Run the command line: `python -m einsumcascade`."""

import sys

from einsumcascade.cli import main

if __name__ == "__main__":
    sys.exit(main())

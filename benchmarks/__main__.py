"""Run the benchmark in a bare checkout: `python -m benchmarks`."""

import sys

from einsumcascade.benchmarks.main import main

if __name__ == "__main__":
    sys.exit(main())

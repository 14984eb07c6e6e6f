"""Run the benchmark in a bare checkout: `python -m benchmarks`."""

import sys

if __name__ == "__main__":
    try:
        from einsumcascade.benchmarks.main import main

        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(
            f"{error}: the benchmark needs torch, triton, numpy, sympy, networkx, lark, and PYTHONPATH=.; "
            "typer, rich, platformdirs, jinja2 and matplotlib may be missing"
        )

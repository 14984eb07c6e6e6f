"""The command line: `einsumcascade COMMAND`, also `python -m einsumcascade`."""

from einsumcascade.cli import commands, kernels
from einsumcascade.cli.app import app, main
from einsumcascade.cli.options import parse_extents
from einsumcascade.cli.output import write_atomically
from einsumcascade.cli.tuning import cache_app

__all__ = ["app", "cache_app", "commands", "kernels", "main", "parse_extents", "write_atomically"]

"""The NumPy float64 oracle: any cascade interpreted, and closed forms to hold it against."""

from einsumcascade.reference.interpret import run, run_all

__all__ = ["run", "run_all"]

"""Whether this is the nightly run, which tries everything; others take what fits into a quarter of an hour."""

import os

NIGHTLY = bool(os.environ.get("EINSUMCASCADE_NIGHTLY"))

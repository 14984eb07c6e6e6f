"""Where things are kept between runs: one folder of the user for all parts of the package."""

from __future__ import annotations

import os
from pathlib import Path

# Names the folder; empty: nothing is kept.
VARIABLE = "EINSUMCASCADE_CACHE"


def cache_folder(part: str) -> Path | None:
    """Return the folder of a part of the package: below `EINSUMCASCADE_CACHE`, else below the user's cache directory.

    It need not exist. None where nothing is to be kept: the variable is empty, or it is not set and there is no such
    directory, or platformdirs, which knows it, is not installed.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) / part if given else None
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    place = user_cache_path("einsumcascade", appauthor=False)
    # A user without a home has no such directory.
    return place / part if place.is_absolute() else None

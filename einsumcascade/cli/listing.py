"""The passes of the whole gallery, kept between calls: counting them takes seconds."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from einsumcascade import gallery

Passes = dict[str, dict[str, int]]


def gallery_passes() -> Passes:
    """Count the passes over each rank of each text, by the name of the text.

    Kept in the user's cache directory, or in `EINSUMCASCADE_CACHE` (empty: nowhere), under a digest of the texts and
    of the code that reads and counts them, so that what is kept is what would be found.

    Cost: 3 to 5 s the first time, then some milliseconds.
    """
    digest, path = _digest(), _path()
    known = _read(path, digest) if path is not None else None
    if known is not None:
        return known
    from einsumcascade.analysis.passes import passes_of

    found = {name: passes_of(gallery.load(name)) for name in gallery.names()}
    if path is not None:
        _write(path, {"digest": digest, "passes": found})
    return found


def _digest() -> str:
    root = Path(__file__).resolve().parents[1]
    files = [p for folder in ("gallery", "language", "analysis") for p in sorted((root / folder).iterdir())]
    digest = hashlib.sha256()
    for path in files:
        if path.suffix in (".cascade", ".lark", ".py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _path() -> Path | None:
    given = os.environ.get("EINSUMCASCADE_CACHE")
    if given is not None:
        return Path(given) / "gallery.json" if given else None
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("einsumcascade") / "gallery.json"


def _read(path: Path, digest: str) -> Passes | None:
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or kept.get("digest") != digest:
        return None
    found = kept.get("passes")
    if not isinstance(found, dict) or set(found) != set(gallery.names()):
        return None
    good = all(isinstance(r, dict) and all(isinstance(n, int) for n in r.values()) for r in found.values())
    return found if good else None


def _write(path: Path, value: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, delete=False, encoding="utf-8", suffix=".draft"
        ) as draft:
            json.dump(value, draft)
        Path(draft.name).replace(path)
    except OSError:
        # A cache that cannot be written is no reason to fail.
        return

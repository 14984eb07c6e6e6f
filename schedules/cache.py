"""Tuned schedules on disk: one JSON file for a cascade, a bucket of extents, a device and a version of Triton.

They lie in the folder `tuned` of the user's cache directory, or of `EINSUMCASCADE_CACHE` (empty: nowhere). The package
may bring such files along, in `schedules/tuned`; what the user measured comes first. A file is replaced as a whole, so
processes may write at once, and one that is killed leaves the old file or none. What is not such a file, or has been
cut short, is passed over with a warning; whether a schedule fits its program is checked when a kernel is built.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from einsumcascade.caches import cache_folder
from einsumcascade.errors import EinsumCascadeWarning, ScheduleError
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.schedules.schedule import Schedule

FORMAT = 1
# Files that the package brings along, measured by its authors; none yet.
SHIPPED = Path(__file__).with_name("tuned")
# A schedule serves extents that lie within a factor of 2 ** FAR of those it was tuned at.
FAR = 4
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a tuned schedule is for.

    Args:
        cascade: the text, constants put in. form: dtype, precision and what else makes another kernel of it.
        features: extents that enter a text, by rank. lengths: the others, which a bucket rounds up to powers of two.
        device: as it calls itself. triton: the version.
    """

    cascade: str
    form: str
    features: Mapping[str, int] = field(hash=False)
    lengths: Mapping[str, int] = field(hash=False)
    device: str
    triton: str

    @property
    def digest(self) -> str:
        """The same for all lengths on all devices."""
        text = json.dumps([FORMAT, self.cascade, self.form, sorted(self.features.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def bucket(self) -> dict[str, int]:
        """Lengths, rounded up to powers of two."""
        return {r: 1 << (max(n, 1) - 1).bit_length() for r, n in sorted(self.lengths.items())}

    @property
    def file_name(self) -> str:
        """The name of its file; device and version only narrow what is read, the file itself says them."""
        place = hashlib.sha256(json.dumps([self.bucket, self.device, self.triton]).encode()).hexdigest()[:16]
        return f"{self.digest}-{place}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tuned schedule, and what was measured of it.

    Args:
        name: of the cascade. bucket: of the extents. record: what the tuner wrote beside it.
    """

    path: Path
    name: str
    device: str
    triton: str
    digest: str
    bucket: Mapping[str, int] = field(hash=False)
    schedule: Schedule = field(hash=False)
    record: Mapping[str, Any] = field(hash=False)


def key_of(
    cascade: Cascade,
    *,
    extents: Mapping[str, int],
    features: Mapping[str, int],
    dtype: str,
    precision: str,
    ordered: bool,
    device: str,
    triton: str,
) -> Key:
    """The key of a call.

    Args:
        cascade: constants put in. extents: of all ranks of its inputs. features: those that enter a text.
        dtype, precision: of the inputs, and of float32 products. ordered: whether all sums have one order.
        device: as it calls itself. triton: its version.
    """
    named = dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)
    return Key(
        cascade=str(cascade),
        form=f"{dtype} {precision if dtype == 'float32' else ''} {'ordered' if ordered else ''}",
        features=dict(features),
        lengths={r: extents[r] for r in named if r not in features},
        device=device,
        triton=triton,
    )


def folder() -> Path | None:
    """Where tuned schedules are kept; None where nothing is."""
    return cache_folder("tuned")


def find(key: Key) -> Entry | None:
    """Find the schedule of a key: that of its bucket, else of the nearest of the same kernel, device and Triton.

    The distance of two buckets is the sum of the octaves between their extents; none of them may be more than 4, that
    is a factor of 16. What the user measured comes before what the package brings along.

    Cost: one file is read for each bucket that was tuned.
    """
    wanted = key.bucket
    for place in (folder(), SHIPPED):
        near = []
        for entry in _entries(place, f"{key.digest}-*.json"):
            if not _is_of(entry, key):
                continue
            octaves = [abs(math.log2(entry.bucket[r] / n)) for r, n in wanted.items()]
            if max(octaves, default=0.0) <= FAR:
                near.append((sum(octaves), entry.path.name, entry))
        if near:
            return min(near, key=lambda n: n[:2])[2]
    return None


def at(key: Key) -> Entry | None:
    """What the user's folder holds for the very bucket of a key."""
    place = folder()
    entry = _read(place / key.file_name) if place is not None else None
    return entry if entry is not None and _is_of(entry, key) else None


def keep(key: Key, name: str, schedule: Schedule, record: Mapping[str, Any]) -> Path | None:
    """Keep a schedule; returns its file, or None where it cannot be written, which is a warning."""
    place = folder()
    if place is None:
        return None
    value = {
        "format": FORMAT,
        "name": name,
        "digest": key.digest,
        "cascade": key.cascade,
        "form": key.form,
        "features": dict(key.features),
        "bucket": key.bucket,
        "device": key.device,
        "triton": key.triton,
        "schedule": schedule.to_dict(),
        "record": dict(record),
    }
    path = place / key.file_name
    draft = place / f"tmp{secrets.token_hex(8)}.draft"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with draft.open("x", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1)
            stream.flush()
            # A machine that stops must not leave a name without what it stands for.
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        _warn(f"the tuned schedule cannot be kept in {place}: {error.strerror or error}")
        return None
    finally:
        # However that ended; it has its name by now, or never will.
        with suppress(OSError):
            draft.unlink()
    return path


def entries() -> tuple[Entry, ...]:
    """What the user's folder holds, by name of the cascade, device and bucket."""
    found = _entries(folder(), "*.json")
    return tuple(sorted(found, key=lambda e: (e.name, e.device, e.triton, str(dict(e.bucket)), e.path.name)))


def _is_of(entry: Entry, key: Key) -> bool:
    """Whether an entry is for a kernel, a device and a Triton, whatever the extents."""
    same = (entry.digest, entry.device, entry.triton) == (key.digest, key.device, key.triton)
    return same and set(entry.bucket) == set(key.bucket)


def clear() -> int:
    """Remove what the tuner has written; returns the number of schedules.

    Raises: OSError: the folder cannot be read, or a file cannot be removed.
    """
    place = folder()
    count = 0
    for path in _files(place, "*.json"):
        if re.fullmatch(r"[0-9a-f]{24}-[0-9a-f]{16}\.json", path.name):
            path.unlink(missing_ok=True)
            count += 1
    for path in _files(place, "tmp*.draft"):
        path.unlink(missing_ok=True)
    return count


def _files(place: Path | None, pattern: str) -> list[Path]:
    try:
        names = os.listdir(place) if place is not None else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [place / n for n in sorted(names) if place is not None and fnmatch(n, pattern)]


def _entries(place: Path | None, pattern: str) -> Iterator[Entry]:
    try:
        paths = _files(place, pattern)
    except OSError as error:
        _warn(f"{place} cannot be read: {error.strerror or error}")
        return
    for path in paths:
        entry = _read(path)
        if entry is not None:
            yield entry


def _read(path: Path) -> Entry | None:
    try:
        if not path.is_file():
            # Removed by another process; or what is no file, which may have no end.
            return None
        with path.open("rb") as stream:
            data = stream.read(_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"{path} cannot be read: {error.strerror or error}")
        return None
    try:
        kept = json.loads(data) if len(data) <= _LIMIT_BYTES else None
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise ValueError
        texts = [kept[n] for n in ("name", "device", "triton", "digest")]
        bucket, record = kept["bucket"], kept["record"]
        if not isinstance(record, dict) or not isinstance(bucket, dict):
            raise ValueError
        # What is printed moves no cursor, and can be written in any encoding that has all characters.
        if not all(isinstance(t, str) and t.isprintable() for t in (*texts, *bucket)):
            raise ValueError
        json.dumps(kept, ensure_ascii=False).encode()
        if not all(type(n) is int and 0 < n <= 1 << 62 for n in bucket.values()):
            raise ValueError
        schedule = Schedule.from_dict(kept["schedule"])
    except (ValueError, KeyError, RecursionError, ScheduleError):
        _warn(f"{path} is no tuned schedule of this version; it is passed over")
        return None
    return Entry(
        path=path,
        name=texts[0],
        device=texts[1],
        triton=texts[2],
        digest=texts[3],
        bucket=bucket,
        schedule=schedule,
        record=record,
    )


def _warn(what: str) -> None:
    warnings.warn(f"[tuned-schedule] {what}", EinsumCascadeWarning, stacklevel=3)

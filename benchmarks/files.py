"""The files of results: written so that no reader sees half of one, read so that nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from einsumcascade import errors
from einsumcascade.errors import InputError

RESULTS, STATIC = "results.json", "static.json"
FORMAT = 1
# What rows of ours are called; the others are rivals.
OURS, TUNED = "ours", "ours, tuned"
OWN = (OURS, TUNED)
PASSED, WRONG, FAILED, LEFT_OUT = STATES = ("passed", "wrong", "failed", "left out")
# What must be alike for a case of one run to stand in another.
SETUP = ("device", "capability", "multiprocessors", "versions", "code", "settings", "rivals", "tuned_schedules")

# --- writing ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write a value so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def plain(value: Any) -> Any:
    """Put null where JSON has no number."""
    match value:
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def put_aside(path: Path) -> Path | None:
    """Give a file that is there a name of its own, so that another may be written in its place."""
    if not path.exists():
        return None
    count = 1
    while (aside := path.with_name(f"{path.stem}-{count}{path.suffix}")).exists():
        count += 1
    return path.rename(aside)


# --- where results come from ------------------------------------------------------------------------------------------


@cache
def code_digest() -> str:
    """A digest of the package's source: what was measured with other code is not taken over."""
    root = Path(errors.__file__).parent
    digest = hashlib.sha256()
    # Folders of the checkout are links here.
    files = {f for folder in (root, *(p for p in root.iterdir() if p.is_dir())) for f in folder.rglob("*.py")}
    for file in sorted(files, key=lambda f: f.relative_to(root).as_posix()):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def commit() -> str | None:
    """The commit of the checkout; None where there is none."""
    root = Path(errors.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def taken_over(earlier: Mapping[str, Any] | None, result: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The cases of an earlier run that are finished, by name, and why there are none.

    They were measured in the same set-up, and every candidate that passed was timed.
    """
    if earlier is None:
        return {}, ""
    other = [key for key in SETUP if earlier.get(key) != plain(result.get(key))]
    if other:
        return {}, f"the earlier run differs in {', '.join(other)}"
    return {c["case"]: c for c in earlier["cases"] if _is_finished(c)}, ""


def _is_finished(record: Mapping[str, Any]) -> bool:
    rows = record.get("rows", ())
    return bool(rows) and "skipped" not in record and all(r["state"] != "passed" or r["times"] for r in rows)


# --- reading ----------------------------------------------------------------------------------------------------------


def results_of(path: Path) -> dict[str, Any]:
    """Read the results of an earlier run. Raises: InputError: `benchmark-file`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        refuse_file(f"'{path}' cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        refuse_file(f"'{path}' is no JSON")
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("cases"), list):
        refuse_file(f"'{path}' holds no results of this benchmark")
    wrong = _wrong(found, _RESULT, "")
    if wrong:
        refuse_file(f"'{path}' is no file that the benchmark wrote: {wrong}")
    return found


# A shape is an object of shapes by key ("?": it may be missing), a list of one, the texts that there are, "text",
# "number" or "flag"; behind "each" that of all values of an object, behind "null" what may be null.
_TIMES = {"ms": "number", "low": "number", "high": "number", "rounds": "number"}
_ROW = {
    "name": "text",
    "state": STATES,
    "share": ("null", "number"),
    "times": ("null", _TIMES),
    "rate": ("null", "number"),
    "host_us?": ("null", "number"),
    "hidden_us?": ("null", "number"),
    "schedule?": "text",
    "note": "text",
}
_CASE = {
    "case": "text",
    "variant": "text",
    "direction": ("forward", "backward", "step"),
    "unit": ("TFLOP/s", "GB/s"),
    "flop": "number",
    "rows?": [_ROW],
    "skipped?": "text",
}
_RESULT = {
    "date": "text",
    "command": "text",
    "device": "text",
    "state?": ("each", "text"),
    "ceilings?": {"matmul_bf16_tflops": "number", "copy_gb_s": "number"},
    "versions": ("each", ("null", "text")),
    "absent": ("each", "text"),
    "tuned_schedules?": "number",
    "seconds?": "number",
    "interrupted?": "flag",
    "cases": [_CASE],
}
# More than any figure of a result.
_MOST = 1e18


def _wrong(value: Any, shape: Any, where: str) -> str:
    """What in a value is not of a shape; empty if nothing is."""
    match shape:
        case dict():
            if not isinstance(value, dict):
                return f"{where} is no object"
            known = {key.rstrip("?"): key for key in shape}
            missing = next((n for n, key in known.items() if n not in value and n == key), None)
            if missing is not None:
                return f"{where or 'the file'} has no '{missing}'"
            inner = ((value[n], shape[key], f"{where}.{n}" if where else n) for n, key in known.items() if n in value)
        case ("each", one):
            if not isinstance(value, dict):
                return f"{where} is no object"
            inner = ((v, one, f"{where}.{n}") for n, v in value.items())
        case ("null", one):
            inner = (entry for entry in [(value, one, where)] if value is not None)
        case [one] if isinstance(shape, list):
            if not isinstance(value, list):
                return f"{where} is no list"
            inner = ((v, one, f"{where}[{n}]") for n, v in enumerate(value))
        case tuple():
            return "" if value in shape else f"{where} is none of {', '.join(shape)}"
        case "flag":
            return "" if isinstance(value, bool) else f"{where} is neither true nor false"
        case "number":
            is_one = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST
            return "" if is_one else f"{where} is no number from 0 to {_MOST:g}"
        case _:
            return "" if isinstance(value, str) else f"{where} is no text"
    return next((found for entry in inner if (found := _wrong(*entry))), "")


def refuse_file(headline: str) -> NoReturn:
    """Raises: InputError: `benchmark-file`."""
    raise InputError.of(
        "benchmark-file",
        headline,
        rule="--out names a folder, --show the results.json that an earlier run wrote there",
        hint="einsumcascade bench --out results, then einsumcascade bench --show results/results.json",
    )

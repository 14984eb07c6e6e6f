"""Names of a spec as names of a kernel: data never becomes code."""

from __future__ import annotations

import builtins
import keyword

RESERVED = frozenset({"tl", "triton", "libdevice", "pid", *dir(builtins)})


def safe(name: str) -> str:
    """An identifier for a name of a spec: itself, or with an underscore where Python or Triton own the word."""
    assert name.isidentifier() and name.isascii(), name
    return name + "_" if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in RESERVED else name

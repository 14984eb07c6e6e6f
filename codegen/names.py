"""Names of a spec as names of a kernel: data never becomes code."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Collection

RESERVED = frozenset({"tl", "triton", "libdevice", "pid", *dir(builtins)})


def extent_name(rank: str, tensors: Collection[str]) -> str:
    """The parameter that holds an extent: the rank's name, or `X_extent` where a tensor is called X."""
    return f"{rank}_extent" if rank in tensors else safe(rank)


def safe(name: str) -> str:
    """An identifier for a name of a spec: itself, or with an underscore where Python or Triton own the word."""
    assert name.isidentifier() and name.isascii(), name
    return name + "_" if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in RESERVED else name

"""Names of a spec as names of a kernel: data never becomes code."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection

# Forms of the names that a kernel makes for itself.
MADE = re.compile(
    r"(b|p|o|i|r|d|m)_|(BLOCK|stride|step|start|first|last|least|most|lo|hi|low|high|end|second|full|side|upto|tmp)_"
    r"|_(multiply|words|uniforms?|below|above|count|reciprocal|tanh|log|cos|sin)$"
)
RESERVED = frozenset({"tl", "triton", "libdevice", "pid", "part", "tile", "tiles", *dir(builtins)})


def extent_name(rank: str, tensors: Collection[str]) -> str:
    """The parameter that holds an extent: the rank's name, or `X_extent` where a tensor is called X."""
    return f"{rank}_extent" if rank in tensors else safe(rank)


def safe(name: str) -> str:
    """An identifier for a name of a spec: itself, or with `_` behind it where the word or its form is taken.

    Taken are the words of Python and Triton, and the forms of names that a kernel makes: b_X, BLOCK_P, stride_X_p ...
    """
    assert name.isidentifier() and name.isascii(), name
    taken = keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in RESERVED or MADE.match(name)
    return name + "_" if taken else name

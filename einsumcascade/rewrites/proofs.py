"""Corrections by the structure of the summand: names taken away, found once, and kept on disk.

Softmax over `QK` and softmax over `S` are one question. Leaves become L0, L1, ... in order of appearance, so the answer
does not depend on what a text calls its tensors; it is kept in the user's cache directory, in our own syntax, so that a
second process need not import SymPy. A file that is not what was asked for is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einsumcascade.caches import cache_folder
from einsumcascade.errors import CascadeError, EinsumCascadeWarning
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Expr,
    Input,
    Num,
    Read,
    Scalar,
    Var,
    reads,
    subexpressions,
    transform,
)

# Raised whenever an answer could differ from that of an earlier version.
FORMAT = 2
PRIME = "__next"
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a summand, its leaves called L0, L1, ... and the shared values T0, T1, ...

    Args:
        summand, used, reduce: as `running_state.correction`.
        positive, nonnegative, fixed: names of leaves.
        shared: (name, expression) of values that exist anyway.
    """

    summand: Expr
    used: tuple[Read, ...]
    reduce: str
    positive: tuple[str, ...]
    nonnegative: tuple[str, ...]
    fixed: tuple[str, ...]
    shared: tuple[tuple[str, Expr], ...]

    @property
    def text(self) -> str:
        """One line that two equal questions share."""
        parts: tuple[object, ...] = (
            self.summand,
            [r.tensor for r in self.used],
            self.reduce,
            list(self.positive),
            list(self.nonnegative),
            list(self.fixed),
            [f"{t} = {e}" for t, e in self.shared],
        )
        return "; ".join(map(str, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The way between the leaves of a cascade and those of a question."""

    leaves: Mapping[Expr, Read]
    shared: Mapping[Read, Read]

    def canonical(self, e: Expr) -> Expr:
        """The expression over L0, L1, ..."""
        return transform(e, lambda x: self.leaves.get(x) if isinstance(x, Read | Var | Scalar) else None)

    def own(self, e: Expr) -> Expr:
        """The expression over the leaves of the cascade."""
        back: dict[str, Expr] = {new.tensor: old for old, new in self.leaves.items()}
        back |= {new.tensor: old for old, new in self.shared.items()}

        def leaf(x: Expr) -> Expr | None:
            if not isinstance(x, Read):
                return None
            if x.tensor.endswith(PRIME):
                base = back[x.tensor.removesuffix(PRIME)]
                assert isinstance(base, Read)
                return Read(tensor=base.tensor + PRIME, indices=base.indices)
            return back.get(x.tensor)

        return transform(e, leaf)

    def shown(self, line: str) -> str:
        """A line of a proof with the names of the cascade."""
        taken: dict[str, str] = {}
        for old, new in (*self.leaves.items(), *self.shared.items()):
            name = old.tensor if isinstance(old, Read) else str(old)
            unique, n = name, 2
            while unique in taken.values():
                unique, n = f"{name}_{n}", n + 1
            taken[new.tensor] = unique
        return re.sub(r"\b[LT]\d+\b", lambda m: taken.get(m[0], m[0]), line)


def leaves(expr: Expr) -> tuple[Expr, ...]:
    """The reads, rank variables, constants and extents of an expression that algebra treats as symbols."""
    out: dict[Expr, None] = {}

    def go(e: Expr) -> None:
        match e:
            case Apply():
                for a in e.args:
                    go(a)
            case Read() | Var() | Scalar():
                out[e] = None
            case Num():
                pass

    go(expr)
    return tuple(out)


def found_in(expr: Expr, part: Expr) -> Expr:
    """The part as it stands in an expression, with its place in the text."""
    return next((e for e in subexpressions(expr) if e == part), part)


def names_of(summand: Expr, shared: tuple[tuple[Read, Expr], ...]) -> Names:
    """Number the leaves of a summand and of the shared values."""
    everything = dict.fromkeys(leaf for e in (summand, *(e for _, e in shared)) for leaf in leaves(e))
    return Names(
        leaves={e: Read(tensor=f"L{n}") for n, e in enumerate(everything)},
        shared={r: Read(tensor=f"T{n}") for n, (r, _) in enumerate(shared)},
    )


def folder() -> Path | None:
    """Where answers are kept; None where nothing is."""
    return cache_folder("proofs")


def remembered(question: Question, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the answer to a question from disk, or find it and keep it.

    An answer is a JSON value. Several processes may ask at once; a file is replaced as a whole.
    """
    where = folder()
    if where is None:
        return answer()
    name = hashlib.sha256(f"{FORMAT}\n{question.text}".encode()).hexdigest()[:32]
    path = where / f"{name}.json"
    known = _read(path, question)
    if known is not None:
        return known
    found = answer()
    _write(path, {"format": FORMAT, "question": question.text, "answer": found})
    return found


def _read(path: Path, question: Question) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            data = stream.read(_LIMIT_BYTES + 1)
    except OSError:
        return None
    try:
        kept = json.loads(data) if len(data) <= _LIMIT_BYTES else None
    except (ValueError, RecursionError):
        kept = None
    if not (
        isinstance(kept, dict)
        and kept.get("format") == FORMAT
        and kept.get("question") == question.text
        and isinstance(kept.get("answer"), dict)
    ):
        ignored(path)
        return None
    answer: dict[str, Any] = kept["answer"]
    return answer


def ignored(path: Path | None) -> None:
    """Warn of a file that is not what it should be."""
    warnings.warn(
        f"[proof-cache] {path} is no proof of this version; it is found anew", EinsumCascadeWarning, stacklevel=2
    )


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, delete=False, encoding="utf-8", suffix=".draft"
        ) as draft:
            json.dump(value, draft, sort_keys=True)
        Path(draft.name).replace(path)
    except OSError:
        # A cache that cannot be written is no reason to fail.
        return


def parsed(text: str, names: set[str]) -> Expr | None:
    """Parse an expression over leaves by name; None if it is none."""
    from einsumcascade.language.parser import parse_expr

    given = Cascade(inputs=tuple(Input(tensor=n, indices=()) for n in sorted(names)), body=(), outputs=())
    try:
        e = parse_expr(text, names_of=given)
    except CascadeError:
        return None
    return e if {r.tensor for r in reads(e)} <= names else None

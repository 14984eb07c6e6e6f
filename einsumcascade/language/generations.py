"""Checks of iterative blocks: which generation of a tensor exists when a statement reads it.

In `iter m:` a tensor written at `m + 1` holds generation `m + 1` after its statement, and `m` before it; in
`iter m desc:` one written at `m` has `m + 1` before it. The first generation comes from an `init`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from einsumcascade.errors import Diagnostic
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    rank_of,
    reads,
    walk,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    """One Einsum of a block that writes a generation.

    Args:
        axis: the axis that the iterative variable walks.
        offset: what the Einsum adds to the variable there.
        place: position of the Einsum in the block.
        inner: the block directly inside this one that holds it, by identity, or None.
    """

    axis: int
    offset: int
    place: int
    inner: int | None


def offset_from(index: Expr, variable: str) -> int | None:
    """Return c of an index `variable + c`, None for any other."""
    match index:
        case Var(name=name) if name == variable:
            return 0
        case Apply(op="add", args=(Var(name=name), Num(value=int(c)))) if name == variable:
            return c
        case Apply(op="add", args=(Num(value=int(c)), Var(name=name))) if name == variable:
            return c
        case Apply(op="sub", args=(Var(name=name), Num(value=int(c)))) if name == variable:
            return -c
        case _:
            return None


def stateless(cascade: Cascade) -> dict[str, Read]:
    """Map each tensor that carries a value from step to step, but has no `init`, to the first read that needs one."""
    begun = {s.tensor for s in walk(cascade.body) if isinstance(s, Init)}
    out: dict[str, Read] = {}
    for block in (s for s in walk(cascade.body) if isinstance(s, Iter)):
        writes = _writes(block)
        sign = -1 if block.descending else 1
        for place, (s, _) in enumerate(_placed(block)):
            for r in reads(s.expr):
                for w in writes.get(r.tensor, ()):
                    at = offset_from(r.indices[w.axis], block.var) if w.axis < len(r.indices) else None
                    # A step may look back at what an earlier statement wrote; only the first look is out of range.
                    earlier = at is not None and at * sign < w.offset * sign and (w.offset or w.place >= place)
                    if earlier and r.tensor not in begun:
                        out.setdefault(r.tensor, r)
    return out


def check_generations(cascade: Cascade) -> Iterator[Diagnostic]:
    """Yield a diagnostic for each missing first generation and each read of one that does not exist yet."""
    for tensor, read in stateless(cascade).items():
        yield Diagnostic(
            code="missing-init",
            headline=f"{tensor} has no first generation",
            span=read.span,
            rule="a tensor that carries a value from step to step begins with an `init`",
            hint=f"before the block: init {Read(tensor=tensor, indices=_first(cascade, tensor))} = 0",
        )
    for block in (s for s in walk(cascade.body) if isinstance(s, Iter)):
        yield from list(_future(cascade, block)) or _unconnected(cascade, block)
    yield from _before(cascade)


def _before(cascade: Cascade) -> Iterator[Diagnostic]:
    """Reads, ahead of a block, of generations that the block makes."""
    begun = {(s.tensor, n, i) for s in walk(cascade.body) if isinstance(s, Init) for n, i in enumerate(s.indices)}
    for k, block in enumerate(cascade.body):
        if not isinstance(block, Iter):
            continue
        made = {t: ws[0] for t, ws in _writes(block).items() if any(t == name for name, _, _ in begun)}
        for x in (x for x in walk(cascade.body[:k]) if not isinstance(x, Iter)):
            for r in reads(x.expr, *(x.where if isinstance(x, Einsum) else ())):
                w = made.get(r.tensor)
                if w is not None and w.axis < len(r.indices) and (r.tensor, w.axis, r.indices[w.axis]) not in begun:
                    yield Diagnostic(
                        code="future-generation",
                        headline=f"{r} does not exist yet when {x.tensor} reads it",
                        span=r.span,
                        rule=f"iter {block.var}, which makes {r.tensor}, stands below",
                        hint=f"move {x.tensor} below the block, or read the generation that its init gives",
                    )


def _unconnected(cascade: Cascade, block: Iter) -> Iterator[Diagnostic]:
    """First generations that no step follows, and steps that follow none."""
    first: Expr = Scalar(name=rank_of(block.var)) if block.descending else Num(value=0)
    offset = 0 if block.descending else 1
    for tensor, writes in _writes(block).items():
        w = writes[0]
        if w.offset == 0 and not block.descending:
            # Another block carries it, or none does.
            continue
        for init in (s for s in walk(cascade.body) if isinstance(s, Init) and s.tensor == tensor):
            begins = init.indices[w.axis] if w.axis < len(init.indices) else first
            if isinstance(begins, Var) or (begins == first and w.offset == offset):
                continue
            wrong = (
                f"its init gives generation {begins}"
                if begins != first
                else f"each step writes {_at(block.var, w.offset)}"
            )
            yield Diagnostic(
                code="future-generation",
                headline=f"no step of iter {block.var} follows the first generation of {tensor}: {wrong}",
                span=init.span,
                rule=f"the init gives generation {first}, and each step writes {_at(block.var, offset)}",
                hint=f"write `init {Read(tensor=tensor, indices=_first(cascade, tensor))}`"
                if begins != first and not block.descending
                else f"write {tensor} at {block.var}{' + 1' if offset else ''}, its init at {first}",
            )


def _first(cascade: Cascade, tensor: str) -> tuple[Expr, ...]:
    """Where an `init` of a tensor would write: slice 0 of the axis that holds its generations."""
    written = next(e.indices for e in cascade.einsums if e.tensor == tensor)
    return tuple(i if isinstance(i, Var) else Num(value=0) for i in written)


def _placed(block: Iter) -> list[tuple[Einsum, int | None]]:
    """Every Einsum of a block in order, with the block directly inside that holds it."""
    out: list[tuple[Einsum, int | None]] = []
    for s in block.body:
        inside: tuple[Statement, ...] = (s,)
        out += [(e, id(s) if isinstance(s, Iter) else None) for e in walk(inside) if isinstance(e, Einsum)]
    return out


def _writes(block: Iter) -> dict[str, list[_Write]]:
    out: dict[str, list[_Write]] = {}
    for place, (e, inner) in enumerate(_placed(block)):
        for axis, index in enumerate(e.indices):
            offset = offset_from(index, block.var)
            if offset is not None:
                out.setdefault(e.tensor, []).append(_Write(axis=axis, offset=offset, place=place, inner=inner))
    return out


def _future(cascade: Cascade, block: Iter) -> Iterator[Diagnostic]:
    writes = _writes(block)
    sign = -1 if block.descending else 1
    begun = {(s.tensor, n, i) for s in walk(cascade.body) if isinstance(s, Init) for n, i in enumerate(s.indices)}
    for place, (s, inner) in enumerate(_placed(block)):
        for r in reads(s.expr, *s.where):
            found = [w for w in writes.get(r.tensor, ()) if w.axis < len(r.indices)]
            late = [w for w in found if _is_late(r.indices[w.axis], w, block, sign, place, inner)]
            if r.tensor not in {t for t, _, _ in begun}:
                # Without a first generation, a read above the Einsum that writes is one before it is written.
                late = [w for w in late if offset_from(r.indices[w.axis], block.var) != w.offset]
            if not found or len(late) < len(found) or (r.tensor, late[0].axis, r.indices[late[0].axis]) in begun:
                continue
            w = late[0]
            order = "descends" if block.descending else "ascends"
            yield Diagnostic(
                code="future-generation",
                headline=f"{r} does not exist yet when {s.tensor} reads it",
                span=r.span,
                rule=f"iter {block.var} {order}, and each step writes {_at(block.var, w.offset)} of {r.tensor}",
                hint=_hint(r, w, place, s.tensor),
            )


def _is_late(index: Expr, w: _Write, block: Iter, sign: int, place: int, inner: int | None) -> bool:
    at = offset_from(index, block.var)
    if at is not None:
        if at == w.offset:
            # Inside one inner block, that block decides.
            return w.place >= place and (inner is None or w.inner != inner)
        return at * sign > w.offset * sign
    # The last slice exists after the last step.
    return index == (Num(value=0) if block.descending else Scalar(name=rank_of(block.var)))


def _at(variable: str, offset: int) -> str:
    return f"generation {variable}" + (f" {'+' if offset > 0 else '-'} {abs(offset)}" if offset else "")


def _hint(r: Read, w: _Write, place: int, reader: str) -> str:
    if w.place > place:
        return f"move the Einsum that writes {r.tensor} above that of {reader}, or read an earlier generation"
    return "read an earlier generation, or read this one after the block"

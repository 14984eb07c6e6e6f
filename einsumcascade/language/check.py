"""Checks of a whole cascade: each broken rule is one diagnostic."""

from __future__ import annotations

from collections.abc import Iterator

from einsumcascade.errors import Diagnostic, nearest
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Read,
    Statement,
    rank_of,
    reads,
    subexpressions,
    variable_of,
    variables,
    walk,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")


def check(cascade: Cascade) -> Iterator[Diagnostic]:
    """Yield every broken rule of a cascade, in the order of its statements.

    Checked: every tensor is written once and before it is read, with as many indices; every rank has an extent;
    conditions are conditions; outputs exist. Cost: linear in the cascade.
    """
    yield from _declarations(cascade)
    arity = {i.tensor: len(i.indices) for i in cascade.inputs}
    everything = dict(arity)
    for s in walk(cascade.body):
        if isinstance(s, Einsum | Init):
            everything.setdefault(s.tensor, len(s.indices))
    known = set(extents_known(cascade))
    for c in cascade.constraints:
        yield from _condition(c, cascade)
        yield from _accesses((c,), everything, set(everything))
    yield from _statements(cascade, cascade.body, everything, set(arity), known)
    written = set(everything)
    if not cascade.outputs:
        yield Diagnostic(code="no-output", headline="no tensor leaves the cascade",
                         rule="`out` names the tensors a caller gets", hint=f"out {_last(cascade)}")
    for o in cascade.outputs:
        if o.tensor not in written:
            yield Diagnostic(code="unknown-tensor", headline=f"the output '{o.tensor}' is never written", span=o.span,
                             rule="an output is written by an Einsum", hint=nearest(o.tensor, sorted(written)))
        if o.dtype is not None and o.dtype not in DTYPES:
            yield Diagnostic(code="unknown-dtype", headline=f"'{o.dtype}' is no dtype of an output", span=o.span,
                             rule="outputs have the dtype of the first input unless one is named",
                             hint=nearest(o.dtype, DTYPES))


def extents_known(cascade: Cascade) -> tuple[str, ...]:
    """Variables whose extent an input or a `rank` statement gives, in order."""
    named = [v for i in cascade.inputs for v in i.indices] + [r.name for r in cascade.ranks]
    return tuple(dict.fromkeys(named))


def _last(cascade: Cascade) -> str:
    einsums = cascade.einsums
    return einsums[-1].tensor if einsums else "T"


def _declarations(cascade: Cascade) -> Iterator[Diagnostic]:
    seen: dict[str, str] = {}
    for kind, name, span in (
        *(("an input", i.tensor, i.span) for i in cascade.inputs),
        *(("a constant", c.name, c.span) for c in cascade.constants),
    ):
        if name in seen:
            yield Diagnostic(code="defined-twice", headline=f"'{name}' is {seen[name]} and {kind}", span=span,
                             rule="a name means one thing")
        seen[name] = kind
    for i in cascade.inputs:
        for v in i.indices:
            if v[0].isupper():
                yield Diagnostic(code="rank-variable-case", headline=f"'{v}' is no rank variable", span=i.span,
                                 rule="rank variables are lower case, extents upper case",
                                 hint=f"{i.tensor}[..., {variable_of(v)}]")
        if len(set(i.indices)) < len(i.indices):
            yield Diagnostic(code="rank-repeated", headline=f"{i.tensor} has a rank twice", span=i.span,
                             rule="each axis of an input has a rank of its own")
    tensors = {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}
    for v in extents_known(cascade):
        if rank_of(v) in tensors and any(s.name == rank_of(v) for d in (*cascade.constants, *cascade.ranks)
                                         for s in subexpressions(d.expr) if hasattr(s, "name")):
            yield Diagnostic(code="name-clash", headline=f"'{rank_of(v)}' is a tensor and an extent",
                             rule="a bare upper-case name is a scalar tensor or an extent, not both")


def _statements(cascade: Cascade, body: tuple[Statement, ...], arity: dict[str, int], written: set[str],
                known: set[str]) -> Iterator[Diagnostic]:
    for s in body:
        match s:
            case Iter():
                if s.var not in known:
                    yield _unbound(s.var, s, known)
                inner = {x.tensor for x in walk(s.body) if isinstance(x, Einsum)}
                yield from _statements(cascade, s.body, arity, written | (inner & _inits(cascade)), known)
                written |= inner
            case Init() | Einsum():
                exprs = (s.expr, *s.where) if isinstance(s, Einsum) else (s.expr,)
                yield from _accesses(exprs, arity, written)
                for v in variables(*s.indices, *exprs):
                    if v not in known:
                        yield _unbound(v, s, known)
                if len(s.indices) != arity[s.tensor]:
                    yield Diagnostic(code="index-count", span=s.span,
                                     headline=f"{s.tensor} has {arity[s.tensor]} indices before, here {len(s.indices)}",
                                     rule="a tensor has as many indices wherever it stands")
                if isinstance(s, Einsum):
                    if s.tensor in written and s.tensor not in _inits(cascade):
                        what = "an input" if cascade.input(s.tensor) else "written before"
                        yield Diagnostic(code="defined-twice", headline=f"{s.tensor} is {what} and written here",
                                         span=s.span, rule="each tensor is written by one Einsum",
                                         hint="give the result another name")
                    for c in s.where:
                        yield from _condition(c, cascade)
                written.add(s.tensor)


def _inits(cascade: Cascade) -> set[str]:
    return {s.tensor for s in walk(cascade.body) if isinstance(s, Init)}


def _unbound(v: str, s: Statement, known: set[str]) -> Diagnostic:
    return Diagnostic(code="unbound-rank", headline=f"nothing gives the rank variable '{v}' an extent", span=s.span,
                      rule="a rank has its extent from an input or a `rank` statement",
                      hint=nearest(v, sorted(known)))


def _accesses(exprs: tuple[Expr, ...], arity: dict[str, int], written: set[str]) -> Iterator[Diagnostic]:
    for r in reads(*exprs):
        if r.tensor not in arity:
            yield Diagnostic(code="unknown-tensor", headline=f"no tensor is called '{r.tensor}'", span=r.span,
                             rule="a tensor is an input or written by an earlier Einsum",
                             hint=nearest(r.tensor, sorted(arity)))
        elif r.tensor not in written:
            yield Diagnostic(code="read-before-write", headline=f"{r.tensor} is read before it is written",
                             span=r.span, rule="an Einsum reads inputs and what earlier Einsums wrote",
                             hint="move its Einsum up")
        elif len(r.indices) != arity[r.tensor]:
            yield Diagnostic(code="index-count", span=r.span,
                             headline=f"{r.tensor} has {arity[r.tensor]} ranks, here are {len(r.indices)} indices",
                             rule="a read has one index expression for each rank")


def _condition(expr: Expr, cascade: Cascade) -> Iterator[Diagnostic]:
    if not (isinstance(expr, Apply) and expr.row.condition):
        yield Diagnostic(code="not-a-condition", headline=f"'{expr}' is a number, not a condition", span=expr.span,
                         rule="constraint and where take comparisons joined by and, or, not",
                         hint="for instance m <= p")
    known = set(extents_known(cascade))
    for v in variables(expr):
        if v not in known:
            yield Diagnostic(code="unbound-rank", headline=f"nothing gives the rank variable '{v}' an extent",
                             span=expr.span, rule="a rank has its extent from an input or a `rank` statement",
                             hint=nearest(v, sorted(known)))

"""Checks of a whole cascade: each broken rule is one diagnostic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from einsumcascade.errors import Diagnostic, nearest
from einsumcascade.language.fiberwise import check_fiberwise
from einsumcascade.language.generations import check_generations, stateless
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Statement,
    rank_of,
    reads,
    scalars,
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
    yield from check_generations(cascade)
    written = set(everything)
    if not cascade.outputs:
        yield Diagnostic(
            code="no-output",
            headline="no tensor leaves the cascade",
            rule="`out` names the tensors a caller gets",
            hint=f"out {_last(cascade)}",
        )
    for n, o in enumerate(cascade.outputs):
        if o.tensor in cascade.output_names[:n]:
            yield Diagnostic(
                code="defined-twice",
                headline=f"{o.tensor} leaves the cascade twice",
                span=o.span,
                rule="an output is named once",
            )
        if o.tensor not in written:
            yield Diagnostic(
                code="unknown-tensor",
                headline=f"the output '{o.tensor}' is never written",
                span=o.span,
                rule="an output is written by an Einsum",
                hint=nearest(o.tensor, sorted(written)),
            )
        if o.dtype is not None and o.dtype not in DTYPES:
            yield Diagnostic(
                code="unknown-dtype",
                headline=f"'{o.dtype}' is no dtype of an output",
                span=o.span,
                rule="outputs have the dtype of the first input unless one is named",
                hint=nearest(o.dtype, DTYPES),
            )


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
            yield Diagnostic(
                code="defined-twice",
                headline=f"'{name}' is {seen[name]} and {kind}",
                span=span,
                rule="a name means one thing",
            )
        seen[name] = kind
    for c in cascade.constants:
        if c.name[0].isupper():
            yield Diagnostic(
                code="constant-case",
                headline=f"'{c.name}' is no name of a constant",
                span=c.span,
                rule="constants are lower case; an upper-case name is a tensor or an extent",
                hint=f"const {c.name.lower()} = ...",
            )
    for i in cascade.inputs:
        for v in i.indices:
            if v[0].isupper():
                yield Diagnostic(
                    code="rank-variable-case",
                    headline=f"'{v}' is no rank variable",
                    span=i.span,
                    rule="rank variables are lower case, extents upper case",
                    hint=f"{i.tensor}[..., {variable_of(v)}]",
                )
        if len(set(i.indices)) < len(i.indices):
            yield Diagnostic(
                code="rank-repeated",
                headline=f"{i.tensor} has a rank twice",
                span=i.span,
                rule="each axis of an input has a rank of its own",
            )
    yield from _circular_definitions(cascade)
    written = {e.tensor for e in cascade.einsums}
    variables_known = extents_known(cascade)
    for c in cascade.constants:
        if c.name in written:
            yield Diagnostic(
                code="defined-twice",
                headline=f"'{c.name}' is a constant and written by an Einsum",
                span=c.span,
                rule="a name means one thing",
            )
        if c.name in variables_known or variable_of(c.name) in variables_known:
            what = "a rank variable" if c.name in variables_known else "an extent"
            yield Diagnostic(
                code="name-clash",
                headline=f"'{c.name}' is a constant and {what}",
                span=c.span,
                rule="a name means one thing",
            )
    # Only a bare use is ambiguous: X[y, x] is a tensor, whatever the extent of x is called.
    bare = [r for e in _expressions(cascade) for r in reads(e) if not r.indices]
    for v in variables_known:
        for r in bare:
            if r.tensor == rank_of(v):
                yield Diagnostic(
                    code="name-clash",
                    headline=f"'{r.tensor}' is a tensor and an extent",
                    span=r.span,
                    rule="a bare upper-case name is a scalar tensor or an extent, not both",
                )
                break
    for e in _expressions(cascade):
        for s in subexpressions(e):
            if isinstance(s, Apply) and s.op in ("and", "or", "not", "select"):
                for operand in s.args[:1] if s.op == "select" else s.args:
                    if not (isinstance(operand, Apply) and operand.row.condition):
                        yield Diagnostic(
                            code="not-a-condition",
                            span=operand.span,
                            headline=f"'{operand}' is a number, not a condition",
                            rule="and, or, not and select take comparisons",
                            hint="for instance m <= p",
                        )


def _circular_definitions(cascade: Cascade) -> Iterator[Diagnostic]:
    defined = {c.name: c for c in cascade.constants} | {rank_of(r.name): r for r in cascade.ranks}
    for name, d in defined.items():
        needed = list(scalars(d.expr))
        for n in needed:
            needed += [m for m in scalars(defined[n].expr) if m not in needed] if n in defined else []
        if name in needed:
            yield Diagnostic(
                code="cyclic-cascade",
                headline=f"the definition of {name} needs {name} itself",
                span=d.span,
                rule="a constant or an extent is defined by others",
            )
            return


def _expressions(cascade: Cascade) -> Iterator[Expr]:
    """Every expression of a cascade, those of its declarations first."""
    yield from (d.expr for d in (*cascade.constants, *cascade.ranks))
    yield from cascade.constraints
    for s in walk(cascade.body):
        if not isinstance(s, Iter):
            yield s.expr
            yield from s.where if isinstance(s, Einsum) else ()


def _statements(
    cascade: Cascade,
    body: tuple[Statement, ...],
    arity: dict[str, int],
    written: set[str],
    known: set[str],
    open_ranks: tuple[str, ...] = (),
) -> Iterator[Diagnostic]:
    slices: set[tuple[str, tuple[Expr, ...]]] = set()
    for s in body:
        match s:
            case Iter():
                if s.var not in known:
                    yield _unbound(s.var, s, known)
                if s.var in open_ranks:
                    yield Diagnostic(
                        code="rank-repeated",
                        headline=f"{s.var} is iterated within iter {s.var}",
                        span=s.span,
                        rule="each iterative block has a rank of its own",
                    )
                inner = {x.tensor for x in walk(s.body) if isinstance(x, Einsum)}
                yield from _statements(
                    cascade, s.body, arity, written | (inner & _inits(cascade)), known, (*open_ranks, s.var)
                )
                written |= inner
            case Init() | Einsum():
                exprs = (s.expr, *s.where) if isinstance(s, Einsum) else (s.expr,)
                yield from check_fiberwise(s)
                yield from _numbers(s.expr, truth=isinstance(s, Einsum) and s.reduce == "any")
                yield from _accesses(exprs, arity, written, cycles(cascade, s.tensor))
                for v in variables(*s.indices, *exprs):
                    if v not in known:
                        yield _unbound(v, s, known)
                if len(s.indices) != arity[s.tensor]:
                    yield Diagnostic(
                        code="index-count",
                        span=s.span,
                        headline=f"{s.tensor} has {arity[s.tensor]} indices before, here {len(s.indices)}",
                        rule="a tensor has as many indices wherever it stands",
                    )
                if isinstance(s, Einsum):
                    stray = [v for v in variables(*s.where) if v not in (*s.space, *open_ranks) and v in known]
                    if stray:
                        listed = ", ".join(stray)
                        yield Diagnostic(
                            code="rank-not-reduced",
                            span=s.span,
                            headline=f"{listed}: in a condition, neither on the left nor reduced",
                            rule="a condition of an Einsum goes over the ranks that it iterates",
                            hint=f":: {s.reduce or 'sum'}({', '.join([*s.ranks, *stray])})",
                        )
                    if (s.tensor, s.indices) in slices and s.tensor in _inits(cascade):
                        yield Diagnostic(
                            code="defined-twice",
                            headline=f"{s} writes what is written before",
                            span=s.span,
                            rule="each element of a tensor is written by one Einsum",
                        )
                    slices.add((s.tensor, s.indices))
                    if s.tensor in written and s.tensor not in _inits(cascade):
                        what = "an input" if cascade.input(s.tensor) else "written before"
                        yield Diagnostic(
                            code="defined-twice",
                            headline=f"{s.tensor} is {what} and written here",
                            span=s.span,
                            rule="each tensor is written by one Einsum",
                            hint="give the result another name",
                        )
                    for c in s.where:
                        yield from _condition(c, cascade)
                written.add(s.tensor)


def _inits(cascade: Cascade) -> set[str]:
    """Tensors with a first generation; one that lacks it has a diagnostic of its own."""
    return {s.tensor for s in walk(cascade.body) if isinstance(s, Init)} | stateless(cascade).keys()


def _unbound(v: str, s: Statement, known: set[str]) -> Diagnostic:
    return Diagnostic(
        code="unbound-rank",
        headline=f"nothing gives the rank variable '{v}' an extent",
        span=s.span,
        rule="a rank has its extent from an input or a `rank` statement",
        hint=nearest(v, sorted(known)),
    )


def cycles(cascade: Cascade, tensor: str) -> dict[str, tuple[str, ...]]:
    """Map each tensor that depends on `tensor` and that `tensor` reads to the way round, `tensor` at both ends."""
    direct: dict[str, dict[str, None]] = {}
    for s in walk(cascade.body):
        if isinstance(s, Einsum):
            direct.setdefault(s.tensor, {}).update(dict.fromkeys(r.tensor for r in reads(s.expr, *s.where)))
    out: dict[str, tuple[str, ...]] = {}
    for start in direct.get(tensor, ()):
        came: dict[str, str | None] = {start: None}
        queue = [start]
        for name in queue:
            for following in direct.get(name, ()):
                if following not in came:
                    came[following] = name
                    queue.append(following)
        if tensor in came:
            way: list[str] = []
            at: str | None = tensor
            while at is not None:
                way.append(at)
                at = came[at]
            out[start] = (tensor, *reversed(way))
    return out


def _accesses(
    exprs: tuple[Expr, ...],
    arity: dict[str, int],
    written: set[str],
    around: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Iterator[Diagnostic]:
    for r in reads(*exprs):
        if r.tensor not in arity:
            yield Diagnostic(
                code="unknown-tensor",
                headline=f"no tensor is called '{r.tensor}'",
                span=r.span,
                rule="a tensor is an input or written by an earlier Einsum",
                hint=nearest(r.tensor, sorted(arity)),
            )
        elif r.tensor not in written and r.tensor in around:
            way = around[r.tensor]
            yield Diagnostic(
                code="cyclic-cascade",
                headline=f"{way[0]} depends on itself: {' <- '.join(way)}",
                span=r.span,
                rule="a cascade has an order in which each Einsum reads what is written before",
                hint="what is carried from step to step is R[i+1] = f(R[i]) in a block `iter i:` after an `init`",
            )
        elif r.tensor not in written:
            yield Diagnostic(
                code="read-before-write",
                headline=f"{r.tensor} is read before it is written",
                span=r.span,
                rule="an Einsum reads inputs and what earlier Einsums wrote",
                hint="move its Einsum up",
            )
        elif len(r.indices) != arity[r.tensor]:
            yield Diagnostic(
                code="index-count",
                span=r.span,
                headline=f"{r.tensor} has {arity[r.tensor]} ranks, here are {len(r.indices)} indices",
                rule="a read has one index expression for each rank",
            )


def _numbers(expr: Expr, *, truth: bool) -> Iterator[Diagnostic]:
    """Conditions that stand where a number is wanted; `truth`: a condition is wanted here."""
    if not isinstance(expr, Apply):
        return
    if expr.row.condition and not truth:
        yield Diagnostic(
            code="not-a-number",
            headline=f"'{expr}' is a condition, not a number",
            span=expr.span,
            rule="arithmetic is on numbers; `any` alone reduces conditions",
            hint=f"select({expr}, 1, 0)",
        )
    for n, a in enumerate(expr.args):
        wants_truth = expr.op in ("and", "or", "not", "eq", "ne") or (expr.op == "select" and n == 0)
        yield from _numbers(a, truth=wants_truth)


def _condition(expr: Expr, cascade: Cascade) -> Iterator[Diagnostic]:
    if not (isinstance(expr, Apply) and expr.row.condition):
        yield Diagnostic(
            code="not-a-condition",
            headline=f"'{expr}' is a number, not a condition",
            span=expr.span,
            rule="constraint and where take comparisons joined by and, or, not",
            hint="for instance m <= p",
        )
    known = set(extents_known(cascade))
    for v in variables(expr):
        if v not in known:
            yield Diagnostic(
                code="unbound-rank",
                headline=f"nothing gives the rank variable '{v}' an extent",
                span=expr.span,
                rule="a rank has its extent from an input or a `rank` statement",
                hint=nearest(v, sorted(known)),
            )

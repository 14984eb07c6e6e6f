"""Take out of a reduction what does not vary along it (R1), and what a maximum lets through (R8).

    AV = A * V :: sum(m), A = SN / SD      ->   AVN = SN * V :: sum(m),  AV = AVN / SD
    QK = scale * Q * K :: sum(e)           ->   QKN = Q * K :: sum(e),   QK = scale * QKN
    GM = scale * QKN :: max(m), scale > 0  ->   GMN = QKN :: max(m),     GM = scale * GMN

Precondition: the operator that joins the two parts distributes over the reduction (a law of the operator table);
for a product under a maximum the factor must be positive. Source: FuseMax section IV-A; RedFuser.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    variables,
)
from einsumcascade.language.ops import OPS
from einsumcascade.rewrites.algebra import (
    drop_dead,
    factors,
    fresh,
    inline_reads,
    is_map,
    is_positive,
    names_taken,
    producers,
    product,
    terms,
    total,
)
from einsumcascade.rewrites.step import Rewritten, Step


def expand_means(cascade: Cascade) -> Rewritten:
    """Write a mean as a sum over a count of live points, and any as a maximum: reductions with laws of their own."""
    taken = names_taken(cascade)
    steps: list[Step] = []

    def one_any(s: Einsum) -> tuple[Statement, ...]:
        truth = (
            s.expr
            if isinstance(s.expr, Apply) and s.expr.row.condition
            else Apply(op="ne", args=(s.expr, Num(value=0)))
        )
        most = fresh(s.tensor + "M", taken)
        number = Apply(op="select", args=(truth, Num(value=1.0), Num(value=0.0)))
        value = Apply(op="max", args=(Read(tensor=most, indices=s.indices), Num(value=0.0)))
        new = (
            replace(s, tensor=most, expr=number, reduce="max"),
            replace(s, reduce=None, ranks=(), where=(), expr=value),
        )
        steps.append(
            Step(
                rule="any",
                what=f"{s.tensor} is a maximum of zeros and ones",
                before=(str(s),),
                after=tuple(map(str, new)),
            )
        )
        return new

    def one(s: Statement) -> tuple[Statement, ...]:
        if isinstance(s, Iter):
            return (replace(s, body=tuple(n for b in s.body for n in one(b))),)
        if isinstance(s, Einsum) and s.reduce == "any":
            return one_any(s)
        if not isinstance(s, Einsum) or s.reduce != "mean":
            return (s,)
        top = fresh(s.tensor + "S", taken)
        if _is_full(s, cascade):
            number: Expr = Scalar(name=rank_of(s.ranks[0]))
            for v in s.ranks[1:]:
                number = Apply(op="mul", args=(number, Scalar(name=rank_of(v))))
            number = Apply(op="max", args=(number, Num(value=1)))
            mean = Apply(op="div", args=(Read(tensor=top, indices=s.indices), number))
            pair = (replace(s, tensor=top, reduce="sum"), replace(s, reduce=None, ranks=(), expr=mean))
            steps.append(
                Step(
                    rule="mean",
                    what=f"{s.tensor} is a sum over the number of points",
                    before=(str(s),),
                    after=tuple(map(str, pair)),
                )
            )
            return pair
        count = fresh(s.tensor + "C", taken)
        ones = _ones(s, count)
        size = Read(tensor=count, indices=ones.indices)
        new = (
            replace(s, tensor=top, reduce="sum"),
            ones,
            replace(
                s,
                reduce=None,
                ranks=(),
                where=(),
                expr=Apply(op="div", args=(Read(tensor=top, indices=s.indices), size)),
            ),
        )
        steps.append(
            Step(
                rule="mean",
                what=f"{s.tensor} is a sum over the number of live points",
                before=(str(s),),
                after=tuple(map(str, new)),
            )
        )
        return new

    body = tuple(n for s in cascade.body for n in one(s))
    return Rewritten(cascade=cascade.with_body(body), steps=tuple(steps))


def _is_full(s: Einsum, cascade: Cascade) -> bool:
    """Whether every point of a reduction is live, whatever the inputs."""
    over = set(s.ranks)
    culled = any(set(variables(c)) & over and set(variables(c)) <= set(s.space) for c in cascade.constraints)
    plain = all(isinstance(i, Var) or not set(variables(i)) & over for r in reads(s.expr) for i in r.indices)
    return not culled and not s.where and plain


def _ones(s: Einsum, name: str) -> Einsum:
    """The count of the live points of a reduction; it names each variable, so that the space stays the same."""
    out: Expr = Num(value=1)
    for v in s.space:
        out = Apply(op="add", args=(out, Apply(op="mul", args=(Num(value=0), Var(name=v)))))
    return replace(s, tensor=name, expr=out, reduce="sum")


def localise(cascade: Cascade) -> Rewritten:
    """Write a constraint over ranks that nothing reduces as a condition of each reduction.

        constraint p < n;  S[p] = X[p,m] :: sum(m)   ->   S[p] = X[p,m] :: sum(m) where p < n

    Such a constraint empties whole fibers, which gives their reduction its identity; an Einsum that only maps a
    reduction's result would be culled there and have no value at all.
    """
    reduced = {v for e in cascade.einsums for v in e.ranks}
    moved = tuple(c for c in cascade.constraints if not set(variables(c)) & reduced)
    if not moved:
        return Rewritten(cascade=cascade)
    steps: list[Step] = []

    def one(s: Statement) -> Statement:
        if isinstance(s, Iter):
            return replace(s, body=tuple(one(b) for b in s.body))
        if not isinstance(s, Einsum) or s.reduce is None:
            return s
        own = tuple(c for c in moved if set(variables(c)) <= set(s.space))
        return replace(s, where=(*s.where, *own)) if own else s

    body = tuple(one(s) for s in cascade.body)
    kept = tuple(c for c in cascade.constraints if c not in moved)
    steps.append(
        Step(
            rule="local constraint",
            what=f"{', '.join(map(str, moved))} empties whole fibers: it becomes a condition of the reductions",
        )
    )
    return Rewritten(cascade=replace(cascade, body=body, constraints=kept), steps=tuple(steps))


def defer(cascade: Cascade, *, immediate: bool = False, whole: Collection[str] = ()) -> Rewritten:
    """Apply R1 and R8 wherever they hold, to a fixed point.

    Args:
        immediate: leave inside what depends on a reduction over the same rank.
        whole: variables of ranks that a tile holds whole. A sum over these alone waits for nothing, so what a
            definition below it multiplies stays there, once for each row of an operand, not for each pair of rows.

    Returns: the cascade, equal in value, and one step for each Einsum changed. Never more passes than before.
    Cost: O(Einsums^2) in the number of Einsums.
    """
    steps: list[Step] = []
    done: set[str] = set()
    while True:
        for s in cascade.body:
            if not isinstance(s, Einsum) or s.tensor in done or s.reduction is None:
                continue
            done.add(s.tensor)
            new = _split(s, cascade, immediate=immediate, held=frozenset(whole))
            if new is None:
                continue
            raw, outer, rule = new
            done.add(raw.tensor)
            steps.append(Step(rule=rule, what=_sentence(raw, outer), before=(str(s),), after=(str(raw), str(outer))))
            body = tuple(n for b in cascade.body for n in ((raw, outer) if b is s else (b,)))
            cascade = cascade.with_body(body)
            break
        else:
            return Rewritten(cascade=drop_dead(cascade), steps=tuple(steps))


def _sentence(raw: Einsum, outer: Einsum) -> str:
    return f"what does not vary along {', '.join(raw.ranks)} leaves the reduction of {outer.tensor}"


def _split(s: Einsum, cascade: Cascade, *, immediate: bool, held: frozenset[str]) -> tuple[Einsum, Einsum, str] | None:
    assert s.reduction is not None
    defs = producers(cascade)
    reduced = set(s.ranks)

    def late(e: Expr) -> bool:
        found = {t for r in reads(e) for t in (r.tensor, *ancestors(cascade, r.tensor))}
        return any(t in defs and reduced & set(defs[t].ranks) for t in found)

    def stays(e: Expr) -> bool:
        return immediate and late(e)

    def opens(e: Expr, join: str) -> bool:
        """Whether a map's definition, seen from this reduction, has a part that lacks the reduced ranks."""
        found = _parts(e, join)
        leaving = [p for p, _ in found if not set(variables(p)) & reduced and not stays(p)]
        if reduced <= held and any(variables(p) or reads(p) for p in leaving):
            return False
        return len(found) > 1 and bool(leaving)

    apart = None if stays(s.expr) else _conditioned(s, reduced, cascade)
    if apart is not None:
        return apart
    for join in ("mul", "add"):
        if s.reduce == "mean" or not _lets_through(join, s):
            continue
        expr = s.expr
        for _ in range(20):
            parts = _parts(expr, join)
            outside = [
                (p, n)
                for p, n in parts
                if not set(variables(p)) & reduced and not stays(p) and _may_leave(p, join, s, cascade)
            ]
            if join == "add" and len(parts) - len(outside) > 1:
                # Two terms round in a unit of their own: a reference that cancels one of them must come first.
                outside = [x for x in outside if not late(x[0])]
            grown = tuple((_opened(p, defs, join, opens), n) for p, n in parts)
            if all(a is b for (a, _), (b, _) in zip(grown, parts, strict=True)):
                break
            expr = product(grown) if join == "mul" else total(grown)
        if not outside or len(outside) == len(parts) or all(p == Num(value=1) for p, _ in outside):
            continue
        inside = tuple(x for x in parts if x not in outside)
        build = product if join == "mul" else total
        taken = names_taken(cascade)
        raw = replace(s, tensor=fresh(s.tensor + "N", taken), expr=build(inside))
        if set(raw.space) != set(s.space) or not set(s.ranks) <= set(variables(raw.expr)):
            continue
        if not set(raw.free) <= set(variables(raw.expr)):
            # The rest no longer varies along some left rank; narrowing it is worth it only for a whole rank.
            keep = tuple(i for i in s.indices if set(variables(i)) & set(variables(raw.expr, *raw.where)))
            if any(set(variables(c)) & (set(s.free) - set(variables(*keep))) for c in cascade.constraints):
                continue
            raw = replace(raw, indices=keep)
        value: Expr = Read(tensor=raw.tensor, indices=raw.indices)
        whole = build(
            (*((outside[0],) if outside[0][1] > 0 else ()), (value, 1), *outside[1 if outside[0][1] > 0 else 0 :])
        )
        if join == "mul" and s.reduce == "sum" and any(n > 0 and _sinks(p, reduced, defs) for p, n in outside):
            # Of no key the factor is -inf and the sum 0.
            whole = apply("select", apply("eq", value, Num(value=0)), Num(value=0), whole)
        outer = replace(
            s,
            expr=whole,
            reduce=None,
            ranks=(),
            where=(),
        )
        return raw, outer, "R1 defer" if s.reduce in ("sum", "prod") or join == "add" else "R8 positive factor"
    return None


def _conditioned(s: Einsum, reduced: set[str], cascade: Cascade) -> tuple[Einsum, Einsum, str] | None:
    """A sum of what a condition lets through, `select(X[p] > 0, Y[p,m], 0) :: sum(m)`: it lets through the sum."""
    match s:
        case Einsum(reduce="sum", expr=Apply(op="select", args=(c, inside, Num(value=0)))):
            plain = all(isinstance(i, Var) for r in reads(inside) for i in r.indices)
            raw = replace(s, tensor=fresh(s.tensor + "N", names_taken(cascade)), expr=inside)
            # What is read at places that the condition keeps inside a tensor has no value without it.
            if not plain or set(variables(c)) & reduced or set(variables(*raw.indices, inside)) != set(s.space):
                return None
            if not set(s.ranks) | set(s.free) <= set(variables(inside)):
                return None
            value = apply("select", c, Read(tensor=raw.tensor, indices=raw.indices), Num(value=0))
            return raw, replace(s, expr=value, reduce=None, ranks=(), where=()), "R1 defer"
        case _:
            return None


def _sinks(e: Expr, over: set[str], defs: dict[str, Einsum]) -> bool:
    """Whether an expression is infinite where ranks have no point: it has a maximum over them, not exponentiated."""
    match e:
        case Read():
            d = defs.get(e.tensor)
            if d is None or (d.reduce is not None and d.reduce not in ("max", "min")):
                return False
            if d.reduce is not None:
                return bool(over & set(d.ranks))
            return is_map(d) and _sinks(d.expr, over, defs)
        case Apply(op=op, args=args):
            return not OPS[op].positive and any(_sinks(a, over, defs) for a in args)
        case _:
            return False


def _parts(expr: Expr, join: str) -> tuple[tuple[Expr, int], ...]:
    return factors(expr) if join == "mul" else terms(expr)


def _lets_through(join: str, s: Einsum) -> bool:
    if s.reduce in OPS[join].distributes_over:
        return True
    return join == "mul" and s.reduce in ("max", "min")


def _may_leave(part: Expr, join: str, s: Einsum, cascade: Cascade) -> bool:
    if join == "add":
        # c + max over nothing is c + (-inf): only a finite c may leave, so a bare read stays inside.
        return True
    if s.reduce in ("max", "min"):
        return is_positive(part, cascade)
    return True


def _opened(part: Expr, defs: dict[str, Einsum], join: str, opens: object) -> Expr:
    assert callable(opens)
    if isinstance(part, Read):
        d = defs.get(part.tensor)
        if d is not None and is_map(d):
            new = inline_reads(part, {part.tensor: d}, lambda r, _: r == part)
            if opens(new, join):
                return new
            if isinstance(new, Read):
                # Another name for the same: what it stands for may open.
                behind = _opened(new, defs, join, opens)
                return part if behind is new else behind
    return part

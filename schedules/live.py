"""Where a condition is live along a looped coordinate: intervals with every live point, intervals that are all live."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from einsumcascade.language.ir import Apply, Expr, Num, Read, Var, apply, variables
from einsumcascade.rewrites.algebra import factors, product
from einsumcascade.schedules.bounds import meet
from einsumcascade.schedules.intervals import (
    COMPARISONS,
    MIRRORED,
    NEGATED,
    ONE,
    ZERO,
    Known,
    Span,
    Truth,
    chosen,
    collected,
    decide,
    negated,
    over,
    plus,
    span,
    times,
)
from einsumcascade.schedules.intervals import both as both_true

# Intervals that a loop walks; what needs more is tested tile by tile.
MOST = 4


@dataclass(frozen=True, slots=True)
class Reach:
    """Positions from `lo` up to, not with, `hi`; None: no bound."""

    lo: Expr | None = None
    hi: Expr | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """Unions: `may` has every live position of a tile, in `must` each is live for all rows of it."""

    may: tuple[Reach, ...]
    must: tuple[Reach, ...]


EVERYWHERE = Live((Reach(),), (Reach(),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Conditions that all hold together along a looped coordinate.

    Args:
        live: where those of `holding` do. tests: those that are no union of few intervals.
    """

    live: Live
    holding: tuple[Expr, ...]
    tests: tuple[Expr, ...]


def solve_all(conditions: Mapping[Expr, Expr], known: Known, *, intervals: int = MOST) -> Solved:
    """Solve conditions one after the other.

    Args:
        conditions: over the streamed variable, by what they are called.
        known: of all other names. intervals: of full positions, at most.
    """
    live = EVERYWHERE
    holding: list[Expr] = []
    tests: list[Expr] = []
    for name, c in conditions.items():
        known.within.clear()
        found = solve(c, known)
        within: Truth = True
        for x in dict.fromkeys(known.within):
            within = both_true(within, x)
        if found is not None and within is not True:
            # All of a tile is live only where all that the condition reads is within its tensor.
            found = both(found, Live((Reach(),), _gated(within)))
        joined = None if found is None else both(live, found)
        if joined is None or len(joined.must) > intervals:
            tests.append(name)
        else:
            live = joined
            holding.append(name)
    return Solved(live=live, holding=tuple(holding), tests=tuple(tests))


def solve(condition: Expr, known: Known) -> Live | None:
    """Solve a condition for the streamed variable.

    Exact for sums, products with and whole quotients by positive numbers of a condition that has the variable once;
    None where the live set is not a union of few intervals.
    """
    match condition:
        case Apply(op="and" | "or"):
            sides = [solve(a, known) for a in condition.args]
            if sides[0] is None or sides[1] is None:
                return None
            return both(sides[0], sides[1]) if condition.op == "and" else either(sides[0], sides[1])
        case Apply(op="not", args=(Apply() as inner,)) if inner.op in COMPARISONS:
            return solve(apply(NEGATED[inner.op], *inner.args), known)
        case Apply(op="not", args=(Apply(op="and" | "or") as inner,)):
            sides_of = (apply("not", a) for a in inner.args)
            return solve(apply("or" if inner.op == "and" else "and", *sides_of), known)
        case Apply(op="ne"):
            return solve(apply("or", apply("lt", *condition.args), apply("gt", *condition.args)), known)
        case Apply() if condition.op in COMPARISONS:
            return _comparison(condition, known)
        case _:
            return None


def _comparison(condition: Apply, known: Known) -> Live | None:
    left, right = condition.args
    op = condition.op
    if op in MIRRORED:
        left, right, op = right, left, MIRRORED[op]
    form = collected(apply("sub", left, right))
    if not any(known.streamed in variables(k) for k in form):
        found = decide(condition, known)
        return None if found is None else Live(_gated(found[0]), _gated(found[1]))
    difference = _total(form)
    limit = Num(value=-1) if op == "lt" else ZERO
    upper = _bounded(difference, Span(limit, limit), below=True, known=known)
    if op != "eq":
        return upper
    lower = _bounded(difference, Span(limit, limit), below=False, known=known)
    return both(upper, lower) if upper is not None and lower is not None else None


def _total(form: dict[Expr, int]) -> Expr:
    out: Expr = ZERO
    for k, c in form.items():
        out = apply("add", out, apply("mul", Num(value=c), k))
    return out


def _gated(truth: Truth) -> tuple[Reach, ...]:
    """All positions where a truth value holds, none where not."""
    if isinstance(truth, bool):
        return (Reach(),) if truth else ()
    return (Reach(hi=chosen(truth, Num(value=(1 << 31) - 1), ZERO)),)


def _bounded(expr: Expr, limit: Span, *, below: bool, known: Known) -> Live | None:
    """Where `expr <= limit` (`below`) or `expr >= limit`: undo the operators around the variable one by one."""
    form = collected(expr)
    mine = [k for k in form if known.streamed in variables(k)]
    if len(mine) != 1:
        return None
    (key,) = mine
    for k, c in form.items():
        if k != key:
            s = span(apply("mul", Num(value=c), k) if k != ONE else Num(value=c), known)
            if s is None:
                return None
            limit = Span(plus(limit.lo, s.hi, -1), plus(limit.hi, s.lo, -1))
    coefficient = form[key]
    if coefficient < 0:
        limit, below = negated(limit), not below
    limit = _divided(limit, Num(value=abs(coefficient)), below=below, known=known)
    match key:
        case Var():
            if below:
                return Live((Reach(hi=plus(limit.hi, ONE)),), (Reach(hi=plus(limit.lo, ONE)),))
            return Live((Reach(lo=limit.lo),), (Reach(lo=limit.hi),))
        case Read():
            # In order of blocks: all before have at most the limit, or all from there on more than it.
            ends = (("least", limit.hi), ("most", limit.lo)) if below else (("most", limit.lo), ("least", limit.hi))
            may, must = (known.search(key, kind, x if below else plus(x, ONE, -1)) for kind, x in ends)
            if may is None or must is None:
                return None
            return Live((Reach(hi=may),), (Reach(hi=must),)) if below else Live((Reach(lo=may),), (Reach(lo=must),))
        case Apply(op="floordiv"):
            d = span(key.args[1], known)
            if d is None or not d.is_one or not known.is_positive(d.lo):
                return None
            if below:
                inner = Span(*(plus(times(plus(x, ONE), d.lo), ONE, -1) for x in (limit.lo, limit.hi)))
            else:
                inner = Span(times(limit.lo, d.lo), times(limit.hi, d.lo))
            return _bounded(key.args[0], inner, below=below, known=known)
        case Apply(op="mul"):
            parts = factors(key)
            moving = [f for f in parts if known.streamed in variables(f[0])]
            by = span(product(tuple(f for f in parts if f not in moving)), known)
            if len(moving) != 1 or any(n < 0 for _, n in parts) or by is None:
                return None
            if not by.is_one or not known.is_positive(by.lo):
                return None
            return _bounded(moving[0][0], _divided(limit, by.lo, below=below, known=known), below=below, known=known)
        case _:
            return None


def _divided(limit: Span, by: Expr, *, below: bool, known: Known) -> Span:
    """What bounds x where `by * x` is bounded: rounded down for a bound from above, else up."""
    if by == ONE:
        return limit
    ends = (limit.lo, limit.hi) if below else (plus(plus(x, by), ONE, -1) for x in (limit.lo, limit.hi))
    return Span(*(over(x, by, known) for x in ends))


# --- unions -------------------------------------------------------------------------------------------------------


def both(x: Live, y: Live) -> Live | None:
    """Where both hold."""
    may = _union(_common(a, b) for a, b in itertools.product(x.may, y.may))
    must = _union(_common(a, b) for a, b in itertools.product(x.must, y.must))
    return Live(may, must) if max(len(may), len(must)) <= MOST else None


def either(x: Live, y: Live) -> Live | None:
    """Where one of two holds; where all rows see one of them in turn is not seen."""
    may, must = _union((*x.may, *y.may)), _union((*x.must, *y.must))
    return Live(may, must) if max(len(may), len(must)) <= MOST else None


def _common(a: Reach, b: Reach) -> Reach:
    lows, highs = [e for e in (a.lo, b.lo) if e is not None], [e for e in (a.hi, b.hi) if e is not None]
    return Reach(meet("max", lows) if lows else None, meet("min", highs) if highs else None)


def _union(reaches: Iterable[Reach]) -> tuple[Reach, ...]:
    """Intervals that begin or end together are one."""
    out: list[Reach] = []
    for r in dict.fromkeys(reaches):
        for n, s in enumerate(out):
            if r.lo is None and s.lo is None:
                out[n] = Reach(None, apply("max", s.hi, r.hi) if s.hi is not None and r.hi is not None else None)
                break
            if r.hi is None and s.hi is None:
                out[n] = Reach(apply("min", s.lo, r.lo) if s.lo is not None and r.lo is not None else None, None)
                break
        else:
            out.append(r)
    return (Reach(),) if Reach() in out else tuple(out)

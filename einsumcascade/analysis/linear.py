"""Comparisons of whole numbers as linear bounds, and the closed form of how many points they leave.

A condition is brought to `sum of c * a <= limit`, where each `a` is a variable, or a floor quotient or a remainder by a
number. One variable, the pivot, is left to run; given it, each other variable has an interval. On one residue class of
the pivot all ends of intervals are linear, so between their crossings the product of the lengths is a polynomial,
which Newton's forward differences sum exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from einsumcascade.language.ir import Apply, Expr, Num, Var, apply, variables

# Half open.
Range: TypeAlias = tuple[int, int]
Form: TypeAlias = dict[Expr, int]
Function: TypeAlias = Callable[[int], int]
# Residue classes of a pivot that are summed one by one, at most.
CLASSES_LIMIT = 1 << 12


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """`sum of coefficient * atom <= limit`; an atom is a variable, `x // n` or `x % n`."""

    form: Form
    limit: int

    @property
    def variables(self) -> tuple[str, ...]:
        """Those in its atoms."""
        return variables(*self.form)


def linear(expr: Expr) -> tuple[Form, float] | None:
    """Take an expression apart into whole multiples of atoms and a constant; None if it is no such sum."""
    match expr:
        case Num(value=v) if math.isfinite(v):
            return {}, v
        case Var():
            return {expr: 1}, 0
        case Apply(op="neg", args=(x,)):
            return _scaled(linear(x), -1)
        case Apply(op="add" | "sub" as op, args=(x, y)):
            left, right = linear(x), _scaled(linear(y), 1 if op == "add" else -1)
            if left is None or right is None:
                return None
            form = dict(left[0])
            for atom, n in right[0].items():
                form[atom] = form.get(atom, 0) + n
            return {a: n for a, n in form.items() if n}, left[1] + right[1]
        case Apply(op="mul", args=(x, y)):
            left, right = linear(x), linear(y)
            if left is None or right is None or (left[0] and right[0]):
                return None
            return _scaled(left, right[1]) if left[0] else _scaled(right, left[1])
        case Apply(op="floordiv" | "mod" as op, args=(x, Num(value=int(d)))) if d > 0:
            inner = linear(x)
            if inner is None or inner[1] != int(inner[1]):
                return None
            form, k = inner[0], int(inner[1])
            if any(n % d for n in form.values()):
                return {expr: 1}, 0
            return ({}, k % d) if op == "mod" else ({a: n // d for a, n in form.items()}, k // d)
        case _:
            return None


def _scaled(form: tuple[Form, float] | None, by: float) -> tuple[Form, float] | None:
    if form is None or (by != int(by) and form[0]):
        return None
    return ({a: n * int(by) for a, n in form[0].items()} if by else {}), form[1] * by


def bounds_of(condition: Expr) -> list[Bound] | None:
    """Bring a comparison to bounds that hold together; None if it is not linear."""
    match condition:
        case Apply(op="le" | "lt" as op, args=(x, y)) | Apply(op="ge" | "gt" as op, args=(y, x)):
            found = linear(apply("sub", x, y))
            if found is None:
                return None
            form, k = found
            strict = op in ("lt", "gt")
            return [Bound(form, math.ceil(-k) - 1 if strict else math.floor(-k))]
        case Apply(op="eq", args=(x, y)):
            both = [bounds_of(apply("le", x, y)), bounds_of(apply("le", y, x))]
            return None if both[0] is None or both[1] is None else both[0] + both[1]
        case _:
            return None


def _reach(atom: Expr, ranges: Mapping[str, Range]) -> tuple[int, int]:
    """The least and the largest value that an atom may have."""
    match atom:
        case Var(name=v):
            return ranges[v][0], ranges[v][1] - 1
        case Apply(op=op, args=(x, Num(value=int(d)))):
            inner = linear(x)
            assert inner is not None
            low, high = _reaches(inner[0], ranges)
            low, high = low + int(inner[1]), high + int(inner[1])
            if op == "floordiv":
                return low // d, high // d
            return (low % d, high % d) if low // d == high // d else (0, d - 1)
        case _:
            raise AssertionError(atom)


def _reaches(form: Form, ranges: Mapping[str, Range]) -> tuple[int, int]:
    low = high = 0
    for atom, n in form.items():
        a, b = _reach(atom, ranges)
        low, high = low + min(n * a, n * b), high + max(n * a, n * b)
    return low, high


def _merged(ranges: Mapping[str, Range], bounds: Sequence[Bound]) -> tuple[Mapping[str, Range], Sequence[Bound]]:
    """Two variables that stand in `u * W + w` alone, w below W, as the one that they are the parts of."""
    for u, w in ((u, w) for w in ranges for u in ranges if u != w and ranges[w][0] == 0):
        width = ranges[w][1]
        outer, inner = Var(name=u), Var(name=w)
        touched = [b for b in bounds if {u, w} & set(b.variables)]
        plain = all(
            b.form.get(outer, 0) == b.form.get(inner, 0) * width
            and not any({u, w} & set(variables(a)) for a in b.form if a not in (outer, inner))
            for b in touched
        )
        if touched and plain:
            whole = Var(name=f"{u} {w}")
            lo, hi = ranges[u]
            kept = {v: r for v, r in ranges.items() if v not in (u, w)} | {whole.name: (lo * width, hi * width)}
            joined = [
                Bound({whole: b.form[inner]} | {a: n for a, n in b.form.items() if a not in (outer, inner)}, b.limit)
                if b in touched
                else b
                for b in bounds
            ]
            return _merged(kept, joined)
    return ranges, bounds


# --- the closed form --------------------------------------------------------------------------------------------------


def closed(ranges: Mapping[str, Range], bounds: Sequence[Bound]) -> int | None:
    """Count the points of a box that bounds leave; None if no variable links all others.

    It sums over one variable the product of the lengths of the intervals of the others. Two variables that stand in
    `u * W + w` alone, as in a partition, count as one.

    Cost: a few evaluations for each residue class of that variable, whatever the extents.
    """
    ranges, bounds = _merged(ranges, bounds)
    kept = []
    for b in bounds:
        low, high = _reaches(b.form, ranges)
        if low > b.limit:
            return 0
        if high > b.limit:
            kept.append(b)
    if not kept:
        return math.prod(hi - lo for lo, hi in ranges.values())
    plans = [p for v in ranges if (p := _plan(v, ranges, kept)) is not None]
    plan = min(plans, key=lambda p: p.period, default=None)
    return None if plan is None or plan.period > CLASSES_LIMIT else plan.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A sum over a pivot.

    Args:
        span: of the pivot. period: of the values of the pivot on which all functions are linear.
        leaves: for each other variable, the functions of which it is at least the largest and at most the least.
        filters: functions of the pivot that must not be above 0.
    """

    span: Range
    period: int
    leaves: tuple[tuple[tuple[Function, ...], tuple[Function, ...]], ...]
    filters: tuple[Function, ...]

    def value(self, x: int) -> int:
        if any(f(x) > 0 for f in self.filters):
            return 0
        out = 1
        for lows, highs in self.leaves:
            out *= max(0, min(f(x) for f in highs) - max(f(x) for f in lows) + 1)
        return out

    def total(self) -> int:
        lo, hi = self.span
        return sum(self._on_class(x, -(-(hi - x) // self.period)) for x in range(lo, min(hi, lo + self.period)))

    def _on_class(self, start: int, steps: int) -> int:
        """Sum over start, start + period, ...: polynomials between the crossings of linear functions."""

        def line(f: Function) -> tuple[int, int]:
            at = f(start)
            return at, (f(start + self.period) - at if steps > 1 else 0)

        ends = {0, steps}
        for f in self.filters:
            ends |= _crossings(line(f), (0, 0))
        for lows, highs in self.leaves:
            # Where a length vanishes, an end meets the value before a beginning.
            lines = [line(f) for f in lows] + [(a + 1, slope) for a, slope in map(line, highs)]
            for n, one in enumerate(lines):
                for other in lines[:n]:
                    ends |= _crossings(one, other)
        ends = {t for t in ends if 0 <= t <= steps}
        marks = sorted(ends)
        return sum(self._piece(start, t, u - t) for t, u in pairwise(marks))

    def _piece(self, start: int, first: int, length: int) -> int:
        """Newton's series of a polynomial of at most as many degrees as there are leaves."""
        known = min(length, len(self.leaves) + 1)
        row = [self.value(start + self.period * (first + t)) for t in range(known)]
        out = 0
        for order in range(known):
            out += row[0] * math.comb(length, order + 1)
            row = [y - x for x, y in pairwise(row)]
        return out


def _crossings(one: tuple[int, int], other: tuple[int, int]) -> set[int]:
    """Between these whole numbers two lines keep their order."""
    (a, up), (b, across) = one, other
    if up == across:
        return set()
    at = (b - a) // (up - across)
    return {at, at + 1}


def _plan(pivot: str, ranges: Mapping[str, Range], bounds: Sequence[Bound]) -> _Plan | None:
    lows: dict[str, list[Function]] = {v: [_constant(lo)] for v, (lo, _) in ranges.items() if v != pivot}
    highs: dict[str, list[Function]] = {v: [_constant(hi - 1)] for v, (_, hi) in ranges.items() if v != pivot}
    filters: list[Function] = []
    period = 1
    for b in bounds:
        others = [v for v in b.variables if v != pivot]
        mine = math.lcm(*(_period(a, without=others) for a in b.form))
        if not others:
            filters.append(_total(b.form, -b.limit))
        elif len(others) > 1:
            return None
        else:
            solved = _solved(b.form, _constant(b.limit), others[0])
            if solved is None:
                return None
            is_upper, function, scale = solved
            (highs if is_upper else lows)[others[0]].append(function)
            mine *= scale
        period = math.lcm(period, mine)
    leaves = tuple((tuple(lows[v]), tuple(highs[v])) for v in lows)
    return _Plan(span=ranges[pivot], period=period, leaves=leaves, filters=tuple(filters))


def _period(expr: Expr, *, without: Sequence[str]) -> int:
    """Steps of the pivot after which floor quotients and remainders that lack the leaf repeat, or grow by as much."""
    if not isinstance(expr, Apply):
        return 1
    inner = math.lcm(*(_period(a, without=without) for a in expr.args))
    divisor = expr.args[-1]
    divides = expr.row.symbol in ("//", "%") and not set(variables(expr)) & set(without)
    return inner * (divisor.value if divides and isinstance(divisor, Num) and isinstance(divisor.value, int) else 1)


def _constant(value: int) -> Function:
    return lambda x: value


def _solved(form: Form, limit: Function, leaf: str) -> tuple[bool, Function, int] | None:
    """The end of the interval of `leaf` that a bound sets: whether the last value, it, and what was divided by."""
    inside = [(a, n) for a, n in form.items() if leaf in variables(a)]
    if len(inside) != 1:
        return None
    ((atom, n),) = inside
    rest = _total({a: k for a, k in form.items() if a != atom}, 0)

    def end(x: int) -> int:
        left = limit(x) - rest(x)
        return left // n if n > 0 else -(left // -n)

    match atom:
        case Var():
            return n > 0, end, abs(n)
        case Apply(op="floordiv", args=(x, Num(value=int(d)))):
            inner = linear(x)
            assert inner is not None
            k = int(inner[1])
            if n > 0:
                deeper = _solved(inner[0], lambda x: d * end(x) + d - 1 - k, leaf)
            else:
                deeper = _solved({a: -c for a, c in inner[0].items()}, lambda x: k - d * end(x), leaf)
            return None if deeper is None else (deeper[0], deeper[1], deeper[2] * abs(n))
        case _:
            return None


def _total(form: Form, constant: int) -> Function:
    """The value of a linear form that has the pivot as its only variable."""
    parts = [(_value(a), n) for a, n in form.items()]
    return lambda x: constant + sum(n * f(x) for f, n in parts)


def _value(atom: Expr) -> Function:
    match atom:
        case Var():
            return lambda x: x
        case Apply(op=op, args=(inner, Num(value=int(d)))):
            found = linear(inner)
            assert found is not None
            f = _total(found[0], int(found[1]))
            return (lambda x: f(x) // d) if op == "floordiv" else (lambda x: f(x) % d)
        case _:
            raise AssertionError(atom)

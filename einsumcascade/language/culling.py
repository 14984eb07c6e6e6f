"""Warn where an Einsum reads elements that the one that wrote them had culled.

A culled element has no value, or is what an empty fiber reduces to: a causal `where` on the scores alone leaves zeros
that the softmax then attends to. A read is fine where the conditions of its reader imply those of the writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from einsumcascade.errors import Diagnostic
from einsumcascade.language.check import extents_known
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    rank_of,
    substitute,
    variables,
)

# A polynomial: for each product of names its factor; the empty product is the constant term.
_Poly = dict[tuple[str, ...], Fraction]
# The factor of this product is infinitely small: -1 stands for "and not equal".
_STRICT: tuple[str, ...] = ("<",)
_ONE: tuple[str, ...] = ()


def culled_reads(cascade: Cascade) -> Iterator[Diagnostic]:
    """Yield a diagnostic for each Einsum that may read culled elements.

    What cannot be decided (conditions that are no inequalities of polynomials) is compared as it is written.
    Cost: the reads times the conditions.
    """
    writers = {e.tensor: e for e in cascade.einsums}
    judge = _Judge(cascade)
    for e in cascade.einsums:
        held = _conditions(cascade, e)
        for read, facts in _guarded(e.expr, held):
            w = writers.get(read.tensor)
            if w is None or w.tensor == e.tensor or not all(isinstance(i, Var) for i in w.indices):
                continue
            names = {i.name: to for i, to in zip(w.indices, read.indices, strict=True) if isinstance(i, Var)}
            for c in _conditions(cascade, w):
                if set(variables(c)) <= set(w.free) and not judge.implied(substitute(c, names), facts):
                    yield Diagnostic(
                        code="culled-read",
                        headline=f"{e.tensor} reads {read} also where {w.tensor} is culled by {c}",
                        span=read.span,
                        rule="a culled element has no value, or that of an empty fiber: 0 for a sum",
                        hint=f"make the condition a constraint, or give {e.tensor} `where {substitute(c, names)}` too",
                    )
                    break


def _conditions(cascade: Cascade, e: Einsum) -> tuple[Expr, ...]:
    return (*e.where, *(c for c in cascade.constraints if set(variables(c)) <= set(e.space)))


def _guarded(expr: Expr, facts: tuple[Expr, ...]) -> Iterator[tuple[Read, tuple[Expr, ...]]]:
    """Yield every read with what holds where its value is used: a `select` reads only the branch it takes."""
    match expr:
        case Read():
            yield expr, facts
            for i in expr.indices:
                yield from _guarded(i, facts)
        case Apply(op="select", args=(c, x, y)):
            yield from _guarded(c, facts)
            yield from _guarded(x, (*facts, c))
            yield from _guarded(y, (*facts, Apply(op="not", args=(c,))))
        case Apply():
            for a in expr.args:
                yield from _guarded(a, facts)
        case _:
            pass


class _Judge:
    """Decides whether conditions imply another, over the integer points of a cascade."""

    def __init__(self, cascade: Cascade) -> None:
        self.numbers = {c.name: c.expr.value for c in cascade.constants if isinstance(c.expr, Num)}
        self.sizes = {rank_of(r.name): r.expr for r in cascade.ranks}
        self.ranks = extents_known(cascade)
        self.whole = {*self.ranks, *map(rank_of, self.ranks)}

    def implied(self, wanted: Expr, facts: tuple[Expr, ...]) -> bool:
        match wanted:
            case Apply(op="and", args=(x, y)):
                return self.implied(x, facts) and self.implied(y, facts)
            case Apply(op="or", args=(x, y)) if self.implied(x, facts) or self.implied(y, facts):
                return True
            case _:
                pass
        parts = [p for f in facts for p in conjuncts(f)]
        if wanted in parts:
            return True
        goal = self.at_least_zero(wanted)
        if goal is None:
            return False
        known = [k for p in parts if (k := self.at_least_zero(p)) is not None]
        known += [self.poly(Var(name=v)) for v in variables(wanted) if v in self.ranks]
        known += [
            _plus(self.poly(Scalar(name=rank_of(v))), _plus(self.poly(Var(name=v)), {_ONE: Fraction(1)}), -1)
            for v in variables(wanted)
            if v in self.ranks
        ]
        # goal = fact + something that is no less than 0.
        return any(_is_never_negative(_plus(goal, k, -1)) for k in [{}, *known])

    def at_least_zero(self, c: Expr) -> _Poly | None:
        """A polynomial that is >= 0 exactly where an inequality holds."""
        match c:
            case Apply(op="gt" | "ge" as op, args=(x, y)):
                return self.at_least_zero(Apply(op="lt" if op == "gt" else "le", args=(y, x)))
            case Apply(op="not", args=(Apply(op="lt" | "le" | "gt" | "ge" as op, args=(x, y)),)):
                turned = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[op]
                return self.at_least_zero(Apply(op=turned, args=(x, y)))
            case Apply(op="lt" | "le" as op, args=(x, Apply(op="floordiv", args=(y, k)))):
                # x < y // k is (x + 1) * k <= y, for k > 0.
                step = {_ONE: Fraction(1 if op == "lt" else 0)}
                return _plus(self.poly(y), _times(_plus(self.poly(x), step), self.poly(k)), -1)
            case Apply(op="le", args=(x, y)):
                return _plus(self.poly(y), self.poly(x), -1)
            case Apply(op="lt", args=(x, y)):
                found = _plus(self.poly(y), self.poly(x), -1)
                # Between whole numbers, less is less by 1; of real ones it is remembered that it is strict.
                names = {name for product in found for name in product}
                whole = all(n.denominator == 1 for n in found.values()) and names <= self.whole
                return _plus(found, {_ONE if whole else _STRICT: Fraction(-1)})
            case _:
                return None

    def poly(self, e: Expr) -> _Poly:
        match e:
            case Num(value=v) if v == v and abs(v) != float("inf"):
                return {_ONE: Fraction(v)}
            case Scalar(name=name) if name in self.numbers and abs(self.numbers[name]) != float("inf"):
                return {_ONE: Fraction(self.numbers[name])}
            case Scalar(name=name) if isinstance(self.sizes.get(name), Scalar | Num):
                return self.poly(self.sizes[name])
            case Apply(op="add" | "sub" as op, args=(x, y)):
                return _plus(self.poly(x), self.poly(y), 1 if op == "add" else -1)
            case Apply(op="neg", args=(x,)):
                return _plus({}, self.poly(x), -1)
            case Apply(op="mul", args=(x, y)):
                return _times(self.poly(x), self.poly(y))
            case _:
                return {(str(e),): Fraction(1)}


def conjuncts(c: Expr) -> Iterator[Expr]:
    """The conditions that `and` joins, one by one."""
    match c:
        case Apply(op="and", args=(x, y)):
            yield from conjuncts(x)
            yield from conjuncts(y)
        case _:
            yield c


def _plus(a: _Poly, b: _Poly, sign: int = 1) -> _Poly:
    out = dict(a)
    for names, n in b.items():
        out[names] = out.get(names, Fraction(0)) + sign * n
    return {names: n for names, n in out.items() if n}


def _times(a: _Poly, b: _Poly) -> _Poly:
    out: _Poly = {}
    for x, n in a.items():
        for y, k in b.items():
            key = tuple(sorted(x + y))
            out[key] = out.get(key, Fraction(0)) + n * k
    return {names: n for names, n in out.items() if n}


def _is_never_negative(p: _Poly) -> bool:
    zero = Fraction(0)
    return set(p) <= {_ONE, _STRICT} and (p.get(_ONE, zero), p.get(_STRICT, zero)) >= (zero, zero)

"""Whole-number interval arithmetic: the least and the most that an expression can be over a tile, as expressions.

What a condition is over a tile follows: it holds nowhere (empty), everywhere (full), or it must be tested (partial).
Every answer is safe: a span may be too wide, so that "nowhere" and "everywhere" are said only where they are so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, apply, transform
from einsumcascade.rewrites.algebra import product, terms
from einsumcascade.schedules.bounds import linear

ZERO, ONE = Num(value=0), Num(value=1)
MIRRORED = {"gt": "lt", "ge": "le"}
NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
COMPARISONS = frozenset(NEGATED)
# A truth value known now, or an expression for it.
Truth: TypeAlias = Expr | bool


@dataclass(frozen=True, slots=True)
class Span:
    """The least and the most of a whole number; both ends count."""

    lo: Expr
    hi: Expr

    @property
    def is_one(self) -> bool:
        """Whether it has one value."""
        return self.lo == self.hi


def tile_span(variable: str) -> Span:
    """From the first to the last coordinate of a tile."""
    return Span(Read(tensor=f"first_{variable}"), Read(tensor=f"last_{variable}"))


@dataclass(slots=True, kw_only=True)
class Known:
    """What is known of the names in a condition.

    Args:
        spans: of variables, by name. numbers: values of constants that are literal.
        read: span of a read, if it has one; a condition under which the read is within its tensor at every point of
            the tile goes to `within`.
        search: the position up to which a read along the streamed variable is known by its blocks: where the least
            ("least") or the most ("most") first is, and from there on stays, above a limit; None: not known.
        streamed: the variable that tiles walk, and `step`: the consecutive values of it that a tile has.
    """

    spans: Mapping[str, Span]
    numbers: Mapping[str, int | float]
    read: Callable[[Read], Span | None]
    search: Callable[[Read, str, Expr], Expr | None] = lambda r, kind, limit: None
    streamed: str = ""
    step: int = 0
    within: list[Expr] = field(default_factory=list)
    naturals: set[str] = field(default_factory=set)  # values that are never negative, by name

    def with_tile(self, name: str, span: Span, step: int) -> Known:
        """The same, and the span of the streamed variable."""
        return replace(self, spans={**self.spans, name: span}, streamed=name, step=step)

    def number(self, expr: Expr) -> int | None:
        """The value of an expression over literal constants, if it is one."""
        form = linear(expr)
        if form is None:
            return None
        out = 0
        for k, c in form.items():
            n: int | float | None = 1 if k == ONE else None
            if isinstance(k, Scalar):
                n = self.numbers.get(k.name)
            if n is None or not float(n).is_integer():
                return None
            out += c * int(n)
        return out

    def is_natural(self, expr: Expr) -> bool:
        """Whether a whole number is never negative."""
        n = self.number(expr)
        if n is not None:
            return n >= 0
        match expr:
            case Scalar():
                return expr.is_extent
            case Var():
                return True
            case Read():
                return not expr.indices and (
                    expr.tensor.startswith(("first_", "last_")) or expr.tensor in self.naturals
                )
            case Apply(op="mod"):
                return self.is_positive(expr.args[1])
            case Apply(op="add" | "mul" | "min" | "quotient"):
                return all(map(self.is_natural, expr.args))
            case Apply(op="max"):
                return any(map(self.is_natural, expr.args))
            case Apply(op="select"):
                return all(map(self.is_natural, expr.args[1:]))
            case Apply(op="sub", args=(a, Apply(op="mul", args=(Apply(op="quotient", args=(b, d)), e)))):
                # What a whole quotient leaves.
                return a == b and d == e and self.is_natural(a)
            case Apply(op="sub", args=(a, Num(value=1))):
                return self.is_positive(a)
            case _:
                return False

    def is_positive(self, expr: Expr) -> bool:
        """Whether a whole number is at least 1: what has points has extents of at least 1."""
        n = self.number(expr)
        return n >= 1 if n is not None else isinstance(expr, Scalar) and expr.is_extent


# --- arithmetic ---------------------------------------------------------------------------------------------------


def collected(expr: Expr) -> dict[Expr, int]:
    """A sum as terms and their whole coefficients; a term that is not linear stands for itself."""
    out: dict[Expr, int] = {}
    for t, sign in terms(expr):
        form = linear(t)
        for k, c in ({t: 1} if form is None else form).items():
            out[k] = out.get(k, 0) + sign * c
    return {k: c for k, c in out.items() if c}


def summed(form: Mapping[Expr, int]) -> Expr:
    """The sum of terms: those added first, a number last."""
    constant = form.get(ONE, 0)
    if set(form) <= {ONE}:
        return Num(value=constant)
    above = [k if c == 1 else apply("mul", Num(value=c), k) for k, c in form.items() if c > 0 and k != ONE]
    below = [k if c == -1 else apply("mul", Num(value=-c), k) for k, c in form.items() if c < 0 and k != ONE]
    if constant > 0 or not above:
        above.append(Num(value=max(constant, 0)))
    out = above[0]
    for e in above[1:]:
        out = apply("add", out, e)
    for e in below:
        out = apply("sub", out, e)
    return apply("sub", out, Num(value=-constant)) if constant < 0 else out


def plus(a: Expr, b: Expr, sign: int = 1) -> Expr:
    """`a + b`, or `a - b`, like terms collected."""
    form = collected(a)
    for k, c in collected(b).items():
        form[k] = form.get(k, 0) + sign * c
    return summed({k: c for k, c in form.items() if c})


def times(a: Expr, b: Expr) -> Expr:
    """`a * b`, a sum multiplied term by term."""
    out: dict[Expr, int] = {}
    for x, m in collected(a).items():
        for y, n in collected(b).items():
            for k, c in collected(product(((x, 1), (y, 1)))).items():
                out[k] = out.get(k, 0) + m * n * c
    return summed({k: c for k, c in out.items() if c})


def over(a: Expr, d: Expr, known: Known) -> Expr:
    """`a // d` of a positive `d`."""
    if d == ONE or a == ZERO:
        return a
    return apply("quotient" if known.is_natural(a) else "floordiv", a, d)


def rest(a: Expr, d: Expr, known: Known) -> Expr:
    """`a % d` of a positive `d`."""
    return plus(a, times(over(a, d, known), d), -1)


def at_least(a: Expr, b: Expr, known: Known) -> Expr:
    """The larger of two."""
    if a == b or (a == ZERO and known.is_natural(b)):
        return b
    return a if b == ZERO and known.is_natural(a) else apply("max", a, b)


def finished(expr: Expr) -> Expr:
    """Plain differences: whole numbers are never infinite."""

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Apply) and e.op == "sub":
            return apply("ieee_sub", *map(finished, e.args))
        return None

    return transform(expr, leaf)


# --- spans --------------------------------------------------------------------------------------------------------


def span(expr: Expr, known: Known) -> Span | None:
    """The least and the most of an expression; None where that is not known."""
    match expr:
        case Num():
            if not math.isfinite(expr.value):
                return None
            return Span(Num(value=math.floor(expr.value)), Num(value=math.ceil(expr.value)))
        case Scalar():
            n = known.numbers.get(expr.name)
            if expr.is_extent or isinstance(n, int):
                return Span(expr, expr)
            return None if n is None else span(Num(value=n), known)
        case Var():
            return known.spans.get(expr.name)
        case Read():
            return known.read(expr)
        case Apply(op="neg"):
            inner = span(expr.args[0], known)
            return None if inner is None else negated(inner)
        case Apply(op="add" | "sub" | "mul" | "floordiv" | "mod" | "max" | "min"):
            x, y = (span(a, known) for a in expr.args)
            if x is None or y is None:
                return None
            return _combined(expr, x, y, known)
        case _:
            return None


def negated(x: Span) -> Span:
    """The span of `-x`."""
    return Span(plus(ZERO, x.hi, -1), plus(ZERO, x.lo, -1))


def _combined(expr: Apply, x: Span, y: Span, known: Known) -> Span | None:
    match expr.op:
        case "add":
            return Span(plus(x.lo, y.lo), plus(x.hi, y.hi))
        case "sub":
            return Span(plus(x.lo, y.hi, -1), plus(x.hi, y.lo, -1))
        case "max" | "min":
            return Span(apply(expr.op, x.lo, y.lo), apply(expr.op, x.hi, y.hi))
        case "mul":
            for a, b in ((x, y), (y, x)):
                if b.is_one and known.is_natural(b.lo):
                    return Span(times(a.lo, b.lo), times(a.hi, b.lo))
                if b.is_one and (n := known.number(b.lo)) is not None and n < 0:
                    return Span(times(a.hi, b.lo), times(a.lo, b.lo))
            if known.is_natural(x.lo) and known.is_natural(y.lo):
                return Span(times(x.lo, y.lo), times(x.hi, y.hi))
            return None
        case "floordiv" if y.is_one and known.is_positive(y.lo):
            return Span(over(x.lo, y.lo, known), over(x.hi, y.lo, known))
        case "mod" if y.is_one and known.is_positive(y.lo):
            return _remainder(expr.args[0], x, y.lo, known)
        case _:
            return None


def _remainder(a: Expr, x: Span, n: Expr, known: Known) -> Span:
    """Of `a % n`: from end to end where the tile lies between two multiples of n, else anything."""
    if x.is_one:
        return Span(rest(x.lo, n, known), rest(x.lo, n, known))
    anything = Span(ZERO, plus(n, ONE, -1))
    period = known.number(n)
    moves = collected(a).get(Var(name=known.streamed), 0)
    if period is not None and abs(moves) == 1 and period <= known.step:
        return anything
    same = apply("eq", over(x.lo, n, known), over(x.hi, n, known))
    return Span(
        apply("select", same, rest(x.lo, n, known), anything.lo),
        apply("select", same, rest(x.hi, n, known), anything.hi),
    )


# --- conditions ---------------------------------------------------------------------------------------------------


def decide(condition: Expr, known: Known) -> tuple[Truth, Truth] | None:
    """Whether a condition may hold somewhere in a tile, and whether it must hold everywhere; None where not known."""
    match condition:
        case Apply(op="and" | "or"):
            sides = [decide(a, known) for a in condition.args]
            join = both if condition.op == "and" else either
            if sides[0] is None or sides[1] is None:
                return None
            return join(sides[0][0], sides[1][0]), join(sides[0][1], sides[1][1])
        case Apply(op="not"):
            inner = decide(condition.args[0], known)
            return None if inner is None else (opposite(inner[1]), opposite(inner[0]))
        case Apply() if condition.op in COMPARISONS:
            x, y = (span(a, known) for a in condition.args)
            if x is None or y is None:
                return None
            return _compared(condition.op, x, y, known)
        case _:
            return None


def _compared(op: str, x: Span, y: Span, known: Known) -> tuple[Truth, Truth]:
    if op in MIRRORED:
        x, y, op = y, x, MIRRORED[op]
    if op in ("lt", "le"):
        return compare(op, x.lo, y.hi, known), compare(op, x.hi, y.lo, known)
    meets = both(compare("le", x.lo, y.hi, known), compare("le", y.lo, x.hi, known))
    same = both(compare("le", x.hi, y.lo, known), compare("le", y.hi, x.lo, known))
    return (meets, same) if op == "eq" else (opposite(same), opposite(meets))


def compare(op: str, x: Expr, y: Expr, known: Known) -> Truth:
    """`x < y` or `x <= y`, now if both are known."""
    n = known.number(plus(x, y, -1))
    if n is not None:
        return n < 0 if op == "lt" else n <= 0
    return apply(op, x, y)


def both(x: Truth, y: Truth) -> Truth:
    """`x and y`."""
    if isinstance(x, bool):
        return y if x else False
    if isinstance(y, bool):
        return x if y else False
    return x if x == y else apply("and", x, y)


def either(x: Truth, y: Truth) -> Truth:
    """`x or y`."""
    if isinstance(x, bool):
        return True if x else y
    if isinstance(y, bool):
        return True if y else x
    return x if x == y else apply("or", x, y)


def opposite(x: Truth) -> Truth:
    """`not x`, of a comparison its opposite."""
    match x:
        case bool():
            return not x
        case Apply(op="and" | "or"):
            sides = [opposite(a) for a in x.args]
            return either(*sides) if x.op == "and" else both(*sides)
        case Apply() if x.op in NEGATED:
            return apply(NEGATED[x.op], *x.args)
        case _:
            return apply("not", x)


def chosen(condition: Truth, x: Expr, y: Expr) -> Expr:
    """`x` where a truth value holds, else `y`: one comparison a choice."""
    match condition:
        case bool():
            return x if condition else y
        case Apply(op="and"):
            return chosen(condition.args[0], chosen(condition.args[1], x, y), y)
        case Apply(op="or"):
            return chosen(condition.args[0], x, chosen(condition.args[1], x, y))
        case _:
            return apply("select", condition, x, y)

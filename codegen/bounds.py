"""From constraints to loop bounds: which tiles of a loop have a live point, and which are live throughout.

A constraint that is linear in the looped coordinate with coefficient 1 or -1, and in one tiled resident, becomes an
interval of positions. Everything else stays a test in every tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from einsumcascade.codegen.kernel_ir import first, last
from einsumcascade.language.ir import Apply, Expr, Num, Read, Var, apply, reads, scalars, variables
from einsumcascade.rewrites.algebra import factors, product, terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Positions allowed by one constraint: [may_lo, may_hi) has every live point, [must_lo, must_hi) is all live."""

    may_lo: Expr | None = None
    may_hi: Expr | None = None
    must_lo: Expr | None = None
    must_hi: Expr | None = None


def linear(expr: Expr) -> dict[Expr, int] | None:
    """An integer-linear form: products without their number as keys, 1 for the constant; None if not linear."""
    out: dict[Expr, int] = {}
    for t, sign in terms(expr):
        coefficient, rest = sign, []
        for f, n in factors(t):
            if n < 0:
                return None
            if isinstance(f, Num):
                if not isinstance(f.value, int):
                    return None
                coefficient *= f.value
            elif isinstance(f, Apply) and f.op in ("add", "sub"):
                return None
            else:
                rest.append((f, 1))
        key = product(tuple(rest)) if rest else Num(value=1)
        out[key] = out.get(key, 0) + coefficient
    return {k: c for k, c in out.items() if c}


def interval(
    condition: Expr,
    *,
    position: dict[Expr, int],
    tiled: tuple[str, ...],
    batch: tuple[str, ...],
    integers: frozenset[str],
) -> Interval | None:
    """Solve a constraint for the looped coordinate.

    Args:
        condition: a comparison.
        position: the linear form of the looped coordinate (`m1 * M0 + m0`).
        tiled: grid variables that have a first and a last coordinate. batch: those with one value a program.
        integers: constants known to be whole numbers; extents are.
    """
    if not isinstance(condition, Apply) or condition.op not in ("lt", "le", "gt", "ge", "eq"):
        return None
    left, right = condition.args
    op = condition.op
    if op in ("gt", "ge"):
        left, right, op = right, left, "lt" if op == "gt" else "le"
    form = linear(apply("sub", left, right))
    if form is None:
        return None
    ratios = {form.get(k, 0) // c if form.get(k, 0) % c == 0 else None for k, c in position.items()}
    if len(ratios) != 1 or (a := ratios.pop()) not in (1, -1):
        return None
    rest = {k: c for k, c in form.items() if k not in position}
    moving: list[str] = []
    for k in rest:
        if isinstance(k, Var) and k.name in tiled:
            moving.append(k.name)
        elif reads(k) or not set(variables(k)) <= set(batch) or not set(_constants(k)) <= integers:
            return None
    if len(moving) > 1:
        return None
    strict = 1 if op == "lt" else 0
    upper = lower = None
    if op == "eq":
        upper, lower = (rest, -a, 1), (rest, -a, 0)
    elif a == 1:
        upper = (rest, -1, 1 - strict)  # m <= -rest (- 1 if strict); hi is one more
    else:
        lower = (rest, 1, strict)  # m >= rest (+ 1 if strict)
    ends = [_ends(side, moving) if side else (None, None) for side in (lower, upper)]
    (lo_small, lo_large), (hi_small, hi_large) = ends
    return Interval(may_lo=lo_small, must_lo=lo_large, may_hi=hi_large, must_hi=hi_small)


def _constants(expr: Expr) -> list[str]:
    return [s for s in scalars(expr) if not s[0].isupper()]


def _ends(side: tuple[dict[Expr, int], int, int], moving: list[str]) -> tuple[Expr, Expr]:
    """Smallest and largest value over the tile of `sign * rest + offset`."""
    rest, sign, offset = side
    form = {k: sign * c for k, c in rest.items()}
    form[Num(value=1)] = form.get(Num(value=1), 0) + offset
    if not moving:
        return _build(form, {}), _build(form, {})
    v = moving[0]
    low, high = (first(v), last(v)) if form[Var(name=v)] > 0 else (last(v), first(v))
    return _build(form, {v: low}), _build(form, {v: high})


def _build(form: dict[Expr, int], at: dict[str, str]) -> Expr:
    positive: list[Expr] = []
    negative: list[Expr] = []
    constant = form.get(Num(value=1), 0)
    for k, c in form.items():
        if k == Num(value=1) or c == 0:
            continue
        base: Expr = Read(tensor=at[k.name]) if isinstance(k, Var) and k.name in at else k
        term = base if abs(c) == 1 else apply("mul", Num(value=abs(c)), base)
        (positive if c > 0 else negative).append(term)
    if constant > 0 or not positive:
        positive.append(Num(value=max(constant, 0)))
        constant = min(constant, 0)
    out = positive[0]
    for e in positive[1:]:
        out = apply("add", out, e)
    for e in negative:
        out = apply("ieee_sub", out, e)
    return apply("ieee_sub", out, Num(value=-constant)) if constant < 0 else out


def meet(op: str, bounds: list[Expr]) -> Expr:
    """The largest ("max") or smallest ("min") of some bounds."""
    out = bounds[0]
    for b in bounds[1:]:
        if b != out:
            out = apply(op, out, b)
    return out


def floor_to(expr: Expr, step: int, symbol: Expr) -> Expr:
    """Round a position down to a multiple of the step."""
    if step == 1 or expr == Num(value=0):
        return expr
    return apply("mul", apply("quotient", expr, symbol), symbol)


def ceil_to(expr: Expr, step: int, symbol: Expr) -> Expr:
    """Round a position up to a multiple of the step."""
    if step == 1 or expr == Num(value=0):
        return expr
    up = apply("ieee_sub", apply("add", expr, symbol), Num(value=1))
    return apply("mul", apply("quotient", up, symbol), symbol)

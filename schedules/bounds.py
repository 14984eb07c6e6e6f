"""Linear forms of whole numbers, and positions rounded to tiles."""

from __future__ import annotations

from einsumcascade.language.ir import Apply, Expr, Num, apply
from einsumcascade.rewrites.algebra import factors, product, terms


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


def meet(op: str, bounds: list[Expr]) -> Expr:
    """The largest ("max") or smallest ("min") of some bounds."""
    out = bounds[0]
    for b in bounds[1:]:
        if b != out:
            out = apply(op, out, b)
    return out


def floor_to(expr: Expr, step: int, symbol: Expr) -> Expr:
    """Round a position, not negative, down to a multiple of the step."""
    if step == 1 or expr == Num(value=0):
        return expr
    return apply("mul", apply("quotient", expr, symbol), symbol)


def ceil_to(expr: Expr, step: int, symbol: Expr) -> Expr:
    """Round a position, not negative, up to a multiple of the step."""
    if step == 1 or expr == Num(value=0):
        return expr
    up = apply("sub", apply("add", expr, symbol), Num(value=1))
    return apply("mul", apply("quotient", up, symbol), symbol)

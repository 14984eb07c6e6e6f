"""Small forms of expressions that placing and printing share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, apply
from einsumcascade.rewrites.algebra import factors


def powers(expr: Expr, constants: Mapping[str, Num] = MappingProxyType({})) -> Expr:
    """Small whole powers as products, halves as roots: exact for negative bases, and cheaper."""
    if not isinstance(expr, Apply):
        return expr
    args = tuple(powers(a, constants) for a in expr.args)
    if expr.op == "pow" and isinstance(args[1], Scalar) and args[1].name in constants:
        args = (args[0], constants[args[1].name])
    if expr.op == "pow" and isinstance(args[1], Num):
        power, base = args[1].value, args[0]
        if power == 0.5:
            return apply("sqrt", base)
        if power == -0.5:
            return apply("rsqrt", base)
        if float(power).is_integer() and 1 <= abs(power) <= 8:
            out = base
            for _ in range(int(abs(power)) - 1):
                out = apply("mul", out, base)
            return out if power > 0 else apply("div", Num(value=1.0), out)
    return Apply(op=expr.op, args=args)


def conjunction(conditions: tuple[Expr, ...]) -> Expr:
    out = conditions[0]
    for c in conditions[1:]:
        out = apply("and", out, c)
    return out


def number(value: float) -> Num:
    return Num(value=value)


def is_scaled(expr: Expr) -> bool:
    """One value times constants."""
    parts = factors(expr)
    values = [n for f, n in parts if isinstance(f, Read)]
    return values == [1] and len(parts) > 1 and all(isinstance(f, Read | Scalar | Num) for f, _ in parts)

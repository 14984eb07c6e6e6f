"""Small forms of expressions that placing and printing share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, apply
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
    """Join conditions by `and`."""
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


def is_whole(expr: Expr) -> bool:
    """Whether an expression is a whole number by itself: coordinates, extents and whole literals."""
    match expr:
        case Apply(
            op="add" | "sub" | "ieee_sub" | "mul" | "floordiv" | "quotient" | "mod" | "neg" | "max" | "min" | "abs"
        ):
            return all(map(is_whole, expr.args))
        case Apply(op="below" | "above" | "narrow"):
            return True
        case Apply(op="select"):
            return all(map(is_whole, expr.args[1:]))
        case Num():
            return isinstance(expr.value, int)
        case Var():
            return True
        case Read():
            # A bound of a loop: every other value is a block, b_X.
            return not expr.indices and not expr.tensor.startswith("b_")
        case Scalar():
            return expr.is_extent
        case _:
            return False


def is_integer(expr: Expr) -> bool:
    """Whether an expression is over coordinates, whole numbers and constants only, where no value is infinite."""
    match expr:
        case Apply(op="div"):
            return False
        case Apply():
            return all(is_integer(a) for a in expr.args)
        case Num():
            return isinstance(expr.value, int)
        case Var():
            return True
        case Scalar():
            return True
        case Read():
            return False

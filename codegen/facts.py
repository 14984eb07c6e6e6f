"""What is known of a value: where it can be -inf, what it holds at culled points, and what it bounds from above.

These facts decide three things: which reductions need a mask, where a difference needs a guard against
(-inf) - (-inf), and that the guard may stand on a row instead of on every element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Cascade, Expr, Num, Read, Scalar, Var, apply, reads, scalars, variables
from einsumcascade.rewrites.algebra import factors, is_map, is_positive, producers, terms

INF = math.inf
# The least number of float32.
LEAST = -3.4028234663852886e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of one value.

    Args:
        fills: for a condition, the value held wherever it fails.
        may_be_neg_inf: some element, live or culled, may be -inf.
        is_input: loaded from memory: taken as finite where it is a factor.
        is_finite: no element, live or culled, is infinite or NaN while the inputs are finite.
        above: products (see `_product`) that it bounds from above, element by element.
    """

    fills: Mapping[Expr, float] = field(default_factory=dict)
    may_be_neg_inf: bool = True
    is_input: bool = False
    is_finite: bool = False
    above: frozenset[tuple[Expr, ...]] = frozenset()


class FactTable:
    """Facts by value name, and their propagation through expressions."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.of: dict[str, Facts] = {}

    def copy(self) -> FactTable:
        """A table that can go its own way."""
        new = FactTable(self.cascade)
        new.of = dict(self.of)
        return new

    def __getitem__(self, name: str) -> Facts:
        return self.of.get(name, Facts())

    def may_be_neg_inf(self, expr: Expr) -> bool:
        """Whether some element of the expression may be -inf."""
        match expr:
            case Num():
                return expr.value == -INF
            case Var() | Scalar():
                return False
            case Read():
                return self[expr.tensor].may_be_neg_inf
            case Apply(op="sub" | "ieee_sub"):
                return self.may_be_neg_inf(expr.args[0])
            case Apply(op="max"):
                return all(self.may_be_neg_inf(a) for a in expr.args)
            case Apply(op="log" | "log2"):
                return True
            case Apply(op="select"):
                return any(self.may_be_neg_inf(a) for a in expr.args[1:])
            case Apply():
                if expr.row.low is not None or expr.row.condition:
                    return False
                return any(self.may_be_neg_inf(a) for a in expr.args)

    def is_finite(self, expr: Expr) -> bool:
        """Whether every element of a factor is finite, culled ones included: inputs are taken to be.

        A culled score has no maximum above it, so no exponential counts: it may be inf, and 0 * inf is NaN.
        """
        match expr:
            case Num():
                return math.isfinite(expr.value)
            case Var() | Scalar():
                return True
            case Read():
                return self[expr.tensor].is_input or self[expr.tensor].is_finite
            case Apply(op="select"):
                return all(self.is_finite(a) for a in expr.args[1:])
            case Apply(op="div" | "ieee_div" | "floordiv" | "mod"):
                return self.is_finite(expr.args[0]) and self.away_from_zero(expr.args[1])
            case Apply(op="rsqrt"):
                return self.is_finite(expr.args[0]) and self.away_from_zero(expr.args[0])
            case Apply(op="exp" | "exp2" | "log" | "log2" | "pow"):
                return False
            case Apply():
                return expr.row.condition or all(self.is_finite(a) for a in expr.args)

    def fill(self, expr: Expr, condition: Expr) -> float | None:
        """What the expression holds wherever `condition` fails; None if not known."""
        match expr:
            case Num():
                return float(expr.value)
            case Read():
                return self[expr.tensor].fills.get(condition)
            case Var() | Scalar():
                return None
            case Apply():
                return self._fill(expr, condition)

    def _fill(self, expr: Apply, condition: Expr) -> float | None:
        args = [self.fill(a, condition) for a in expr.args]
        match expr.op:
            case "mul":
                a, b = args
                for x, other, value in ((a, expr.args[1], b), (b, expr.args[0], a)):
                    if x == 0 and (
                        (value is None and self.is_finite(other)) or (value is not None and math.isfinite(value))
                    ):
                        return 0.0
                    if x in (INF, -INF) and value != 0 and is_positive(other, self.cascade):
                        return x
                return a * b if a is not None and b is not None and math.isfinite(a * b) else None
            case "div" | "ieee_div":
                return args[0] if args[0] in (INF, -INF) and is_positive(expr.args[1], self.cascade) else None
            case "add" | "sub" | "ieee_sub":
                a, b = args
                if a == -INF and (b is None or math.isfinite(b)):
                    return -INF
                if expr.op == "add" and b == -INF and (a is None or math.isfinite(a)):
                    return -INF
                if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
                    return None
                return a + b if expr.op == "add" else a - b
            case "exp" | "exp2" | "sigmoid" if args[0] == -INF:
                return 0.0
            case "exp" | "exp2" if args[0] is not None and abs(args[0]) < 64:
                return math.exp(args[0]) if expr.op == "exp" else 2.0 ** args[0]
            case "relu" if args[0] is not None:
                return max(args[0], 0.0)
            case "max" if None not in args:
                return max(a for a in args if a is not None)
            case "tanh" | "abs" | "neg" | "silu" if args[0] == 0:
                return 0.0
            case "select":
                return args[1] if args[1] is not None and args[1] == args[2] else None
            case _:
                return None

    def bounds(self, high: Expr, low: Expr) -> bool:
        """Whether `high >= low` in every element, so that `low` is -inf wherever `high` is."""
        if high == low:
            return True
        match low:
            case Apply(op="max"):
                return all(self.bounds(high, a) for a in low.args)
            case _:
                pass
        if isinstance(high, Apply) and high.op == "max":
            return any(self.bounds(a, low) for a in high.args)
        if isinstance(high, Read) and _product(low) in self[high.tensor].above:
            return True
        for take, whole in ((factors, "mul"), (terms, "add")):
            h, lo = take(high), take(low)
            common = [x for x in h if x in lo]
            rest_h, rest_l = [x for x in h if x not in common], [x for x in lo if x not in common]
            if common and len(rest_h) == len(rest_l) == 1 and rest_h[0][1] == rest_l[0][1] == 1:
                positive = all(is_positive(e, self.cascade) for e, _ in common)
                if whole == "add" or positive:
                    return self.bounds(rest_h[0][0], rest_l[0][0])
        return False

    def above(self, expr: Expr) -> frozenset[tuple[Expr, ...]]:
        """Products that an expression bounds from above."""
        match expr:
            case Read():
                return self[expr.tensor].above | {_product(expr)}
            case Apply(op="max"):
                return self.above(expr.args[0]) | self.above(expr.args[1])
            case Apply(op="mul") if isinstance(expr.args[0], Read) and is_positive(expr.args[1], self.cascade):
                factor = expr.args[1]
                return frozenset(tuple(sorted((*p, *_product(factor)), key=str)) for p in self.above(expr.args[0]))
            case _:
                return frozenset()

    def guarded(self, expr: Expr) -> Expr:
        """Replace differences and quotients by their plain forms where the value rules cannot bite."""
        if not isinstance(expr, Apply):
            return expr
        args = tuple(self.guarded(a) for a in expr.args)
        new = Apply(op=expr.op, args=args)
        match new:
            case Apply(op="exp" | "exp2" as op, args=(Apply(op="sub", args=(score, reference)),)):
                # The least number in place of a reference of -inf: 0 of a score of -inf, and infinite of any other.
                return apply(op, apply("ieee_sub", score, apply("max", reference, Num(value=LEAST))))
        if expr.op == "sub":
            a, b = expr.args
            if not (self.may_be_neg_inf(a) and self.may_be_neg_inf(b)):
                return apply("ieee_sub", *args)
            if self.bounds(b, a):
                return apply("ieee_sub", args[0], self._finite_row(b, args[1]))
        if expr.op == "div" and self.away_from_zero(expr.args[1]):
            return apply("ieee_div", *args)
        return new

    def away_from_zero(self, expr: Expr) -> bool:
        """Whether a value is above some positive constant: an exponential is not, since it underflows."""
        match expr:
            case Num():
                return expr.value != 0
            case Scalar():
                return is_positive(expr, self.cascade)
            case Read():
                made = producers(self.cascade).get(expr.tensor)
                return made is not None and is_map(made) and self.away_from_zero(made.expr)
            case Apply(op="add"):
                a, b = expr.args
                return any(
                    self.away_from_zero(x)
                    and is_positive(x, self.cascade)
                    and is_positive(y, self.cascade, strict=False)
                    for x, y in ((a, b), (b, a))
                )
            case Apply(op="max"):
                return any(self.away_from_zero(a) and is_positive(a, self.cascade) for a in expr.args)
            case Apply(op="sqrt" | "mul" | "neg" | "abs"):
                return all(self.away_from_zero(a) for a in expr.args)
            case Apply() if not reads(expr) and not variables(expr):
                value = self._number(expr)
                return value is not None and value != 0 and math.isfinite(value)
            case _:
                return False

    def _number(self, expr: Expr) -> float | None:
        """The value of an expression over constants; None where it needs an extent."""
        known: dict[str, float] = {}
        try:
            for c in self.cascade.constants:
                if c.name in scalars(expr):
                    known[c.name] = Binding(extents={}, constants=known).value(c.expr)
            return float(Binding(extents={}, constants=known).value(expr))
        except InputError:
            return None

    def _finite_row(self, bound: Expr, text: Expr) -> Expr:
        """`select(b == -inf, 0, b)`: put on the one read inside a scaled bound, so that the scale stays outside."""
        if isinstance(bound, Apply) and bound.op == "mul":
            inner = [a for a in bound.args if self.may_be_neg_inf(a)]
            if len(inner) == 1:
                return apply("mul", *(self._finite_row(a, a) if a is inner[0] else a for a in bound.args))
        return apply("select", apply("eq", text, Num(value=-INF)), Num(value=0.0), text)


def _product(expr: Expr) -> tuple[Expr, ...]:
    """The factors of a product in a fixed order; a quotient is a factor of its own."""
    parts = factors(expr)
    if any(n < 0 for _, n in parts):
        return (expr,)
    return tuple(sorted((f for f, _ in parts), key=str))

"""Cascades as formulas, in MathML: fractions, sums with their ranks below, indices as subscripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, assert_never

from markupsafe import Markup

from einsumcascade.language.ir import Apply, Einsum, Expr, Init, Iter, Num, Read, Scalar, Var, rank_of
from einsumcascade.report.markup import element, rank_class

_SIGNS: Final = {
    "+": "+", "-": "−", "*": "·", "%": "mod", "<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠",
    "and": "∧", "or": "∨", "not": "¬", "//": "÷",
}  # fmt: skip
_REDUCTIONS: Final = {"sum": "∑", "prod": "∏", "any": "⋁"}
PRIMED: Final = "__next"
_ATOM: Final = 10
# A reduction takes all of a product, none of a sum.
_SUMMED: Final = 6


class Formulas:
    """Sets formulas with the ranks of one cascade in their colours.

    Args:
        ranks: the number of each rank variable.
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.ranks = ranks

    def statement(self, s: Einsum | Init) -> Markup:
        """Set an Einsum or a first generation as one line.

        >>> from einsumcascade.language.parser import parse
        >>> c = parse("in X[m]\\nS = X[m] :: max(m)\\nout S")
        >>> "<munder>" in Formulas({"m": 0}).statement(c.einsums[0])
        True
        """
        parts = [self.expr(Read(tensor=s.tensor, indices=s.indices)), _operator("=")]
        if isinstance(s, Einsum) and s.reduce and not (isinstance(s.expr, Apply) and s.expr.row.fiberwise):
            below = self._listed([self._name(v) for v in s.ranks])
            sign = _REDUCTIONS.get(s.reduce)
            head = element("mo", {"largeop": "true", "movablelimits": "false"}, sign) if sign else _word(s.reduce)
            parts += [element("munder", None, head, below), element("mspace", {"width": "0.17em"})]
            parts.append(self._bracketed(s.expr, _SUMMED))
        else:
            parts.append(self.expr(s.expr))
        if isinstance(s, Einsum) and s.where:
            parts += [element("mspace", {"width": "1em"}), _word("where"), element("mspace", {"width": "0.3em"})]
            parts.append(self._listed([self.expr(c) for c in s.where]))
        return self.display(*parts)

    def steps(self, s: Iter) -> Markup:
        """Set the head of an iteration."""
        last = element("mrow", None, self._name(rank_of(s.var)), _operator("−"), element("mn", None, "1"))
        way = [element("mn", None, "0"), element("mn", None, "1"), element("mo", None, "…"), last]
        values = self._listed(way if not s.descending else [last, way[2], way[1], way[0]])
        return self.display(
            _word("for"), element("mspace", {"width": "0.3em"}), self._name(s.var), _operator("="), values
        )

    def call(self, name: str, *arguments: str) -> Markup:
        """Set a function of names."""
        inside = self._listed([Formulas({})._name(a) for a in arguments])
        return element("mrow", None, element("mi", None, name), _operator("("), inside, _operator(")"))

    def display(self, *parts: Markup) -> Markup:
        """Put parts into one formula."""
        return element("math", {"display": "block"}, element("mrow", None, *parts))

    def equation(self, left: Markup, *right: str) -> Markup:
        """Set `left = right`; plain texts on the right are signs."""
        return self.display(left, _operator("="), *(r if isinstance(r, Markup) else _operator(r) for r in right))

    def matrix(self, rows: tuple[tuple[Expr, ...], ...]) -> Markup:
        """Set a matrix of expressions, a single one as it is."""
        if len(rows) == 1 and len(rows[0]) == 1:
            return self.expr(rows[0][0])
        body = [element("mtr", None, *(element("mtd", None, self.expr(x)) for x in row)) for row in rows]
        return element("mrow", None, _operator("["), element("mtable", None, *body), _operator("]"))

    def expr(self, expr: Expr) -> Markup:
        """Set an expression."""
        return self._set(expr)[0]

    def _set(self, expr: Expr) -> tuple[Markup, int]:
        """The formula, and how tightly its outermost operator binds."""
        match expr:
            case Num(value=value):
                return _number(value), _ATOM if value >= 0 else 7
            case Var() | Scalar():
                return self._name(expr.name), _ATOM
            case Read():
                name = self._name(expr.tensor, upright=True)
                if not expr.indices:
                    return name, _ATOM
                return element("msub", None, name, self._listed([self.expr(i) for i in expr.indices])), _ATOM
            case Apply():
                return self._applied(expr)
            case _:
                assert_never(expr)

    def _applied(self, expr: Apply) -> tuple[Markup, int]:
        args, row = expr.args, expr.row
        match expr.op:
            case "div":
                return element("mfrac", None, self.expr(args[0]), self.expr(args[1])), 9
            case "floordiv":
                inner = element("mfrac", None, self.expr(args[0]), self.expr(args[1]))
                return element("mrow", None, _operator("⌊"), inner, _operator("⌋")), _ATOM
            case "sqrt":
                return element("msqrt", None, self.expr(args[0])), _ATOM
            case "abs":
                return element("mrow", None, _operator("|"), self.expr(args[0]), _operator("|")), _ATOM
            case "pow":
                return element("msup", None, self._bracketed(args[0], _ATOM), self.expr(args[1])), 8
            case "select":
                lines = [
                    element(
                        "mtr",
                        None,
                        _cell(self.expr(args[1])),
                        _cell(_word("if"), element("mspace", {"width": "0.3em"}), self.expr(args[0])),
                    ),
                    element("mtr", None, _cell(self.expr(args[2])), _cell(_word("else"))),
                ]
                return element("mrow", None, _operator("{"), element("mtable", {"class": "cases"}, *lines)), 0
        if not row.symbol:
            inside = self._listed([self.expr(a) for a in args])
            return element("mrow", None, _word(expr.op), _operator("("), inside, _operator(")")), _ATOM
        sign = _operator(_SIGNS.get(row.symbol, row.symbol))
        if row.arity == 1:
            return element("mrow", None, sign, self._bracketed(args[0], row.precedence)), row.precedence
        left = self._bracketed(args[0], row.precedence)
        right = self._bracketed(args[1], row.precedence + 1)
        return element("mrow", None, left, sign, right), row.precedence

    def _bracketed(self, expr: Expr, minimum: int) -> Markup:
        inner, precedence = self._set(expr)
        return inner if precedence >= minimum else element("mrow", None, _operator("("), inner, _operator(")"))

    def _listed(self, parts: list[Markup]) -> Markup:
        out: list[Markup] = []
        for k, p in enumerate(parts):
            out += [element("mo", {"separator": "true"}, ",")] * bool(k) + [p]
        return element("mrow", None, *out)

    def _name(self, name: str, *, upright: bool = False) -> Markup:
        """A name: digits at its end as a subscript, the next value of a reference with a prime."""
        colour = "" if upright else rank_class(name, self.ranks) or rank_class(name[0].lower() + name[1:], self.ranks)
        plain, prime, _ = name.partition(PRIMED)
        found = re.fullmatch(r"([A-Za-z_]*[A-Za-z])([0-9]+)", plain)
        stem, digits = (found[1], found[2]) if found and not upright else (plain, "")
        attributes: dict[str, object] = {"class": colour} if colour else {}
        if upright:
            attributes["mathvariant"] = "normal"
        out = element("mi", attributes, stem)
        if digits:
            out = element("msub", None, out, element("mn", attributes, digits))
        return element("msup", None, out, _operator("′")) if prime else out


def _number(value: float) -> Markup:
    """A number; one with an exponent as a power of ten."""
    text = {"inf": "∞", "-inf": "−∞"}.get(str(value), str(value))
    digits, power, exponent = text.partition("e")
    if not power:
        return element("mn", None, text.replace("-", "−"))
    ten = element("msup", None, element("mn", None, "10"), element("mn", None, str(int(exponent)).replace("-", "−")))
    if digits == "1":
        return ten
    return element("mrow", None, element("mn", None, digits.replace("-", "−")), _operator("·"), ten)


def _operator(sign: str) -> Markup:
    return element("mo", None, sign)


def _word(text: str) -> Markup:
    return element("mtext", None, text)


def _cell(*parts: Markup) -> Markup:
    return element("mtd", None, *parts)

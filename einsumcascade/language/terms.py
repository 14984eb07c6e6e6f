"""From syntax trees to expressions: what a name means, and operators with their operands."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable

from lark import Token, Tree

from einsumcascade.errors import Span, nearest
from einsumcascade.language.ir import Apply, Cascade, Expr, Num, Read, Scalar, Var, apply, variable_of
from einsumcascade.language.ops import FUNCTIONS, INFIX, OPS
from einsumcascade.language.syntax import Mistake, fail, span_of


class Names:
    """What a bare name of the text can mean."""

    def __init__(
        self, *, tensors: set[str], constants: set[str], variables: set[str], indexed: set[str] | frozenset[str]
    ) -> None:
        self.tensors, self.constants, self.variables = tensors, constants, variables
        # Of a tensor with ranks no bare name is an element: there the name is the extent, if there is one.
        self.indexed = indexed

    @classmethod
    def of(
        cls,
        cascade: Cascade,
        *,
        tensors: Iterable[str] = (),
        constants: Iterable[str] = (),
        variables: Iterable[str] = (),
    ) -> Names:
        """The names of a cascade, and more of each kind."""
        inputs = {i.tensor for i in cascade.inputs if i.indices}
        return cls(
            tensors={i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums} | set(tensors),
            constants={c.name for c in cascade.constants} | set(constants),
            variables={v for i in cascade.inputs for v in i.indices}
            | {variable_of(r.name) for r in cascade.ranks}
            | set(variables),
            indexed=frozenset(inputs | {e.tensor for e in cascade.einsums if e.indices}),
        )

    def resolve(self, name: str, span: Span | None) -> Expr:
        """What a bare name means.

        Raises: Mistake: `unknown-name`.
        """
        is_extent = name[0].isupper() and variable_of(name) in self.variables
        if name in self.tensors and not (name in self.indexed and is_extent):
            return Read(tensor=name, span=span)
        if name in self.constants:
            return Scalar(name=name, span=span)
        if name in self.variables:
            return Var(name=name, span=span)
        if is_extent:
            return Scalar(name=name, span=span)
        known = sorted(self.tensors | self.constants | self.variables)
        raise Mistake(
            "unknown-name",
            f"nothing is called '{name}'",
            span,
            rule="a bare name is a constant, a rank variable, an extent (upper case) or a scalar tensor",
            hint=nearest(name, known),
        )


def number(name: str, value: float) -> int | float:
    """Take a number of any library over as Python's own, which prints as the language writes it."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise Mistake("syntax", f"'{name}' is no name", None, rule="a name is an ASCII word")
    if isinstance(value, bool) or not hasattr(value, "__float__") or math.isnan(value):
        raise Mistake("number-range", f"the constant {name} is {value!r}", None, rule="a constant is a number")
    # The sum turns -0.0, which the language has no way to write, into 0.0.
    return operator.index(value) if hasattr(value, "__index__") else float(value) + 0.0


def expression(node: Tree[Token] | Token, names: Names) -> Expr:
    """The expression that a tree of the grammar is."""
    span = span_of(node)
    if isinstance(node, Token):
        raise AssertionError(f"a bare token {node!r} where an expression stands")
    kids = [c for c in node.children if c is not None]
    match node.data:
        case "number":
            text = str(kids[0])
            if math.isinf(float(text)):
                fail(
                    "number-range",
                    "the number is beyond the range of float64",
                    node,
                    rule="numbers are finite; infinity is written inf",
                )
            return Num(value=float(text) if re.search(r"[.eE]", text) else int(text), span=span)
        case "infinity":
            return Num(value=float("inf"), span=span)
        case "name":
            return names.resolve(str(kids[0]), span)
        case "infix":
            left, symbol, right = kids
            return Apply(
                op=INFIX[str(symbol)].name, args=(expression(left, names), expression(right, names)), span=span
            )
        case "prefix":
            operand = expression(kids[1], names)
            if str(kids[0]) == "-":
                if isinstance(operand, Num) and operand.value > 0:
                    return Num(value=-operand.value, span=span)
                return Apply(op="neg", args=(operand,), span=span)
            return Apply(op="not", args=(operand,), span=span)
        case "read":
            return Read(tensor=str(kids[0]), indices=tuple(expression(k, names) for k in kids[1:]), span=span)
        case "call":
            return _call(node, names)
        case _:
            raise AssertionError(node.data)


def _call(node: Tree[Token], names: Names) -> Expr:
    head, *rest = node.children
    assert isinstance(head, Tree)
    name = str(head.children[0])
    if name not in FUNCTIONS:
        fail(
            "unknown-operator",
            f"there is no operator '{name}'",
            head,
            rule="operators are those of the table; a tensor is read with square brackets",
            hint=nearest(name, FUNCTIONS),
        )
    args = [expression(a, names) for a in rest]
    arity, optional = OPS[name].arity, OPS[name].optional
    if arity == 2 and len(args) > 2 and OPS[name].is_associative:
        out = args[0]
        for a in args[1:]:
            out = apply(name, out, a)
        return out
    if not arity - optional <= len(args) <= arity:
        fail(
            "operand-count",
            f"{name} takes {f'{arity - optional} to ' if optional else ''}{arity} operands, here are {len(args)}",
            node,
            rule=f"{name} is written {name}({', '.join('xyzuv'[:arity])})",
            hint=f"{optional} of them may be left out" if optional else "",
        )
    args[1:1] = [Num(value=0)] * (arity - len(args))
    return Apply(op=name, args=tuple(args), span=span_of(node))


def conjuncts(conditions: list[Expr]) -> tuple[Expr, ...]:
    """Take conjunctions apart: each condition applies by itself."""
    out: list[Expr] = []
    for c in conditions:
        if isinstance(c, Apply) and c.op == "and":
            out += conjuncts(list(c.args))
        else:
            out.append(c)
    return tuple(out)

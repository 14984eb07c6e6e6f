"""Print cascades as text that parses to an equal value."""

from __future__ import annotations

import math
from typing import assert_never

from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Init, Iter, Num, Read, Scalar, Statement, Var

_ATOM = 10


def print_expr(expr: Expr) -> str:
    """Print an expression with no more brackets than it needs."""
    return _print(expr)[0]


def _print(expr: Expr) -> tuple[str, int]:
    match expr:
        case Num():
            if isinstance(expr.value, float) and math.isinf(expr.value):
                return ("inf", _ATOM) if expr.value > 0 else ("-inf", 7)
            return repr(expr.value), _ATOM if expr.value >= 0 else 7
        case Var() | Scalar():
            return expr.name, _ATOM
        case Read():
            inside = ", ".join(print_expr(i) for i in expr.indices)
            return (f"{expr.tensor}[{inside}]" if expr.indices else expr.tensor), _ATOM
        case Apply():
            return _print_apply(expr)
        case _:
            assert_never(expr)


def _bracket(expr: Expr, minimum: int) -> str:
    text, precedence = _print(expr)
    return text if precedence >= minimum else f"({text})"


def _print_apply(expr: Apply) -> tuple[str, int]:
    op = expr.row
    if not op.symbol:
        return f"{op.name}({', '.join(print_expr(a) for a in expr.args)})", _ATOM
    if op.arity == 1:
        gap = " " if op.symbol.isalpha() else ""
        return f"{op.symbol}{gap}{_bracket(expr.args[0], op.precedence)}", op.precedence
    left, right = expr.args
    if op.symbol == "**":
        return f"{_bracket(left, _ATOM)} ** {_bracket(right, 7)}", op.precedence
    side = op.precedence + (1 if op.condition and op.precedence == 4 else 0)
    return f"{_bracket(left, side)} {op.symbol} {_bracket(right, op.precedence + 1)}", op.precedence


def print_statement(statement: Statement, *, indent: str = "") -> str:
    """Print a statement; a block takes several lines."""
    match statement:
        case Einsum():
            left = print_expr(Read(tensor=statement.tensor, indices=statement.indices))
            text = f"{indent}{left} = {print_expr(statement.expr)}"
            solves = isinstance(statement.expr, Apply) and statement.expr.row.fiberwise
            if statement.reduce and not solves:
                text += f" :: {statement.reduce}({', '.join(statement.ranks)})"
            if statement.where:
                text += f" where {', '.join(print_expr(c) for c in statement.where)}"
            return text
        case Init():
            left = print_expr(Read(tensor=statement.tensor, indices=statement.indices))
            return f"{indent}init {left} = {print_expr(statement.expr)}"
        case Iter():
            head = f"{indent}iter {statement.var}{' desc' if statement.descending else ''}:"
            inner = [print_statement(s, indent=indent + "  ") for s in statement.body]
            return "\n".join([head, *inner, f"{indent}end"])
        case _:
            assert_never(statement)


def print_cascade(cascade: Cascade) -> str:
    """Print a whole cascade, declarations first."""
    lines = []
    if cascade.inputs:
        lines.append(
            "in " + ", ".join(f"{i.tensor}[{', '.join(i.indices)}]" if i.indices else i.tensor for i in cascade.inputs)
        )
    lines += [f"const {c.name} = {print_expr(c.expr)}" for c in cascade.constants]
    lines += [f"rank {r.name} = {print_expr(r.expr)}" for r in cascade.ranks]
    if cascade.constraints:
        lines.append("constraint " + ", ".join(print_expr(c) for c in cascade.constraints))
    lines += [print_statement(s) for s in cascade.body]
    lines.append("out " + ", ".join(o.tensor + (f": {o.dtype}" if o.dtype else "") for o in cascade.outputs))
    return "\n".join(lines)

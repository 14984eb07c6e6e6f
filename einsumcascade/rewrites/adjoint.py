"""The adjoint of an expression: what each read receives of what the value receives.

The derivative of an operator is a text of its row of the operator table, over G (what the value receives), the operands
and the value. Nothing here knows an operator by name but for writing products neatly.
"""

from __future__ import annotations

from functools import lru_cache

from einsumcascade.language.ir import Apply, Expr, Num, Read, apply, reads, transform
from einsumcascade.language.ops import OPS
from einsumcascade.rewrites.algebra import factors, product, terms, total
from einsumcascade.rewrites.proofs import parsed

_OPERANDS = ("X", "Y", "Z")


def adjoints(expr: Expr, received: Expr, *, value: Expr | None = None) -> tuple[tuple[Read, Expr], ...]:
    """What each read of an expression receives, in order of appearance; one read may be listed more than once.

    Args:
        expr: without conditions on what is differentiated. received: what its value receives.
        value: the name of its value, if it has one.

    Cost: the sum of the depths of the reads.
    >>> from einsumcascade.language.ir import apply
    >>> a, b = Read(tensor="A"), Read(tensor="B")
    >>> [(str(r), str(e)) for r, e in adjoints(apply("mul", a, b), Read(tensor="G"))]
    [('A', 'G * B'), ('B', 'G * A')]
    """
    match expr:
        case Read():
            return ((expr, received),)
        case Apply(op="select", args=(c, x, y)):
            # Each side is there under its condition only, so all that it receives is: 0 times no value is no value.
            zero = Num(value=0)
            chosen = [(r, apply("select", c, e, zero)) for r, e in adjoints(x, received)]
            return (*chosen, *((r, apply("select", c, zero, e)) for r, e in adjoints(y, received)))
        case Apply():
            out: list[tuple[Read, Expr]] = []
            for k, operand in enumerate(expr.args):
                if reads(operand) and (part := _part(expr, k, received, value or expr)) is not None:
                    out += adjoints(operand, part)
            return tuple(out)
        case _:
            return ()


def needs_value(expr: Apply, live: frozenset[str]) -> bool:
    """Whether the derivative in an operand that has a live read is told by the operator's value."""
    return any(
        "V" in {r.tensor for r in reads(text)} and live & {r.tensor for r in reads(operand)}
        for operand, text in zip(expr.args, _texts(expr.op), strict=True)
        if text is not None
    )


def _part(expr: Apply, k: int, received: Expr, value: Expr) -> Expr | None:
    text = _texts(expr.op)[k]
    if text is None:
        return None
    named: dict[str, Expr] = dict(zip(_OPERANDS, expr.args, strict=False)) | {"G": received, "V": value}
    return neat(transform(text, lambda e: named[e.tensor] if isinstance(e, Read) else None))


@lru_cache(maxsize=128)
def _texts(op: str) -> tuple[Expr | None, ...]:
    row = OPS[op]
    found: list[Expr | None] = []
    for text in row.gradient or ("",) * row.arity:
        e = parsed(text, {"G", "V", *_OPERANDS}) if text else None
        assert e is not None or not text, f"{op}: {text}"
        found.append(e)
    return tuple(found)


def neat(expr: Expr) -> Expr:
    """Write what algebra leaves lying about as a person would: x ** 1, 1 * x, conditions on numbers, signs inside."""
    if not isinstance(expr, Apply):
        return expr
    expr = Apply(op=expr.op, args=tuple(map(neat, expr.args)))
    match expr:
        case Apply(op="pow", args=(x, Apply(op="sub", args=(Num(value=a), Num(value=b))))):
            return x if a - b == 1 else Apply(op="pow", args=(x, Num(value=a - b)))
        case Apply(op="select", args=(Apply(op="eq", args=(Num(value=a), Num(value=b))), x, y)):
            return x if a == b else y
        case Apply(op="mul" | "div" | "neg"):
            parts = factors(expr)
            if len(terms(expr)) == 1 and any(isinstance(f, Num) for f, _ in parts):
                return product(tuple((f, n) for f, n in parts if f != Num(value=1)) or ((Num(value=1), 1),))
        case Apply(op="add" | "sub"):
            return total(terms(expr))
    return expr


__all__ = ["adjoints", "neat", "needs_value"]

"""Name what an expression computes more than once, and the indices that are more than sums of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import count

from einsumcascade.language.ir import Apply, Einsum, Expr, Read, Var, subexpressions, variables

# An index of these stays where it is: it is read at a glance, and its bounds are known.
_PLAIN = ("add", "sub", "mul", "floordiv", "mod", "neg")


def named(
    expr: Expr, *, element: str, order: tuple[str, ...], taken: Collection[str]
) -> tuple[tuple[Einsum, ...], Expr]:
    """Take parts of an expression out as Einsums of their own.

        B[clamp(p - m, 0, 9), h] + QK   ->   I[p,m] = clamp(p - m, 0, 9); B[I[p,m], h] + QK

    Args:
        element: the tensor whose element is read without indices.
        order: every rank variable, outermost first; the element has all of them.
        taken: names that mean something already.

    Returns: the Einsums in order, and the expression that reads them.
    """
    seen = _uses(expr)
    out: dict[Expr, Einsum] = {}
    used = set(taken)

    def fresh(letter: str) -> str:
        name = next(n for n in (f"{letter}{k}" if k > 1 else letter for k in count(1)) if n not in used)
        used.add(name)
        return name

    def named_alone(e: Expr) -> bool:
        # What is read from a captured tensor stays where it is: there an op sees whether it is an index or a value.
        return all(not r.indices and r.tensor == element for r in subexpressions(e) if isinstance(r, Read))

    def take(e: Expr, letter: str) -> Expr:
        whole = any(isinstance(r, Read) for r in subexpressions(e))
        ranks = tuple(Var(name=v) for v in order if whole or v in variables(e))
        if not ranks:
            return inside(e)
        if e not in out:
            new = inside(e)
            out[e] = Einsum(tensor=fresh(letter), indices=ranks, expr=new)
        return Read(tensor=out[e].tensor, indices=ranks)

    def inside(e: Expr) -> Expr:
        match e:
            case Apply():
                return Apply(op=e.op, args=tuple(go(a) for a in e.args))
            case Read():
                return Read(tensor=e.tensor, indices=tuple(index(i) for i in e.indices))
            case _:
                return e

    def index(e: Expr) -> Expr:
        operations = {x.op for x in subexpressions(e) if isinstance(x, Apply)}
        return inside(e) if operations <= set(_PLAIN) or not named_alone(e) else take(e, "I")

    def go(e: Expr) -> Expr:
        parts = sum(isinstance(x, Apply) for x in subexpressions(e))
        if isinstance(e, Apply) and not e.row.condition and seen[e] > 1 and parts > 1 and named_alone(e):
            return take(e, "T")
        return inside(e)

    result = inside(expr)
    return tuple(out.values()), result


def _uses(expr: Expr) -> Counter[Expr]:
    """How many different expressions hold each part."""
    uses: Counter[Expr] = Counter()
    pending, met = [expr], {expr}
    while pending:
        e = pending.pop()
        parts = e.args if isinstance(e, Apply) else e.indices if isinstance(e, Read) else ()
        uses.update(parts)
        new = [p for p in dict.fromkeys(parts) if p not in met]
        met.update(new)
        pending += new
    return uses

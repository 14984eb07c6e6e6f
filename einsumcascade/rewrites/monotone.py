"""Take a non-decreasing map out of a maximum (R8): a maximum streams through any such map.

    L = relu(X - MU) :: max(m)   ->   LG = X :: max(m);   L = relu(LG - MU)

Only a map that refers to another reduction over the same rank is taken out: inside, its maximum would have to wait for
that reduction. Precondition: each operator on the way is monotone in the operand that varies (operator table), and no
factor is negative (sign facts). Source: max-plus homomorphisms, RedFuser; F(x, d) = phi(G(x), d).
"""

from __future__ import annotations

from dataclasses import replace

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Num, Read, Statement, Var, apply, reads, variables
from einsumcascade.rewrites.algebra import (
    drop_dead,
    fresh,
    inline_reads,
    is_positive,
    names_taken,
    producers,
    terms,
)
from einsumcascade.rewrites.step import Rewritten, Step


def lift_monotone(cascade: Cascade) -> Rewritten:
    """Apply the rule wherever it holds. Returns: a cascade of equal value. Cost: linear in the cascade."""
    steps: list[Step] = []
    taken = names_taken(cascade)
    body: list[Statement] = []
    for s in cascade.body:
        new = _lifted(s, cascade, taken) if isinstance(s, Einsum) and s.reduce in ("max", "min") else None
        body += new or (s,)
        if new:
            steps.append(
                Step(
                    rule="R8 monotone map",
                    what=f"{new[0].reduce} commutes with what is monotone: {new[0].tensor} waits for nothing",
                    before=(str(s),),
                    after=tuple(map(str, new)),
                )
            )
    return Rewritten(cascade=drop_dead(cascade.with_body(tuple(body))), steps=tuple(steps))


def _lifted(s: Einsum, cascade: Cascade, taken: set[str]) -> tuple[Einsum, ...] | None:
    defs, over = producers(cascade), set(s.ranks)

    def waits(e: Expr) -> bool:
        """Whether an expression refers to a reduction over one of these ranks."""
        found = {t for r in reads(e) for t in (r.tensor, *ancestors(cascade, r.tensor))}
        return any(t in defs and over & set(defs[t].ranks) for t in found)

    if not waits(s.expr):
        return None
    expr = inline_reads(s.expr, defs, lambda r, _: bool(set(variables(r)) & over) and waits(r))
    rising, lowest = True, True
    path: list[tuple[Apply, int]] = []
    inner = expr
    while waits(inner):
        if not isinstance(inner, Apply):
            return None
        varying = [k for k, a in enumerate(inner.args) if set(variables(a)) & over]
        if len(varying) != 1:
            return None
        if inner.op in ("add", "sub") and len(terms(inner.args[varying[0]])) > 1:
            # A reference that cancels one of several terms comes before they are rounded together: it shifts the state.
            break
        direction = _direction(inner, varying[0], cascade)
        if direction is None:
            return None
        rising = rising == direction
        lowest = lowest and _keeps_infinity(inner, varying[0], cascade)
        path.append((inner, varying[0]))
        inner = inner.args[varying[0]]
    if not path:
        return None
    assert s.reduction is not None
    kind = s.reduce if rising else {"max": "min", "min": "max"}[s.reduce or ""]
    raw = replace(s, tensor=fresh(s.tensor + "G", taken), expr=inner, reduce=kind)
    if set(raw.space) != set(s.space):
        return None
    value: Expr = Read(tensor=raw.tensor, indices=raw.indices)
    for node, k in reversed(path):
        value = replace(node, args=(*node.args[:k], value, *node.args[k + 1 :]))
    if lowest:
        return raw, replace(s, expr=value, reduce=None, ranks=(), where=())
    # The map of an infinity need not be one: a fiber without a point is told apart by itself.
    zero: Expr = Num(value=0)
    for v in raw.space:
        zero = apply("add", zero, apply("mul", Num(value=0), Var(name=v)))
    seen = replace(s, tensor=fresh(s.tensor + "E", taken), expr=zero)
    empty = Num(value=s.reduction.empty)
    told = apply("eq", Read(tensor=seen.tensor, indices=seen.indices), empty)
    return raw, seen, replace(s, expr=apply("select", told, empty, value), reduce=None, ranks=(), where=())


def _keeps_infinity(e: Apply, k: int, cascade: Cascade) -> bool:
    """Whether an operator takes an infinite operand k to an infinity of the same sense."""
    match e.op:
        case "add" | "sub" | "neg" | "div":
            return True
        case "mul":
            return is_positive(e.args[1 - k], cascade)
        case _:
            return False


def _direction(e: Apply, k: int, cascade: Cascade) -> bool | None:
    """Whether an operator rises (True) or falls (False) with operand k, None if neither is known."""
    match e.op:
        case "add" | "max" | "min":
            return True
        case "sub":
            return k == 0
        case "neg":
            return False
        case "clamp" if k == 0:
            return True
        case "mul" | "div" if e.op == "mul" or k == 0:
            # A zero does no harm: x / 0 is -inf, 0 or inf as x is negative, 0 or positive.
            return True if is_positive(e.args[1 - k], cascade, strict=False, live=True) else None
        case _:
            return True if e.row.monotone and e.row.arity == 1 else None

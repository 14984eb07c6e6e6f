"""Bring the normaliser of a row into its exponential (R9).

    SN[p,m] = exp(S[p,m] - GM[p])                L[p]   = GM[p] + log(SD[p])
    A[p,m]  = SN[p,m] / SD[p]              ->    A[p,m] = exp(S[p,m] - L[p])

A division for each key becomes a logarithm for each row, and one number a row, the LSE, tells all that a later pass or
a gradient needs. Precondition: the factor divides, and is the sum of that very exponential over all its points, so that
it is positive wherever there is one.
"""

from __future__ import annotations

from dataclasses import replace

from einsumcascade.analysis.dependence import rank_variables
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Iter, Read, Statement, Var, apply, variables
from einsumcascade.rewrites.algebra import (
    drop_dead,
    factors,
    fresh,
    inline,
    is_map,
    names_taken,
    producers,
    product,
    terms,
    total,
)
from einsumcascade.rewrites.step import Rewritten, Step


def into_exponents(cascade: Cascade) -> Rewritten:
    """Apply the rule to every map outside iterations where it holds.

    Returns: a cascade of equal value. Cost: linear in the Einsums.
    """
    taken = names_taken(cascade)
    steps: list[Step] = []
    body: list[Statement] = []
    logs: dict[Expr, Einsum] = {}
    for s in cascade.body:
        new = None if isinstance(s, Iter) or not isinstance(s, Einsum) else _brought(s, cascade, logs, taken)
        if new is None or not isinstance(s, Einsum):
            body.append(s)
            continue
        row, s_new = new
        if row not in body:
            body.append(row)
        body.append(s_new)
        steps.append(
            Step(
                rule="R9 exponent",
                what=f"{row.tensor} holds the logarithm of what {s.tensor} divides by",
                before=(str(s),),
                after=(str(row), str(s_new)),
            )
        )
    return Rewritten(cascade=drop_dead(cascade.with_body(tuple(body))), steps=tuple(steps))


def _brought(s: Einsum, cascade: Cascade, logs: dict[Expr, Einsum], taken: set[str]) -> tuple[Einsum, Einsum] | None:
    if s.reduce is not None or not all(isinstance(i, Var) for i in s.indices):
        return None
    defs, parts = producers(cascade), factors(s.expr)
    for n, (f, power) in enumerate(parts):
        exponent = _exponent(f, defs)
        if exponent is None or power != 1:
            continue
        inside = [
            (g, k)
            for m, (g, k) in enumerate(parts)
            if m != n and k == -1 and isinstance(g, Read) and _is_normaliser(g, f, defs)
        ]
        if not inside:
            continue
        rest = tuple(p for m, p in enumerate(parts) if m != n and p not in inside)
        row = {v for g, _ in inside for v in variables(g)}
        fixed = tuple(t for t in terms(exponent) if set(variables(t[0])) <= row)
        moving = tuple(t for t in terms(exponent) if t not in fixed)
        # The reference and the logarithm make one number a row: x - (GM + log SD).
        value = total((*((t, -k) for t, k in fixed), *((apply("log", g), -k) for g, k in inside)))
        if value not in logs:
            order = tuple(Var(name=v) for v in rank_variables(cascade) if v in set(variables(value)))
            logs[value] = Einsum(tensor=fresh(f"L{s.tensor}", taken), indices=order, expr=value)
        e = logs[value]
        shifted = apply("exp", total((*moving, (Read(tensor=e.tensor, indices=e.indices), -1))))
        return e, replace(s, expr=product(((shifted, 1), *rest)))
    return None


def _is_normaliser(g: Read, f: Expr, defs: dict[str, Einsum]) -> bool:
    """Whether a read is the sum of that very exponential, over all its points: then it is positive where one is."""
    d = defs.get(g.tensor)
    return (
        d is not None
        and d.reduce == "sum"
        and not d.where
        and isinstance(f, Read)
        and d.expr == f
        and g == Read(tensor=d.tensor, indices=d.indices)
    )


def _exponent(f: Expr, defs: dict[str, Einsum]) -> Expr | None:
    """The exponent of a factor that is an exponential, written out or read from a map."""
    if isinstance(f, Read) and is_map(defs.get(f.tensor)):
        f = inline(f, defs[f.tensor])
    return f.args[0] if isinstance(f, Apply) and f.op == "exp" else None

"""Join the two ranks of a partition to the one that they walk.

    rank m0 = 64;  rank m1 = (M + M0 - 1) // M0;  constraint m1*M0 + m0 < M
    S[m1,m0] = K[m1*M0 + m0]   ->   S[m] = K[m]

The pair is one to one with the rank: quotient and remainder. Precondition: the definition of the ranks and the
constraint as above, and every Einsum that has one of the two uses them as `m1*M0 + m0` or as a pair of axes only.
"""

from __future__ import annotations

from dataclasses import replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    scalars,
    transform,
    variable_of,
    variables,
)
from einsumcascade.rewrites.step import Rewritten, Step


def join(cascade: Cascade, outer: str) -> Rewritten:
    """Join the rank of a variable, which numbers tiles, with that of the elements of a tile.

    Returns: a cascade of equal value, the same one where the precondition does not hold. Cost: linear in the cascade.
    """
    found = next((p for d in cascade.ranks if (p := _partition(cascade, outer, d)) is not None), None)
    if found is None or not all(isinstance(s, Einsum) for s in cascade.body):
        return Rewritten(cascade=cascade)
    inner, whole = found
    v = variable_of(whole)
    place = _place(outer, inner)
    pair = (Var(name=outer), Var(name=inner))
    one = Var(name=v)

    def leaf(e: Expr) -> Expr | None:
        if e == place:
            return one
        if isinstance(e, Read):
            return replace(e, indices=_joined(tuple(transform(i, leaf) for i in e.indices), pair, one))
        return None

    body: list[Einsum] = []
    for s in cascade.einsums:
        if not set(s.space) & {outer, inner}:
            body.append(s)
            continue
        if v in s.space:
            return Rewritten(cascade=cascade)
        ranks = tuple(v if r == outer else r for r in s.ranks if r != inner)
        new = replace(
            s,
            indices=_joined(s.indices, pair, one),
            expr=transform(s.expr, leaf),
            where=tuple(transform(c, leaf) for c in s.where),
            ranks=ranks,
        )
        if {outer, inner} & {*new.space, *variables(new.expr, *new.where)}:
            return Rewritten(cascade=cascade)
        body.append(new)
    constraints = tuple(transform(c, leaf) for c in cascade.constraints if c != _inside(outer, inner, whole))
    if {outer, inner} & set(variables(*constraints)):
        return Rewritten(cascade=cascade)
    new_cascade = replace(cascade, body=tuple(body), constraints=constraints)
    new_cascade = _undefined(_undefined(new_cascade, outer), inner)
    o, i = rank_of(outer), rank_of(inner)
    step = Step(
        rule="join",
        what=f"{o} tiles of {i} elements walk {whole}, each element once",
        proof=(f"{outer} = {v} // {i}, {inner} = {v} % {i}: the pairs with {place} < {whole} are one to one with {v}",),
    )
    return Rewritten(cascade=new_cascade, steps=(step,))


def _place(outer: str, inner: str) -> Apply:
    return apply("add", apply("mul", Var(name=outer), Scalar(name=rank_of(inner))), Var(name=inner))


def _inside(outer: str, inner: str, whole: str) -> Expr:
    return apply("lt", _place(outer, inner), Scalar(name=whole))


def _partition(cascade: Cascade, outer: str, d: Definition) -> tuple[str, str] | None:
    """The variable within a tile and the rank that is partitioned, if tiles of `d` are what the variable numbers."""
    size = Scalar(name=rank_of(d.name))
    tiles = next((x.expr for x in cascade.ranks if x.name == outer), None)
    for r in {v for i in cascade.inputs for v in i.indices}:
        whole = Scalar(name=rank_of(r))
        up = apply("sub", apply("add", whole, size), Num(value=1))
        if tiles == apply("floordiv", up, size) and _inside(outer, d.name, whole.name) in cascade.constraints:
            return d.name, whole.name
    return None


def _joined(indices: tuple[Expr, ...], pair: tuple[Expr, Expr], one: Expr) -> tuple[Expr, ...]:
    """A pair of axes as one, in the place of the first."""
    if pair[0] in indices and pair[1] in indices:
        return tuple(one if i == pair[0] else i for i in indices if i != pair[1])
    return indices


def _undefined(cascade: Cascade, variable: str) -> Cascade:
    """The cascade without the definition of a rank that nothing names any more."""
    name = rank_of(variable)
    exprs = [x for e in cascade.einsums for x in (e.expr, *e.indices, *e.where)]
    exprs += [*cascade.constraints, *(d.expr for d in (*cascade.constants, *cascade.ranks) if d.name != variable)]
    if name in scalars(*exprs) or any(variable in i.indices for i in cascade.inputs):
        return cascade
    return replace(cascade, ranks=tuple(d for d in cascade.ranks if d.name != variable))

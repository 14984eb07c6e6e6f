"""Add a batch rank to a cascade that has none."""

from __future__ import annotations

import re
from dataclasses import replace

from einsumcascade.errors import Diagnostic, InputError, nearest
from einsumcascade.language.check import check, extents_known
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Read,
    Statement,
    Var,
    reads,
    transform,
    variables,
    walk,
)


def over(cascade: Cascade, variable: str, tensors: tuple[str, ...]) -> Cascade:
    """Give inputs one more rank, outermost, and with them everything that is computed from them.

        in Q[p,e], K[m,e]; S[p,m] = Q[p,e] * K[m,e]   over b, Q   ->   S[b,p,m] = Q[b,p,e] * K[m,e]

    Guaranteed: at each value of `variable` the cascade computes what it did before.

    Args:
        cascade: a checked cascade.
        variable: the new rank variable, lower case.
        tensors: names of inputs; none means all of them.

    Raises: InputError: `unknown-input`; `name-clash`, the variable means something already;
        `rank-variable-case`, it is no lower-case name.
    Cost: quadratic in the Einsums at worst.
    """
    _complain(cascade, variable, tensors)
    batched = set(tensors or (i.tensor for i in cascade.inputs))
    while True:
        new = {s.tensor for s in walk(cascade.body) if not isinstance(s, Iter) and _depends(cascade, s, batched)}
        if new <= batched:
            break
        batched |= new

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Read) and e.tensor in batched:
            return replace(e, indices=(Var(name=variable), *(transform(i, leaf) for i in e.indices)))
        return None

    def statement(s: Statement) -> Statement:
        if isinstance(s, Iter):
            return replace(s, body=tuple(map(statement, s.body)))
        left = tuple(transform(i, leaf) for i in s.indices)
        left = (Var(name=variable), *left) if s.tensor in batched else left
        s = replace(s, indices=left, expr=transform(s.expr, leaf))
        return replace(s, where=tuple(transform(c, leaf) for c in s.where)) if isinstance(s, Einsum) else s

    new_cascade = replace(
        cascade,
        inputs=tuple(replace(i, indices=(variable, *i.indices)) if i.tensor in batched else i for i in cascade.inputs),
        constraints=tuple(transform(c, leaf) for c in cascade.constraints),
        body=tuple(map(statement, cascade.body)),
        source=None,
    )
    problems = tuple(check(new_cascade))
    if problems:
        raise InputError(diagnostics=problems)
    return new_cascade


def _depends(cascade: Cascade, s: Einsum | Init, batched: set[str]) -> bool:
    exprs = [s.expr, *s.indices]
    if isinstance(s, Einsum):
        # A constraint that differs along the new rank restricts an Einsum only there.
        exprs += [*s.where, *(c for c in cascade.constraints if set(variables(c)) <= set(s.space))]
    return any(r.tensor in batched for r in reads(*exprs))


def _complain(cascade: Cascade, variable: str, tensors: tuple[str, ...]) -> None:
    problems = []
    inputs = tuple(i.tensor for i in cascade.inputs)
    for t in tensors:
        if t not in inputs:
            problems.append(
                Diagnostic(
                    code="unknown-input",
                    headline=f"the cascade has no input '{t}'",
                    rule=f"its inputs are {', '.join(inputs)}",
                    hint=nearest(t, inputs),
                )
            )
    if not re.fullmatch(r"[a-z][A-Za-z0-9_]*", variable):
        problems.append(
            Diagnostic(
                code="rank-variable-case",
                headline=f"'{variable}' is no rank variable",
                rule="rank variables are lower-case names",
                hint="for instance 'b'",
            )
        )
    else:
        named = {s.tensor for s in walk(cascade.body) if not isinstance(s, Iter)} | set(inputs)
        named |= {c.name for c in cascade.constants} | set(extents_known(cascade))
        if variable in named:
            problems.append(
                Diagnostic(
                    code="name-clash",
                    headline=f"'{variable}' is a name of the cascade already",
                    rule="a new rank has a name of its own",
                    hint="known: " + ", ".join(sorted(named)),
                )
            )
    if problems:
        raise InputError(diagnostics=tuple(problems))

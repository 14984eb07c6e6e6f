"""Begin a running state at what every row has once, instead of at the identity.

    TM[p]   = S[p,m] :: max(m)                       RTM[p,0] = SINK          (a key that every row has)
    GM[p]   = max(TM[p], SINK)                  ->   RSD[p,0] = exp(SINK - SINK)
    AV[p,f] = NV[p,f] / (SD[p] + exp(SINK - GM[p]))  AV = RNV / RSD

A reduction T may begin at x if every read of T joins it with x by T's own operator. Preconditions, beside that: x is
moved from reference to reference as the state is, x(d') = C(d, d') x(d), which is proven like the correction itself
(a constant added to a normaliser is not, and stays outside); and no other reduction has to wait for it. Source:
attention sinks, as keys without values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Statement,
    apply,
    reads,
    subexpressions,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import factors, is_map, is_positive, product


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Where a reduction begins.

    Args:
        value: its first value, over the variables of its left side.
        joins: the expressions that joined it, each with what is left of it: the reduction, or a multiple of it.
    """

    value: Expr
    joins: Mapping[Expr, Expr]


def seeds_of(cascade: Cascade, over: tuple[str, ...]) -> dict[str, Seed]:
    """Find the reductions over some ranks that every read joins with one value by their own operator.

    Args:
        cascade: a cascade; over: variables of the ranks reduced.

    Cost: linear in the expressions for each reduction.
    """
    found: dict[str, Seed] = {}
    for s in cascade.body:
        if isinstance(s, Einsum) and s.reduction is not None and set(s.ranks) & set(over):
            seed = _seed(s, cascade)
            if seed is not None and not set(variables(seed.value)) - set(s.free) and not _delays(s, seed, cascade):
                found[s.tensor] = seed
    return found


def planted(cascade: Cascade, seeds: Mapping[str, Seed]) -> Cascade:
    """Put the reduction alone where it was joined with its seed: its state has begun there."""
    joins = {whole: left for seed in seeds.values() for whole, left in seed.joins.items()}

    def one(s: Statement) -> Statement:
        match s:
            case Iter():
                return replace(s, body=tuple(map(one, s.body)))
            case Init():
                return replace(s, expr=transform(s.expr, joins.get))
            case Einsum():
                return replace(
                    s, expr=transform(s.expr, joins.get), where=tuple(transform(c, joins.get) for c in s.where)
                )

    return cascade.with_body(tuple(map(one, cascade.body))) if seeds else cascade


def _seed(s: Einsum, cascade: Cascade) -> Seed | None:
    """What every read of a reduction is joined with; None if they are not alike."""
    assert s.reduction is not None
    op = s.reduction.op.name
    scaled = _scaled(s, cascade)
    joins: dict[Expr, Expr] = {}
    values: list[Expr] = []
    count = 0
    for t in walk(cascade.body):
        exprs = (t.expr, *t.where) if isinstance(t, Einsum) else (t.expr,) if isinstance(t, Init) else ()
        if isinstance(t, Einsum) and t.tensor in {r.tensor for r in scaled}:
            continue
        for e in (e for x in exprs for e in subexpressions(x)):
            count += isinstance(e, Read) and e.tensor in {r.tensor for r in scaled}
            if not (isinstance(e, Apply) and e.op == op and len(e.args) == 2):
                continue
            for own, other in (e.args, e.args[::-1]):
                if isinstance(own, Read) and own in scaled:
                    joins[e] = own
                    scale = scaled[own]
                    values.append(other if scale == Num(value=1) else apply("div", other, scale))
    names = {r.tensor for r in scaled}
    if not values or len(values) != count or names & set(cascade.output_names):
        return None
    if any(v != values[0] for v in values) or names & {r.tensor for r in reads(values[0])}:
        return None
    return Seed(value=values[0], joins=joins)


def _delays(s: Einsum, seed: Seed, cascade: Cascade) -> bool:
    """Whether a later reduction over a rank that the seed needs whole could no longer share the loop over it."""
    made = {e.tensor: e for e in cascade.einsums}
    needed = {t for r in reads(seed.value) for t in (r.tensor, *ancestors(cascade, r.tensor)) if t in made}
    whole = {v for t in needed for v in made[t].ranks}
    return any(set(e.ranks) & whole and s.tensor in ancestors(cascade, e.tensor) for e in cascade.einsums)


def cancelled(e: Expr) -> Expr:
    """The expression without factors that are multiplied and divided by: `scale * (x / scale)` is x."""

    def leaf(x: Expr) -> Expr | None:
        if not (isinstance(x, Apply) and x.op in ("mul", "div")):
            return None
        powers: dict[Expr, int] = {}
        for f, n in factors(x):
            powers[f] = powers.get(f, 0) + n
        if len(powers) == len(factors(x)):
            return None
        return product(tuple((cancelled(f), n) for f, n in powers.items() if n))

    return transform(e, leaf)


def _scaled(s: Einsum, cascade: Cascade) -> dict[Read, Expr]:
    """The reads that are a reduction or a positive multiple of it by constants, with the factor."""
    own = Read(tensor=s.tensor, indices=s.indices)
    out: dict[Read, Expr] = {own: Num(value=1)}
    for t in cascade.body:
        if isinstance(t, Einsum) and is_map(t) and not t.where and t.indices == s.indices and own in reads(t.expr):
            rest = tuple((f, n) for f, n in factors(t.expr) if f != own)
            scale = product(rest)
            constant = not reads(scale) and not variables(scale)
            if constant and (own, 1) in factors(t.expr) and is_positive(scale, cascade):
                out[Read(tensor=t.tensor, indices=t.indices)] = scale
    return out

"""Sum over features instead of the rank, against a value that is known already (R7).

    DP[p,m] = DO[p,f] * V[m,f] :: sum(f)
    D[p]    = A[p,m] * DP[p,m] :: sum(m)         ->   D[p] = DO[p,f] * O[p,f] :: sum(f)
    O[p,f]  = A[p,m] * V[m,f]  :: sum(m)

Two sums change places, and the inner one is there already: computed by the cascade, or an input that a forward pass has
saved. What needed all of the rank then does not, which is one pass less where the rank is read for nothing else.
Precondition: the factors of the inner sum and of the known value are equal by algebra, over the same points.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from einsumcascade.analysis.dependence import ancestors, conditions
from einsumcascade.analysis.passes import passes_of
from einsumcascade.analysis.sizes import long_ranks
from einsumcascade.language.ir import Cascade, Einsum, Expr, Iter, Read, Var, rank_of, reads, variables
from einsumcascade.rewrites.algebra import (
    Factor,
    drop_dead,
    equal,
    factors,
    inline,
    inline_reads,
    is_map,
    ordered,
    producers,
    product,
)
from einsumcascade.rewrites.step import Rewritten, Step


def reassociate(
    cascade: Cascade,
    *,
    saved: tuple[Einsum, ...] = (),
    computed: bool = True,
    against: Collection[str] | None = None,
) -> Rewritten:
    """Apply the rule wherever it holds.

    Args:
        cascade: with divisions where the text has them.
        saved: inputs with what they are known to be. computed: use what the cascade computes too.
        against: the only tensors to use, where given.

    Returns: a cascade of equal value for inputs that are as `saved` says. Cost: O(sums^2) comparisons.
    """
    if any(isinstance(s, Iter) for s in cascade.body):
        return Rewritten(cascade=cascade)
    steps: list[Step] = []
    for s in [e for e in cascade.einsums if e.reduce == "sum"]:
        found = _summed(s, cascade, saved, computed)
        if found is None:
            continue
        new, known = found
        if against is not None and known.tensor not in against:
            continue
        rewritten = cascade.with_body(ordered(tuple(new if x is s else x for x in cascade.body)))
        if not _helps(cascade, rewritten, s, new):
            continue
        cascade = rewritten
        steps.append(
            Step(
                rule="R7 reassociate",
                kind="algebraic",
                what=f"{s.tensor} sums over {', '.join(v.upper() for v in new.ranks)} against {known.tensor}, "
                f"which is {'saved' if known in saved else 'computed'} already",
                before=(str(s),),
                after=(str(new),),
                proof=(str(known), "the two sums change places"),
            )
        )
    return Rewritten(cascade=drop_dead(cascade), steps=tuple(steps))


def _helps(old: Cascade, new: Cascade, s: Einsum, other: Einsum) -> bool:
    """Whether passes are saved, or else a sum over a length becomes one over a feature, at no other rank's expense."""
    before, after = passes_of(old), passes_of(drop_dead(new))
    if any(after[r] > before[r] for r in after):
        return False
    lengths = set(long_ranks(old))
    shorter = {rank_of(v) for v in s.ranks} <= lengths and not {rank_of(v) for v in other.ranks} & lengths
    return shorter or sum(after.values()) < sum(before.values())


def _summed(s: Einsum, cascade: Cascade, saved: tuple[Einsum, ...], computed: bool) -> tuple[Einsum, Einsum] | None:
    """The Einsum in place of a sum over the rank, and the known value it reads."""
    defs = producers(cascade)
    for n, (inner, power) in enumerate(parts := _factors(s.expr, defs, set(s.ranks))):
        d = defs.get(inner.tensor) if isinstance(inner, Read) and power == 1 else None
        if d is None or d.reduce != "sum" or inner != Read(tensor=d.tensor, indices=d.indices):
            continue
        if set(d.ranks) & set(s.space) or not set(s.ranks) <= set(d.free) or d.where:
            continue
        own = factors(d.expr)
        fixed = tuple(f for f in own if not set(variables(f[0])) & set(s.ranks))
        along = tuple(f for f in own if f not in fixed)
        others = (*parts[:n], *parts[n + 1 :])
        numbers = tuple(f for f in others if not reads(f[0]) and not variables(f[0]))
        fixed += numbers
        weights = tuple(f for f in others if f not in numbers)
        left = {v for f, _ in (*weights, *along) for v in variables(f)} - set(s.ranks)
        for known in _known(s, cascade, saved, computed):
            if set(known.free) != left or not _same_points(s, d, known, cascade):
                continue
            if equal(_whole(product((*weights, *along)), cascade), _whole(known.expr, cascade)):
                value = product((*fixed, (Read(tensor=known.tensor, indices=known.indices), 1)))
                return replace(s, expr=value, ranks=d.ranks, where=()), known
    return None


def _known(s: Einsum, cascade: Cascade, saved: tuple[Einsum, ...], computed: bool) -> Iterator[Einsum]:
    """Sums over the same rank that do not need `s`."""
    for e in (*saved, *(cascade.einsums if computed else ())):
        plain = all(isinstance(i, Var) for i in e.indices)
        alike = e is not s and e.reduce == "sum" and set(e.ranks) == set(s.ranks) and plain
        if alike and (e in saved or s.tensor not in ancestors(cascade, e.tensor)):
            yield e


def _same_points(s: Einsum, d: Einsum, known: Einsum, cascade: Cascade) -> bool:
    """Whether the sum, its inner sum and the known value run over the same points, and the value is there at all."""

    def held(e: Einsum) -> set[Expr]:
        return {c for c in conditions(cascade, e) if set(variables(c)) & set(s.ranks)}

    inner = {c for c in conditions(cascade, known) if set(variables(c)) & set(d.ranks)}
    return held(s) == held(known) and held(d) <= held(s) and inner <= set(conditions(cascade, d))


def _factors(expr: Expr, defs: dict[str, Einsum], over: set[str]) -> tuple[Factor, ...]:
    """The factors of a product, those of maps along the rank that are products themselves included."""
    out: list[Factor] = []
    for f, n in factors(expr):
        d = defs.get(f.tensor) if isinstance(f, Read) else None
        if d is not None and is_map(d) and isinstance(f, Read) and set(variables(f)) & over:
            inner = inline(f, d)
            if len(factors(inner)) > 1:
                out += [(g, n * k) for g, k in _factors(inner, defs, over)]
                continue
        out.append((f, n))
    return tuple(out)


def _whole(expr: Expr, cascade: Cascade) -> Expr:
    return inline_reads(expr, producers(cascade), lambda r, d: True)

"""Take a factor that a reduction cannot know yet out of a sum of products (R6, R1).

    H = (SN/SD) * log(SN/SD) :: sum(m), SN = exp(S - GM)   ->   H0 = SN * (S - GM) :: sum(m);  H1 = SN :: sum(m)
                                                               H = H0 / SD - H1 * log(SD) / SD
    O = relu(X / r) * V :: sum(m), r > 0                   ->   O0 = relu(X) * V :: sum(m);    O = O0 / r

A reference that scales a summand, or enters it through its logarithm, need not be known while the rank is read: the
summand is bounded without it. What enters through an exponential or a difference stays, and is corrected. Precondition:
the summand is, by algebra, a sum of products G(x) u(r) with u a power of r times a polynomial in log r.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Num, Read, Statement, apply, reads, variables
from einsumcascade.rewrites.algebra import (
    drop_dead,
    equal,
    factors,
    fresh,
    from_sympy,
    inline_reads,
    is_map,
    is_positive,
    names_taken,
    producers,
    product,
    to_sympy,
    total,
)
from einsumcascade.rewrites.proofs import leaves
from einsumcascade.rewrites.span import canonical, opened
from einsumcascade.rewrites.step import Rewritten, Step


def separate(cascade: Cascade, *, whole: Collection[str] = ()) -> Rewritten:
    """Apply the rule wherever it holds, but for sums over ranks that a tile holds `whole`, which wait for nothing.

    Returns: a cascade of equal value. Cost: some SymPy for each late reduction.
    """
    steps: list[Step] = []
    taken = names_taken(cascade)
    body: list[Statement] = []
    for s in cascade.body:
        sums = isinstance(s, Einsum) and s.reduce == "sum" and not set(s.ranks) <= set(whole)
        new = _separated(s, cascade, taken) if sums and isinstance(s, Einsum) else None
        body += new or (s,)
        if new and isinstance(s, Einsum):
            steps.append(
                Step(
                    rule="R6 separate",
                    kind="algebraic",
                    what=f"{s.tensor} is made of sums that need not wait for its factors",
                    before=(str(s),),
                    after=tuple(map(str, new)),
                )
            )
    return Rewritten(cascade=drop_dead(cascade.with_body(tuple(body))), steps=tuple(steps))


def _separated(s: Einsum, cascade: Cascade, taken: set[str]) -> tuple[Einsum, ...] | None:
    defs, over = producers(cascade), set(s.ranks)

    def late(r: Read) -> bool:
        """Whether a read is, or comes from, a reduction over one of these ranks."""
        return any(t in defs and over & set(defs[t].ranks) for t in (r.tensor, *ancestors(cascade, r.tensor)))

    if not any(late(r) for r in reads(s.expr)):
        return None
    summand = inline_reads(s.expr, defs, lambda r, d: bool(set(variables(r)) & over) and late(r) and is_map(d))
    references = [r for r in reads(summand) if not set(variables(r)) & over and late(r)]
    free = [r for r in references if is_positive(r, cascade, strict=False, live=True)]
    if not free or any(_differs(summand, r, over) for r in free):
        return None
    import sympy as sp

    symbols: dict[Expr, Any] = {}

    def symbol(e: Expr) -> Any:
        if e not in symbols:
            fixed = not set(variables(e)) & over
            known = {"positive": True} if fixed and is_positive(e, cascade, live=True) else {}
            if not known and fixed and is_positive(e, cascade, strict=False, live=True):
                known = {"nonnegative": True}
            symbols[e] = sp.Symbol(f"_{len(symbols)}", real=True, **known)
        return symbols[e]

    f = to_sympy(summand, symbol)
    if any(r not in symbols for r in references) or any(e for e in symbols if e not in leaves(summand)):
        return None
    streamed = {v for e, v in symbols.items() if set(variables(e)) & over}
    out = [symbols[r] for r in free]
    groups: dict[Any, Any] = {}
    for term in sp.Add.make_args(opened(f, streamed)):
        rest, factor = term.as_independent(*out, as_Add=False)
        if factor.free_symbols - set(out) or factor.has(sp.exp):
            return None
        groups[factor] = groups.get(factor, 0) + rest
    leading = next(iter(groups))
    if leading == 1 and len(groups) == 1:
        return None
    for u in groups:
        ratio = sp.cancel(u / leading)
        logs = {sp.log(r): sp.Dummy() for r in out}
        if not ratio.xreplace(logs).is_polynomial(*logs.values()) or ratio.xreplace(logs).free_symbols & set(out):
            return None
    back = {v: e for e, v in symbols.items()}
    spelled = dict(back)
    names: dict[Any, Any] = {}
    for r in dict.fromkeys(r for r in reads(s.expr) if set(variables(r)) & over and late(r)):
        for t in (r, *_behind(r, defs, over)):
            inner = inline_reads(t, defs, lambda x, d: bool(set(variables(x)) & over) and late(x) and is_map(d))
            known = canonical(to_sympy(inner, symbol))
            if known.args and not known.free_symbols & set(out):
                names[known] = sp.Symbol(f"_t{len(names)}")
                spelled[names[known]] = t
    sums: list[Einsum] = []
    parts = []
    for k, (u, rest) in enumerate(groups.items()):
        number, rest = canonical(rest).as_coeff_Mul()
        inside, outside = from_sympy(rest.xreplace(names), spelled), from_sympy(abs(number) * u, back)
        if inside is None or outside is None or set(s.ranks) - set(variables(inside)):
            return None
        held = {v for c in (*cascade.constraints, *s.where) if over & set(variables(c)) for v in variables(c)}
        kept = tuple(i for i in s.indices if set(variables(i)) & (set(variables(inside)) | held))
        raw = replace(s, tensor=f"{s.tensor}{k}", indices=kept, expr=inside)
        twin = next((e for e in cascade.einsums if _same(e, raw)), None)
        if twin is None:
            raw = replace(raw, tensor=fresh(raw.tensor, taken))
            sums.append(raw)
        read = Read(tensor=(twin or raw).tensor, indices=kept)
        part = product(((read, 1), *factors(outside)))
        if u.has(sp.log):
            # Of no key, the logarithm is -inf and the sum 0.
            part = apply("select", apply("eq", read, Num(value=0)), Num(value=0), part)
        parts.append((part, -1 if number < 0 else 1))
    value = replace(s, expr=total(tuple(parts)), reduce=None, ranks=(), where=())
    return (*sums, value)


def _differs(e: Expr, reference: Read, over: set[str]) -> bool:
    """Whether a reference is added to a value along the rank, or subtracted from it, by itself."""
    if not isinstance(e, Apply):
        return False
    if e.op in ("add", "sub"):
        with_it = [reference in reads(a) for a in e.args]
        along = [bool(set(variables(a)) & over) for a in e.args]
        bare = [a == reference for a in e.args]
        if any(w and b for w, b in zip(with_it, bare, strict=True)) and any(along):
            return True
    return any(_differs(a, reference, over) for a in e.args)


def _same(e: Einsum, other: Einsum) -> bool:
    """Whether two Einsums sum the same over the same points."""
    alike = (e.indices, e.reduce, e.ranks, e.where) == (other.indices, other.reduce, other.ranks, other.where)
    return alike and equal(e.expr, other.expr)


def _behind(read: Read, defs: dict[str, Einsum], over: set[str]) -> list[Read]:
    """The maps along the rank that a map reads, through others too."""
    from einsumcascade.rewrites.algebra import inline

    out: list[Read] = []
    pending = [read]
    for r in pending:
        d = defs.get(r.tensor)
        if d is None or not is_map(d):
            continue
        for x in reads(inline(r, d)):
            if set(variables(x)) & over and x not in out:
                out.append(x)
                pending.append(x)
    return out

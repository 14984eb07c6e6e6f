"""Compute again what is read at another place than it was written.

    VF[h] = sqrt(Q[h]);  RK[h] = select(VF[g] > VF[h], 1, 0) :: sum(g)    ->   VF_g[g] = sqrt(Q[g]), read as VF_g[g]
    A[p,m] = E[p,m] / Z[p];  D[p,m] = A[p,m] - A[p-1,m]                   ->   A_p[p,m] = E_p[p,m] / Z[p-1], and E_p
    N[k] = W[g,k] :: sum(g);  D[g] = N[g] * 2             ->   N_g[g] = W_g2[g2,g] :: sum(g2), and W_g2, for rank g2 = G

A tile in registers can be read where its program stands and nowhere else, so its definition is written once more at the
other place, and what it reads in turn, down to inputs and to what another kernel leaves in memory. Precondition: the
tensor is defined outside iterations, over plain variables; a read that may be out of range stands in no `select`, or
in one whose condition is that it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from einsumcascade.analysis.dependence import canonical_sizes
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    variables,
)
from einsumcascade.language.terms import conjuncts
from einsumcascade.rewrites.algebra import fresh, names_taken
from einsumcascade.rewrites.step import Rewritten, Step


def recompute_shifted(cascade: Cascade, *, kept: Callable[[Einsum], bool]) -> Rewritten:
    """Write definitions again wherever an Einsum reads one at another place.

    Args:
        cascade: after the rewrites that need no tile.
        kept: whether an Einsum's result is in memory for others, so that it can be read anywhere.

    Returns: a cascade of equal value, and a step for each definition written again.
    Cost: O(Einsums) definitions for each place; what they compute is computed again.
    """
    return _Shifted(cascade, kept).run()


class _Shifted:
    def __init__(self, cascade: Cascade, kept: Callable[[Einsum], bool]) -> None:
        self.cascade, self.kept = cascade, kept
        self.sizes = canonical_sizes(cascade)
        self.taken = names_taken(cascade)
        self.defs = {s.tensor: s for s in cascade.body if isinstance(s, Einsum)}
        self.copies: dict[tuple[str, tuple[Expr, ...]], Read] = {}
        self.after: dict[str, list[Einsum]] = {}
        self.steps: list[Step] = []
        self.ranks: list[Definition] = []
        # Indices that are in range wherever the definition that is being written again is read.
        self.covered: frozenset[tuple[Expr, str]] = frozenset()

    def run(self) -> Rewritten:
        body: list[Statement] = []
        for s in self.cascade.body:
            if isinstance(s, Einsum) and not s.is_fiberwise:
                s = self._reader(s)
            body.append(s)
        placed = tuple(x for s in body for x in (s, *(self.after.get(s.tensor, ()) if isinstance(s, Einsum) else ())))
        cascade = replace(self.cascade, ranks=(*self.cascade.ranks, *self.ranks)).with_body(placed)
        return Rewritten(cascade=cascade, steps=tuple(self.steps))

    def _reader(self, s: Einsum) -> Einsum:
        conditions: list[Expr] = []

        def at(e: Expr, chosen: bool, known: frozenset[Expr]) -> Expr:
            """An expression over copies, where some conditions hold; chosen: other points may take another value."""
            match e:
                case Read():
                    missing = [c for c in self._inside(e) if c not in known] if e.tensor in self.defs else []
                    found = self._copy(e) if not (chosen and missing) else None
                    if found is None:
                        return replace(e, indices=tuple(at(i, chosen, known) for i in e.indices))
                    conditions.extend(missing)
                    return found
                case Apply(op="select", args=(c, yes, no)):
                    held = known | {_upward(x) for x in conjuncts([c])}
                    return replace(e, args=(at(c, chosen, known), at(yes, True, held), at(no, True, known)))
                case Apply():
                    return replace(e, args=tuple(at(a, chosen, known) for a in e.args))
                case _:
                    return e

        expr = at(s.expr, False, frozenset())
        where = tuple(at(c, True, frozenset()) for c in s.where)
        new = [c for c in dict.fromkeys(conditions) if c not in where]
        if expr == s.expr and where == s.where:
            return s
        return replace(s, expr=expr, where=(*where, *new))

    def _copy(self, read: Read) -> Read | None:
        """What stands for a read at another place; None where the read stays."""
        d = self.defs.get(read.tensor)
        if d is None or read.indices == d.indices or d.is_fiberwise or self.kept(d):
            return None
        own = [i.name for i in d.indices if isinstance(i, Var)]
        used = variables(*read.indices)
        computed = any(r.tensor in self.defs for r in reads(*read.indices))
        if len(own) < len(d.indices) or len(set(own)) < len(own) or computed:
            return None
        inner = {v for v in d.space if v not in own}
        if inner & set(used):
            # What it reduces walks a rank of its own where the place is told by a variable of that name.
            d = self._renamed(d, inner & set(used))
            if d is None:
                return None
            inner = {v for v in d.space if v not in own}
        at = dict(zip(own, read.indices, strict=True))
        new = [v for v in used if v not in own]
        culled = (c for c in self.cascade.constraints if set(variables(c)) & set(new))
        if any(set(variables(c)) <= {*used, *inner} for c in culled):
            return None
        key = (read.tensor, read.indices)
        if key not in self.copies:
            moved = variables(*(i for i in read.indices if not isinstance(i, Var)))
            name = fresh("_".join((read.tensor, *(new or moved))), self.taken)
            self.copies[key] = Read(tensor=name, indices=tuple(Var(name=v) for v in used))
            shared = tuple(c for c in self.cascade.constraints if set(variables(c)) <= set(d.space))
            # A condition over the new place would hold for the old one too.
            copy = Einsum(
                tensor=name,
                indices=self.copies[key].indices,
                expr=substitute(d.expr, at),
                reduce=d.reduce,
                ranks=d.ranks,
                where=tuple(substitute(c, at) for c in (*shared, *d.where)),
            )
            around = self.covered
            self.covered = around | {(i, self._size(v)) for v, i in at.items()}
            copy = self._reader(copy)
            self.covered = around
            self.after.setdefault(d.tensor, []).append(copy)
            self.steps.append(
                Step(rule="computed again", what=f"{read} is computed where it is read", after=(str(copy),))
            )
        return self.copies[key]

    def _renamed(self, d: Einsum, clashing: set[str]) -> Einsum | None:
        """A definition that reduces over other variables; None where a constraint means those that it has."""
        if any(set(variables(c)) & clashing for c in self.cascade.constraints):
            return None
        names: dict[str, Expr] = {}
        for v in sorted(clashing):
            n = 2
            while f"{v}{n}" in self.taken or rank_of(f"{v}{n}") in self.taken:
                n += 1
            self.taken |= {f"{v}{n}", rank_of(f"{v}{n}")}
            names[v] = Var(name=f"{v}{n}")
            self.ranks.append(Definition(name=f"{v}{n}", expr=Scalar(name=rank_of(v))))
            self.sizes[rank_of(f"{v}{n}")] = self._size(v)
        ranks = tuple(str(names.get(v, v)) for v in d.ranks)
        where = tuple(substitute(c, names) for c in d.where)
        return replace(d, expr=substitute(d.expr, names), ranks=ranks, where=where)

    def _inside(self, read: Read) -> list[Expr]:
        """The conditions for a read to be in range."""
        out: list[Expr] = []
        for own, index in zip(self.defs[read.tensor].indices, read.indices, strict=True):
            if not isinstance(own, Var):
                return []
            if isinstance(index, Var) and self._fits(index.name, own.name):
                continue
            if (index, self._size(own.name)) in self.covered:
                continue
            out += [] if isinstance(index, Var) else [apply("ge", index, Num(value=0))]
            out.append(apply("lt", index, Scalar(name=rank_of(own.name))))
        return out

    def _fits(self, variable: str, axis: str) -> bool:
        """Whether a rank is as long as another, or shorter by a number."""
        if self._size(variable) == self._size(axis):
            return True
        extent = next((d.expr for d in self.cascade.ranks if d.name == variable), None)
        match extent:
            case Apply(op="sub", args=(Scalar(name=whole), Num(value=less))):
                return less >= 0 and whole in (rank_of(axis), self._size(axis))
        return False

    def _size(self, variable: str) -> str:
        return self.sizes.get(rank_of(variable), rank_of(variable))


def _upward(condition: Expr) -> Expr:
    """A condition that something is at least 0, or less than an extent, as `_inside` writes it."""
    match condition:
        case Apply(op="le", args=(x, y)):
            return apply("ge", y, x)
        case Apply(op="gt", args=(x, y)):
            return apply("lt", y, x)
        case _:
            return condition

"""Write a rank of a few elements out: one tensor for each of its coordinates.

    rank s = 2;  S[s,p,m] = Q[s,p,e] * K[s,m,e] :: sum(e)   ->   S_0[p,m] = Q[0,p,e] * K[0,m,e] :: sum(e),  S_1 ...
    O[p] = LAM[s] * N[s,p] :: sum(s)                        ->   O[p] = LAM[0] * N_0[p] + LAM[1] * N_1[p]
    Z[p] = D[p,2] + D[p,3]                                  ->   Z[p] = D_2[p] + D_3[p]

Two softmaxes over one V then stand in one loop that loads V once, and the accumulators of several classes are tiles of
two axes each. Precondition: the text gives the extent by a number, at most `UNROLL_LIMIT`; every index that has the
variable is a number once the variable is one; no output, iteration or operation on whole fibers has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

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
    Var,
    apply,
    rank_of,
    reads,
    scalars,
    substitute,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import fresh, names_taken
from einsumcascade.rewrites.step import Rewritten, Step

UNROLL_LIMIT = 8


def unroll(cascade: Cascade, *, extents: Mapping[str, int]) -> Rewritten:
    """Write out every rank that the text defines by a small number and that stands in no index with another variable.

    Args:
        cascade: without means over such a rank (`expand_means`).
        extents: by rank name, of at least the ranks that the text defines by numbers.

    Returns: a cascade of equal value that no longer has these ranks, and a step for each.
    Cost: O(statements * extents).
    """
    steps: list[Step] = []
    for d in cascade.ranks:
        size = extents.get(rank_of(d.name), 0)
        if not isinstance(d.expr, Num) or not 1 <= size <= UNROLL_LIMIT:
            continue
        new = _Unroll(cascade, d.name, size).run()
        if new is not None:
            what = f"{rank_of(d.name)} has {size} elements: a tensor for each"
            steps.append(Step(rule="unroll", what=what, after=tuple(str(s) for s in new.body if s not in cascade.body)))
            cascade = new
    return Rewritten(cascade=cascade, steps=tuple(steps))


class _Unroll:
    """One rank of one cascade."""

    def __init__(self, cascade: Cascade, variable: str, size: int) -> None:
        self.cascade, self.variable, self.size = cascade, variable, size
        self.given = {i.tensor for i in cascade.inputs}
        self.axis: dict[str, int] = {}
        self.names: dict[tuple[str, int], str] = {}

    def run(self) -> Cascade | None:
        """The cascade without the rank; None where it cannot be, or nothing would come of it."""
        if not self._fits():
            return None
        taken = names_taken(self.cascade)
        for t in self.axis:
            if t not in self.given:
                self.names |= {(t, k): fresh(f"{t}_{k}", taken) for k in range(self.size)}
        self.taken = taken
        body = tuple(n for s in self.cascade.body for n in self._statement(s))
        kept = tuple(c for c in self.cascade.constraints if self.variable not in variables(c))
        ranks = tuple(d for d in self.cascade.ranks if d.name != self.variable or self._is_named())
        return replace(self.cascade.with_body(body), constraints=kept, ranks=ranks)

    def _is_named(self) -> bool:
        """Whether the extent still counts: an input has the rank, or something reads its name."""
        name = rank_of(self.variable)
        exprs = [e for s in walk(self.cascade.body) if isinstance(s, Einsum | Init) for e in _exprs(s)]
        exprs += [d.expr for d in (*self.cascade.ranks, *self.cascade.constants)]
        carried = any(self.variable in i.indices for i in self.cascade.inputs)
        return carried or any(name in scalars(e) for e in exprs)

    def _fits(self) -> bool:
        v, used = self.variable, False
        for i in self.cascade.inputs:
            if v in i.indices:
                self.axis[i.tensor] = i.indices.index(v)
        for s in walk(self.cascade.body):
            if isinstance(s, Iter):
                if s.var == v or any(isinstance(x, Einsum) and v in x.space for x in walk(s.body)):
                    return False
                continue
            own = [n for n, i in enumerate(s.indices) if v in variables(i)]
            if own:
                if isinstance(s, Init) or s.is_fiberwise or len(own) > 1 or s.indices[own[0]] != Var(name=v):
                    return False
                if s.tensor in self.cascade.output_names:
                    return False
                self.axis[s.tensor] = own[0]
            used = used or (isinstance(s, Einsum) and v in s.space)
        return used and all(map(self._unrolls, self._statements()))

    def _statements(self) -> Iterator[Einsum | Init]:
        yield from (s for s in walk(self.cascade.body) if isinstance(s, Einsum | Init))

    def _unrolls(self, s: Einsum | Init) -> bool:
        if isinstance(s, Einsum) and self.variable in s.ranks and (s.reduction is None or s.reduce == "mean"):
            return False
        conditions = self.cascade.constraints if isinstance(s, Einsum) else ()
        for r in reads(*_exprs(s), *conditions):
            for n, index in enumerate(r.indices):
                mine = self.axis.get(r.tensor) == n
                if not mine and self.variable not in variables(index):
                    continue
                at = [self._at(index, k) for k in range(self.size)]
                # An index out of range removes the point: left to those who can test it.
                if any(a is None or (mine and not 0 <= a < self.size) for a in at):
                    return False
        return True

    def _at(self, index: Expr, k: int) -> int | None:
        found = _folded(substitute(index, {self.variable: Num(value=k)}))
        return found.value if isinstance(found, Num) and isinstance(found.value, int) else None

    def _expr(self, expr: Expr, k: int) -> Expr:
        """An expression at one coordinate."""

        def at(e: Expr) -> Expr | None:
            if not isinstance(e, Read):
                return None
            indices = tuple(_folded(transform(i, at)) for i in e.indices)
            axis = self.axis.get(e.tensor)
            if axis is None or e.tensor in self.given:
                return replace(e, indices=indices)
            place = indices[axis]
            assert isinstance(place, Num)
            rest = (*indices[:axis], *indices[axis + 1 :])
            return Read(tensor=self.names[e.tensor, int(place.value)], indices=rest)

        return _folded(transform(substitute(expr, {self.variable: Num(value=k)}), at))

    def _statement(self, s: Statement) -> tuple[Statement, ...]:
        if isinstance(s, Iter):
            return (replace(s, body=tuple(n for b in s.body for n in self._statement(b))),)
        if isinstance(s, Init):
            return (replace(s, expr=self._expr(s.expr, 0)),)
        if self.variable not in s.space:
            return (self._one(s, 0),)
        shared = tuple(
            c for c in self.cascade.constraints if self.variable in variables(c) and set(variables(c)) <= set(s.space)
        )
        s = replace(s, where=(*shared, *s.where))
        if self.variable in s.ranks:
            return self._reduced(s)
        axis = self.axis[s.tensor]
        indices = (*s.indices[:axis], *s.indices[axis + 1 :])
        return tuple(
            replace(self._one(s, k), tensor=self.names[s.tensor, k], indices=indices) for k in range(self.size)
        )

    def _one(self, s: Einsum, k: int) -> Einsum:
        return replace(s, expr=self._expr(s.expr, k), where=tuple(self._expr(c, k) for c in s.where))

    def _reduced(self, s: Einsum) -> tuple[Statement, ...]:
        """A reduction over the rank: of each coordinate by itself, then of those."""
        assert s.reduction is not None
        op, empty = s.reduction.op.name, Num(value=s.reduction.empty)
        rest = tuple(v for v in s.ranks if v != self.variable)
        parts: list[Einsum] = []
        values: list[Expr] = []
        for k in range(self.size):
            one = self._one(s, k)
            if rest:
                parts.append(replace(one, tensor=fresh(f"{s.tensor}_{k}", self.taken), ranks=rest))
                values.append(Read(tensor=parts[-1].tensor, indices=s.indices))
            else:
                value = one.expr
                for c in reversed(one.where):
                    value = apply("select", c, value, empty)
                values.append(value)
        whole = values[0]
        for value in values[1:]:
            whole = apply(op, whole, value)
        return (*parts, replace(s, expr=whole, reduce=None, ranks=(), where=()))


def _exprs(s: Einsum | Init) -> tuple[Expr, ...]:
    return (s.expr, *s.where, *s.indices) if isinstance(s, Einsum) else (s.expr, *s.indices)


def _folded(expr: Expr) -> Expr:
    """The expression with whole numbers computed where that is exact."""
    if isinstance(expr, Read):
        return replace(expr, indices=tuple(map(_folded, expr.indices)))
    if not isinstance(expr, Apply):
        return expr
    args = tuple(map(_folded, expr.args))
    numbers = [a.value for a in args if isinstance(a, Num) and isinstance(a.value, int)]
    if len(numbers) == len(args):
        found = _WHOLE[expr.op](*numbers) if expr.op in _WHOLE else None
        if isinstance(found, int):
            return Num(value=found)
    if expr.op == "mul" and Num(value=1) in args:
        return args[1] if args[0] == Num(value=1) else args[0]
    if expr.op == "mul" and args[0] == Num(value=-1):
        return apply("neg", args[1])
    if expr.op == "select" and isinstance(args[0], Apply) and not variables(args[0]) and not reads(args[0]):
        truth = _truth(args[0])
        if truth is not None:
            return args[1] if truth else args[2]
    return replace(expr, args=args)


def _truth(c: Apply) -> bool | None:
    values = [a.value for a in c.args if isinstance(a, Num) and math.isfinite(a.value)]
    return _COMPARE[c.op](*values) if c.op in _COMPARE and len(values) == 2 else None


_WHOLE: Mapping[str, Callable[..., int | None]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "floordiv": lambda x, y: x // y if y else None,
    "mod": lambda x, y: x % y if y else None,
    "max": max,
    "min": min,
    "abs": abs,
}
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
}

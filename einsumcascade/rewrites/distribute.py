"""Take out of an iteration what its programs would have to share: loop distribution.

    init G[T, e] = 0                                       iter t desc:
    iter t desc:                                             D_each[t, p] = D[t+1, p]
      G[t, e] = G[t+1, e] + D[t+1, p] * X[t, e] :: sum(p)    D[t, p] = D[t+1, p] * Y[t, p]
      D[t, p] = D[t+1, p] * Y[t, p]                     ->   end
    end                                                      W[e] = D_each[t, p] * X[t, e] :: sum(t, p)
    W[e] = G[0, e]

A program walks an iteration for a tile of its states, so it cannot sum over an axis that they have. Such a sum, and a
state that only adds up such sums, becomes an Einsum after the iteration, over the generations of the states that it
reads, which are kept. Maps and small reductions are computed again, what a step reduces over a length is kept too.
Precondition: no other state depends on it; of a sum over the steps, only the last generation is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    rank_of,
    reads,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import drop_dead, fresh, names_taken
from einsumcascade.rewrites.loops import not_lowered
from einsumcascade.rewrites.step import Rewritten, Step


def distribute(cascade: Cascade, *, bounded: Collection[str]) -> Rewritten:
    """Move reductions over axes of an iteration's own states out of it.

    Args:
        cascade: after the rewrites that need no tile. bounded: variables whose whole extent a program holds.

    Returns: a cascade of equal value, and a step for each iteration that lost something.
    Cost: O(Einsums^2); in memory the generations of the states that are read: the steps times a state, float32.
    """
    steps: list[Step] = []
    for block in [s for s in cascade.body if isinstance(s, Iter)]:
        found = _Block(cascade, block, frozenset(bounded)).run()
        if found is None:
            continue
        cascade, left = found
        names = ", ".join(left)
        steps.append(
            Step(rule="distributed", what=f"{names}: after the iteration over {rank_of(block.var)}, not in it")
        )
    return Rewritten(cascade=drop_dead(cascade) if steps else cascade, steps=tuple(steps))


def name_last(cascade: Cascade, states: Collection[str]) -> tuple[Cascade, dict[str, Einsum]]:
    """Give the last generation of some states a name, under which it may lie in memory.

    Args:
        cascade: each of its iterations in the body itself. states: of these iterations.

    Returns: the cascade, and by state the Einsum that names its last generation.
    Raises: LoweringError: another generation is read after the iteration.
    """
    taken = names_taken(cascade)
    ends: dict[str, Einsum] = {}

    def leaf(e: Expr) -> Expr | None:
        if not (isinstance(e, Read) and e.tensor in ends):
            return None
        end = ends[e.tensor]
        assert isinstance(end.expr, Read)
        (axis,) = (n for n, i in enumerate(end.expr.indices) if not variables(i))
        if e.indices[axis] != end.expr.indices[axis]:
            raise not_lowered(end, f"{e}, which another kernel than that of its iteration reads,")
        return Read(tensor=end.tensor, indices=e.indices[:axis] + e.indices[axis + 1 :])

    body: list[Statement] = []
    for s in cascade.body:
        s = _with(s, leaf)
        body.append(s)
        if not isinstance(s, Iter):
            continue
        for e in (x for x in s.body if isinstance(x, Einsum) and x.tensor in states):
            last: Expr = Num(value=0) if s.descending else Scalar(name=rank_of(s.var))
            at = tuple(last if s.var in variables(i) else i for i in e.indices)
            own = tuple(i for i in e.indices if s.var not in variables(i))
            name = fresh(f"{e.tensor}_last", taken)
            ends[e.tensor] = Einsum(tensor=name, indices=own, expr=Read(tensor=e.tensor, indices=at))
            body.append(ends[e.tensor])
    return cascade.with_body(tuple(body)), ends


@dataclass
class _Block:
    """One iteration of a cascade.

    Args:
        sums: states that only add up, each with what a step adds.
        leaving: what becomes an Einsum after the iteration.
        again: tensors of a step that are computed again after it, under another name.
        kept: generations of states that are read after it, by the tensor and the index of the generation.
    """

    cascade: Cascade
    block: Iter
    bounded: frozenset[str]
    sums: dict[str, Expr] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    again: dict[str, str] = field(default_factory=dict)
    kept: dict[tuple[str, Expr], Einsum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.taken = names_taken(self.cascade)
        self.inner = [s for s in self.block.body if isinstance(s, Einsum)]
        written = {e.tensor for e in self.inner}
        self.states = {s.tensor: s for s in self.cascade.body if isinstance(s, Init) and s.tensor in written}
        self.others = [s for s in self.cascade.body if s is not self.block and s not in self.states.values()]
        self.defs = {e.tensor: e for e in self.inner}

    def run(self) -> tuple[Cascade, tuple[str, ...]] | None:
        """The cascade without what leaves the iteration, and what does; None where nothing does or can."""
        if len(self.inner) < len(self.block.body) or len(self.defs) < len(self.inner):
            return None
        self.sums = {t: x for t in self.states if (x := self._added(t)) is not None}
        core = [self.defs[t] for t in self.states if t not in self.sums]
        axes = {v for e in core for v in e.free} - {self.block.var} - self.bounded
        self.leaving = {e.tensor for e in self.inner if axes & set(e.ranks)}
        if not self.leaving:
            return None
        before = 0
        while before < len(self.leaving):
            before = len(self.leaving)
            self.leaving |= {e.tensor for e in self.inner if self.leaving & set(self._read(e))}
        if self.leaving & {e.tensor for e in core}:
            return None
        return self._written(), tuple(t for t in self.defs if t in self.leaving)

    def _read(self, e: Einsum) -> list[str]:
        return [r.tensor for r in reads(e.expr, *e.where)]

    def _axis(self, state: str) -> int:
        """The axis of the generations of a state."""
        return next(n for n, i in enumerate(self.defs[state].indices) if self.block.var in variables(i))

    def _added(self, state: str) -> Expr | None:
        """What a step adds to a state of which only the sum over all steps is read."""
        e, axis = self.defs[state], self._axis(state)
        if self.states[state].expr != Num(value=0) or e.reduce or e.where or state in self.cascade.output_names:
            return None
        if not (isinstance(e.expr, Apply) and e.expr.op == "add"):
            return None
        own = [a for a in e.expr.args if isinstance(a, Read) and a.tensor == state]
        rest = [a for a in e.expr.args if a not in own]
        if len(own) != 1 or len(rest) != 1 or any(state in self._read(x) for x in self.inner if x is not e):
            return None
        if state in {r.tensor for r in reads(*rest)} or not self._aligned(own[0], e, axis):
            return None
        last: Expr = Num(value=0) if self.block.descending else Scalar(name=rank_of(self.block.var))
        outside = [r for s in walk(tuple(self.others)) for r in _reads(s) if r.tensor == state]
        outside += [r for c in self.cascade.constraints for r in reads(c) if r.tensor == state]
        return rest[0] if all(r.indices[axis] == last for r in outside) else None

    def _aligned(self, own: Read, e: Einsum, axis: int) -> bool:
        pairs = list(zip(own.indices, e.indices, strict=True))
        return all(a == b for n, (a, b) in enumerate(pairs) if n != axis)

    def _written(self) -> Cascade:
        after = [self._outside(e) for e in self.inner if e.tensor in self.leaving]
        copies = [
            replace(
                self.defs[t],
                tensor=name,
                expr=self._elsewhere(self.defs[t].expr),
                where=tuple(map(self._elsewhere, self.defs[t].where)),
            )
            for t, name in self._ordered()
        ]
        after = [*copies, *after]
        old = [e for (t, g), e in self.kept.items() if g != self.defs[t].indices[self._axis(t)]]
        new = [e for e in self.kept.values() if e not in old]
        wanted = {r.tensor for s in (*walk(tuple(self.others)), *after) for r in _reads(s)}
        wanted |= {*self.cascade.output_names, *(t for t in self.states if t not in self.leaving)}
        staying: list[Einsum] = []
        for e in reversed([*old, *(e for e in self.inner if e.tensor not in self.leaving), *new]):
            if e.tensor in wanted or e in old or e in new:
                staying.insert(0, e)
                wanted |= set(self._read(e))
        body: list[Statement] = []
        for s in self.cascade.body:
            if s is self.block:
                body += [replace(self.block, body=tuple(staying)), *after]
            elif not (isinstance(s, Init) and s.tensor in self.leaving):
                body.append(self._reading(s))
        return self.cascade.with_body(tuple(body))

    def _outside(self, e: Einsum) -> Einsum:
        """What leaves, as an Einsum after the iteration."""
        if e.tensor not in self.sums:
            return replace(e, expr=self._elsewhere(e.expr), where=tuple(map(self._elsewhere, e.where)))
        axis, rest = self._axis(e.tensor), self.sums[e.tensor]
        indices = tuple(i for n, i in enumerate(e.indices) if n != axis)
        part = self.defs.get(rest.tensor) if isinstance(rest, Read) else None
        if part is not None and isinstance(rest, Read) and part.reduce == "sum" and rest.indices == part.indices:
            return replace(
                part,
                tensor=e.tensor,
                indices=indices,
                ranks=(self.block.var, *part.ranks),
                expr=self._elsewhere(part.expr),
                where=tuple(map(self._elsewhere, part.where)),
            )
        return Einsum(
            tensor=e.tensor, indices=indices, expr=self._elsewhere(rest), reduce="sum", ranks=(self.block.var,)
        )

    def _ordered(self) -> list[tuple[str, str]]:
        """What is computed again, in the order of the step; more of it turns up as it is written."""
        known = -1
        while known < len(self.again):
            known = len(self.again)
            for t in tuple(self.again):
                self._elsewhere(self.defs[t].expr)
                for c in self.defs[t].where:
                    self._elsewhere(c)
        return [(t, self.again[t]) for t in self.defs if t in self.again]

    def _elsewhere(self, expr: Expr) -> Expr:
        """An expression of a step after the iteration: generations that are kept, values that are computed again."""

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read) or e.tensor not in self.defs or e.tensor in self.leaving:
                return None
            at = tuple(self._elsewhere(i) for i in e.indices)
            d = self.defs[e.tensor]
            if e.tensor in self.states:
                axis = self._axis(e.tensor)
                return Read(
                    tensor=self._generation(e.tensor, e.indices[axis]),
                    indices=(*at[:axis], Var(name=self.block.var), *at[axis + 1 :]),
                )
            if set(d.ranks) - self.bounded:
                return replace(e, indices=at)
            if e.tensor not in self.again:
                self.again[e.tensor] = fresh(f"{e.tensor}_again", self.taken)
            return Read(tensor=self.again[e.tensor], indices=at)

        return transform(expr, leaf)

    def _generation(self, state: str, index: Expr) -> str:
        key = (state, index)
        if key not in self.kept:
            d, axis = self.defs[state], self._axis(state)
            around = (d.indices[:axis], d.indices[axis + 1 :])
            self.kept[key] = Einsum(
                tensor=fresh(f"{state}_each", self.taken),
                indices=(*around[0], Var(name=self.block.var), *around[1]),
                expr=Read(tensor=state, indices=(*around[0], index, *around[1])),
            )
        return self.kept[key].tensor

    def _reading(self, s: Statement) -> Statement:
        """A statement outside, which reads a sum where it read its last generation."""

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in self.sums and e.tensor in self.leaving:
                axis = self._axis(e.tensor)
                return replace(e, indices=tuple(i for n, i in enumerate(e.indices) if n != axis))
            return None

        return _with(s, leaf)


def _with(s: Statement, leaf: Callable[[Expr], Expr | None]) -> Statement:
    """A statement over what stands for some of its reads."""
    match s:
        case Einsum():
            return replace(s, expr=transform(s.expr, leaf), where=tuple(transform(c, leaf) for c in s.where))
        case Init():
            return replace(s, expr=transform(s.expr, leaf))
        case Iter():
            return replace(s, body=tuple(_with(x, leaf) for x in s.body))


def _reads(s: Statement) -> tuple[Read, ...]:
    match s:
        case Einsum():
            return reads(s.expr, *s.where, *s.indices)
        case Init():
            return reads(s.expr, *s.indices)
        case Iter():
            return ()

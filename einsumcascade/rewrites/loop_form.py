"""Bring the reductions over a rank to loop form: an ordinary cascade with an iterative rank (R2, R3, R4).

    GM[p]   = S[p, m] :: max(m)              rank m0 = T,  rank m1 = (M + M0 - 1) // M0
    SN[p,m] = exp(S[p,m] - GM[p])            init RGM[p, 0] = -inf,  init RSD[p, 0] = 0
    SD[p]   = SN[p,m] :: sum(m)         ->   iter m1:
                                               LGM[p, m1] = S[p, m1, m0] :: max(m0)
                                               RGM[p, m1+1] = max(RGM[p, m1], LGM[p, m1])
                                               SN[p, m1, m0] = exp(S[p, m1, m0] - RGM[p, m1+1])
                                               LSD[p, m1] = SN[p, m1, m0] :: sum(m0)
                                               RSD[p, m1+1] = exp(RGM[p, m1] - RGM[p, m1+1]) * RSD[p, m1] + LSD[p, m1]
                                             end

A reduction whose correction cannot be derived goes to a second iteration over the rank, after the first has
finished. The result is a cascade like any other: the reference runs it, and it equals the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Output,
    Read,
    Statement,
    Var,
    apply,
    reads,
    transform,
    walk,
)
from einsumcascade.rewrites.algebra import drop_dead, fresh, names_taken, producers
from einsumcascade.rewrites.beginnings import Beginnings
from einsumcascade.rewrites.loops import not_lowered
from einsumcascade.rewrites.seeds import planted, seeds_of
from einsumcascade.rewrites.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopForm:
    """A cascade in loop form.

    Args:
        cascade: the result.
        index: the iterative variable, and `inner`: the variable of the tile, empty for tiles of 1.
        points: for each variable walked, its value over index and inner; always within its extent but for the tail.
        loops: number of iterations over the rank, one after the other.
        steps: what was proven, and what was not and why.
    """

    cascade: Cascade
    index: str
    inner: str
    points: Mapping[str, Expr]
    loops: int
    steps: tuple[Step, ...]


def loop_form(cascade: Cascade, *, over: tuple[str, ...], tile: int, added: frozenset[str] = frozenset()) -> LoopForm:
    """Rewrite every reduction over the variables `over` as an iteration over tiles of the last of them.

    Several variables are walked by one iterative rank: the outer ones in steps of 1.

    Args:
        cascade: no iterative block may walk these variables.
        over: variables reduced, outermost first.
        tile: extent of the tile of the last.
        added: outputs that are added up in memory: one along the rank is written in the loop, as its elements pass.

    Returns: a cascade of equal value, with the proofs of its corrections as steps.
    Raises: LoweringError: a tensor that varies along the rank is read at an offset of it.
    Cost: one SymPy derivation a reduction, cached by its summand.
    """
    return _complete(prepared(cascade, over, tile, added).written(), cascade)


def prepared(cascade: Cascade, over: tuple[str, ...], tile: int, added: frozenset[str] = frozenset()) -> Iterations:
    """Place every reduction in its loop, each state begun at its seed where it has one."""
    seeds = seeds_of(cascade, over)
    while True:
        form = Iterations(planted(cascade, seeds), over, tile, seeds=seeds, added=added)
        form.prepare()
        wrong = form.unmoved()
        if not wrong:
            return form
        seeds = {t: x for t, x in seeds.items() if t not in wrong}


def _complete(form: LoopForm, cascade: Cascade) -> LoopForm:
    """The form, if all that it reads is there."""
    made = {i.tensor for i in cascade.inputs} | {s.tensor for s in walk(form.cascade.body) if not isinstance(s, Iter)}
    for s in (s for s in walk(form.cascade.body) if isinstance(s, Einsum | Init)):
        for r in _reads(s):
            if r.tensor not in made:
                raise not_lowered(cascade.einsums[0], f"reading {r}, which no loop over the rank gives to the others,")
    return form


@dataclass
class Iterations(Beginnings):
    """The loops written out as iterations."""

    def prepare(self) -> None:
        """Name the new ranks and place every reduction in its loop."""
        self.taken |= names_taken(self.cascade)
        self.defs = producers(self.cascade)
        streams = self.over[-1]
        if not self.index:
            self.inner = self.new_variable(streams + "0") if self.tile > 1 else ""
            self.index = self.new_variable(streams + "1" if len(self.over) == 1 else "step")
        nested = [x for s in self.cascade.body if isinstance(s, Iter) for x in walk(s.body) if isinstance(x, Einsum)]
        self.frees += [frozenset(x.free) for x in nested if set(x.ranks) & set(self.over)]
        for s in self.cascade.body:
            if isinstance(s, Einsum):
                self.place(s)
            elif isinstance(s, Iter):
                self._place_block(s)
        self.kept = self._kept()

    @property
    def loops(self) -> int:
        """The number of loops over the rank, one after the other."""
        return 1 + max((s.loop for s in self.states.values()), default=0)

    def run(self) -> LoopForm:
        """Place every reduction and write the cascade."""
        self.prepare()
        return self.written()

    def written(self) -> LoopForm:
        """Write the cascade, after `prepare`."""
        self.tell_seeds()
        loops = self.loops
        body: list[Statement] = []
        emitted: set[str] = set()
        for loop in range(loops):
            body += self.straight(loop, emitted)
            body += self.traverse(loop)
        body += self.straight(loops, emitted)
        constraints = self.constraints()
        if self.kept:
            constraints += tuple(c for c in self.cascade.constraints if c not in constraints)
        cascade = replace(
            self.cascade, ranks=self.cascade.ranks + self.ranks(), body=tuple(body), constraints=constraints
        )
        return LoopForm(
            cascade=drop_dead(cascade),
            index=self.index,
            inner=self.inner,
            loops=loops,
            points=self.point(),
            steps=tuple(self.steps),
        )

    def _place_block(self, block: Iter) -> None:
        """A block of the text's own: it runs as a whole once what it reads is finished."""
        inner = [x for x in walk(block.body) if isinstance(x, Einsum)]
        iterative = {x.tensor for x in self.cascade.body if isinstance(x, Init)}
        carries_rank = any(x.tensor in iterative and self.streams(x.tensor) for x in inner)
        if block.var in self.over or len(inner) < len(block.body) or carries_rank:
            raise not_lowered(inner[0], f"a reduction over {', '.join(self.over)}, which an iteration walks too,")
        writes = {x.tensor for x in inner}
        begun = [x.expr for x in self.cascade.body if isinstance(x, Init) and x.tensor in writes]
        everything = [r for x in inner for r in reads(x.expr, *x.where, *begun) if r.tensor not in writes]
        ready = max((self.finished(r) for r in everything), default=0)
        for t in writes:
            self.ready[t] = ready

    def _kept(self) -> frozenset[str]:
        """Tensors along the rank that are needed outside the loops: outputs, what they read, elements read by index."""
        outputs = set(self.cascade.output_names) - self.added
        wanted = [s for s in self.cascade.einsums if s.tensor in outputs and self.streams(s.tensor)]
        nested = {
            x.tensor
            for s in self.cascade.body
            if isinstance(s, Iter) and self._nests(s)
            for x in walk(s.body)
            if not isinstance(x, Iter)
        }
        outside = [
            s
            for s in self.cascade.einsums
            if not self.streams(s.tensor) and s.tensor not in self.states and s.tensor not in nested
        ]
        names = {s.tensor for s in wanted}
        pending = wanted + outside
        while pending:
            s = pending.pop()
            for r in reads(s.expr, *s.where):
                if self.streams(r.tensor) and r.tensor not in names:
                    names.add(r.tensor)
                    pending.append(self.defs[r.tensor])
        return frozenset(names)

    def straight(self, loop: int, emitted: set[str]) -> list[Statement]:
        """Statements outside the loops that can run once `loop` loops have ended."""
        out: list[Statement] = []
        for s in self.cascade.body:
            if isinstance(s, Iter):
                if any(x.tensor in emitted for x in walk(s.body) if isinstance(x, Einsum)):
                    continue
                inner = [x for x in s.body if isinstance(x, Einsum)]
                if all(self.ready[x.tensor] == loop for x in inner):
                    emitted |= {x.tensor for x in inner}
                    written = {x.tensor for x in inner}
                    inits = [x for x in self.cascade.body if isinstance(x, Init) and x.tensor in written]
                    out += [replace(x, expr=self._final(x.expr)) for x in inits]
                    if self._nests(s):
                        out += self._nested(s)
                    else:
                        out.append(replace(s, body=tuple(self._finally(x) for x in s.body)))
                continue
            if not isinstance(s, Einsum) or s.tensor in emitted:
                continue
            if self.streams(s.tensor) and s.tensor not in self.kept:
                continue
            if self.finished(Read(tensor=s.tensor, indices=s.indices)) != loop:
                continue
            emitted.add(s.tensor)
            if s.tensor in self.states:
                out += self.finished_state(s)
                continue
            out.append(self._finally(s))
        return out

    def _nests(self, block: Iter) -> bool:
        """Whether the steps of a block walk the rank."""
        return any(set(self.over) & set(x.space) for x in walk(block.body) if isinstance(x, Einsum))

    def _nested(self, block: Iter) -> list[Statement]:
        """A block each of whose steps reduces over the rank: its body is a cascade of its own, in loop form."""
        at = Var(name=block.var)
        new: Expr = at if block.descending else apply("add", at, Num(value=1))
        inner = [x for x in block.body if isinstance(x, Einsum)]
        iterative = {x.tensor for x in self.cascade.body if isinstance(x, Init)}
        carried = {x.tensor: fresh(f"{x.tensor}NEW", self.taken) for x in inner if x.tensor in iterative}

        def there(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in carried and new in e.indices:
                return Read(tensor=carried[e.tensor], indices=tuple(at if i == new else i for i in e.indices))
            return None

        own: list[Statement] = []
        for x in inner:
            x = replace(x, expr=transform(x.expr, there), where=tuple(transform(c, there) for c in x.where))
            if x.tensor in carried:
                x = replace(x, tensor=carried[x.tensor], indices=tuple(at if i == new else i for i in x.indices))
            own.append(x)
        written = {x.tensor for x in inner}
        needed = {t for x in inner for t in ancestors(self.cascade, x.tensor) if self.streams(t)} - written
        streams = [s for s in self.cascade.body if isinstance(s, Einsum) and s.tensor in needed]
        body = self.cascade.with_body((*streams, *own))
        others = [s for s in self.cascade.body if s is not block]
        outside = {r.tensor for s in walk(tuple(others)) if isinstance(s, Einsum | Init) for r in _reads(s)}
        left = [t for t in written if t in {*outside, *self.cascade.output_names} and t not in carried]
        outputs = tuple(Output(tensor=t) for t in (*carried.values(), *sorted(left)))
        form = Iterations(replace(body, outputs=outputs), self.over, self.tile)
        form.taken, form.memo, form.index, form.inner = self.taken, self.memo, self.index, self.inner
        form.frees = [*self.frees, *(frozenset(s.einsum.free) for s in self.states.values())]
        statements = form.run().cascade.body
        self.steps += form.steps
        names = {name: t for t, name in carried.items()}

        def back(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in names:
                indices = tuple(new if i == at else i for i in e.indices)
                return Read(tensor=names[e.tensor], indices=indices)
            return self.generation(e, "last") if isinstance(e, Read) and e.tensor in self.states else None

        def one(s: Statement) -> Statement:
            if isinstance(s, Iter):
                return replace(s, body=tuple(map(one, s.body)))
            if isinstance(s, Init):
                return replace(s, expr=transform(s.expr, back))
            s = replace(s, expr=transform(s.expr, back), where=tuple(transform(c, back) for c in s.where))
            if s.tensor in names:
                s = replace(s, tensor=names[s.tensor], indices=tuple(new if i == at else i for i in s.indices))
            return s

        done = [one(s) for s in statements]
        inits = [s for s in done if isinstance(s, Init)]
        return [*inits, replace(block, body=tuple(s for s in done if not isinstance(s, Init)))]

    def finished_state(self, s: Einsum) -> list[Statement]:
        """What gives a reduction its own name after its loop: an output needs one."""
        if s.tensor not in self.cascade.output_names:
            return []
        last = self.generation(Read(tensor=s.tensor, indices=s.indices), "last")
        return [replace(s, expr=last, reduce=None, ranks=(), where=())]

    def _finally(self, s: Statement) -> Statement:
        """A statement outside the loops, over final states."""
        if not isinstance(s, Einsum):
            return s
        return replace(s, expr=self._final(s.expr), where=tuple(self._final(c) for c in s.where))

    def _final(self, expr: Expr) -> Expr:
        """Read the last generation of every state."""

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in self.states:
                return self.generation(e, "last")
            return None

        return transform(expr, leaf)

    def traverse(self, loop: int) -> list[Statement]:
        """One loop over the rank: the first generations, and the block that absorbs a tile."""
        inits: list[Statement] = []
        body: list[Statement] = []
        placed: dict[str, str] = {}
        self.anchored = {}
        for state in self.states.values():
            if state.loop != loop:
                continue
            s = state.einsum
            assert s.reduction is not None
            target = Read(tensor=s.tensor, indices=s.indices)
            inits.append(
                Init(tensor=self.running(s.tensor), indices=(*s.indices, Num(value=0)), expr=self.beginning(state))
            )
            part = self.tile_of(s, fresh("L" + s.tensor, self.taken), loop, body, placed)
            new = self.generation(target, "new")
            moved = self.moved(state, body, source="old", target="new")
            body.append(Einsum(tensor=new.tensor, indices=new.indices, expr=apply(s.reduction.op.name, moved, part)))
        for s in self.cascade.einsums:
            if s.tensor in self.added and self.streams(s.tensor) and self._ready(s) == loop:
                body.append(self.passing(s, loop, body, placed))
        return [*inits, Iter(var=self.index, body=tuple(body))]

    def _ready(self, s: Einsum) -> int:
        return max((self.finished(r) for r in reads(s.expr, *s.where, *s.indices)), default=0)


def _reads(s: Einsum | Init) -> tuple[Read, ...]:
    return reads(s.expr, *s.where) if isinstance(s, Einsum) else reads(s.expr)
